package plugin

import (
	"testing"
	"time"
)

// The pause doubles from a tenth of a second to ten seconds, and begins anew after a long life.
func TestNextPause(t *testing.T) {
	var pause time.Duration
	for _, want := range []int{100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000} {
		pause = nextPause(pause, false)
		if pause != time.Duration(want)*time.Millisecond {
			t.Errorf("the pause is %v, and not %d ms", pause, want)
		}
	}
	if pause = nextPause(pause, true); pause != 0 {
		t.Errorf("after a long life the pause is %v", pause)
	}
}
