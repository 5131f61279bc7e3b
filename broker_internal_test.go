package plugin

import (
	"testing"
)

// The numbers of both sides differ from each other's, and from those of
// go-plugin, which counts from 1 on both sides.
func TestNextId(t *testing.T) {
	for _, isHost := range []bool{true, false} {
		b := &MuxBroker{session: &session{host: isHost}}
		side := uint32(1)
		if isHost {
			side = 2
		}
		for _, begin := range []uint64{0, 1<<30 - 50, 1<<31 - 50, 1<<32 - 50} {
			b.ids.Store(begin)
			seen := make(map[uint32]bool)
			for range 100 {
				id := b.NextId()
				if seen[id] || id>>30 != side || id<<2 == 0 {
					t.Fatalf("NextId returned %#x, after %#x", id, begin)
				}
				seen[id] = true
			}
		}
	}
}
