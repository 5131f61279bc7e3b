package plugin

import (
	"runtime"
	"strings"
	"testing"
	"time"
)

// These are the helpers of the tests of unexported functions. All other tests
// are in package plugin_test and use the helpers there.

// hangs bounds everything that takes no time unless it hangs.
const hangs = time.Minute

// check ends the test if there is an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// errorSays checks that an error contains these words.
func errorSays(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("there is no error")
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error does not say %q:\n%v", word, err)
		}
	}
}

// receive receives from a channel, or learns that it is closed.
func receive[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(hangs):
		stacks := make([]byte, 1<<20)
		t.Fatalf("waited in vain for %s\n%s", what, stacks[:runtime.Stack(stacks, true)])
	}
	return v
}
