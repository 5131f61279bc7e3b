package plugin

import (
	"context"
	"encoding/binary"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// A peer that opens far more streams than a session may have ends the session.
func TestTooManyStreams(t *testing.T) {
	t.Parallel()
	conn, peer := TestConn(t)
	s, err := newSession(context.Background(), conn, true, hclog.NewNullLogger(), nil)
	check(t, err)
	defer s.close()
	opened := 0
	for ; err == nil; opened++ {
		open := []byte{0, frameWindow, 0, flagSYN}
		open = binary.BigEndian.AppendUint32(open, uint32(2*opened+2))
		open = binary.BigEndian.AppendUint32(open, 0)
		_, err = peer.Write(open)
		check(t, err)
		_, err = s.accept()
	}
	if opened != maxStreams+2*maxUnacknowledged+1 {
		t.Errorf("stream %d ended the session: %v", opened, err)
	}
}
