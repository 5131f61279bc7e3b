package plugin

import (
	"context"
	"io/fs"
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
				count := id &^ (side << 30)
				if seen[id] || id>>30 != side || count == 0 {
					t.Fatalf("NextId returned %#x, after %#x", id, begin)
				}
				seen[id] = true
			}
		}
	}
}

// A reader that has given bytes and failed is a reader: its error is not that of dialling.
func TestAwaitFailedReader(t *testing.T) {
	s := &dialledStream{copied: make(chan struct{}), err: fs.ErrNotExist}
	close(s.copied)
	for range 100 {
		arrived := make(chan *stream, 1)
		arrived <- new(stream)
		_, err := s.await(context.Background(), nil, arrived)
		check(t, err)
	}
}
