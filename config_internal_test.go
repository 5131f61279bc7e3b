package plugin

import (
	"math"
	"testing"
)

// The longest KillTimeout is no overflow when Kill adds its own times.
func TestLongestKillTimeout(t *testing.T) {
	config := ClientConfig{KillTimeout: math.MaxInt64}
	got := config.withDefaults().KillTimeout
	if got < math.MaxInt64/4 || got+reapTimeout+drainTimeout < got {
		t.Errorf("the longest KillTimeout becomes %v", got)
	}
}
