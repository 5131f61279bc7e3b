package plugin

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// These are the helpers of the tests of unexported functions. All other tests
// are in package plugin_test and use the helpers there, and some of these.

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

// recordText returns a record of a logger as "level: message | key=value key=value".
// Strings have quotes.
func recordText(level hclog.Level, msg string, args []any) string {
	text := level.String() + ": " + msg
	separator := " | "
	for i := 0; i+1 < len(args); i += 2 {
		value := fmt.Sprint(args[i+1])
		if s, ok := args[i+1].(string); ok {
			value = strconv.Quote(s)
		}
		text += separator + fmt.Sprint(args[i]) + "=" + value
		separator = " "
	}
	return text
}
