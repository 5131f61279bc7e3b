package plugin

import (
	"context"
	"encoding/binary"
	"io"
	"strings"
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
	if opened != maxStreams+2*maxOpening+1 {
		t.Errorf("stream %d ended the session: %v", opened, err)
	}
}

// Opening a stream at the limit fails, and the session goes on.
func TestStreamLimit(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	conn, peer := TestConn(t)
	here, err := newSession(ctx, conn, true, hclog.NewNullLogger(), nil)
	check(t, err)
	defer here.close()
	there, err := newSession(ctx, peer, false, hclog.NewNullLogger(), nil)
	check(t, err)
	defer there.close()
	var ends [2]*stream
	for range maxStreams {
		ends[0], err = here.open(ctx)
		check(t, err)
		ends[1], err = there.accept()
		check(t, err)
	}
	_, err = here.open(ctx)
	if err == nil || !strings.Contains(err.Error(), "65536 open streams") {
		t.Error("above the limit, open returned", err)
	}
	for _, end := range ends {
		check(t, end.Close())
	}
	_, _ = io.Copy(io.Discard, ends[0]) // until the peer has closed it
	st, err := here.open(ctx)
	check(t, err)
	check(t, st.Close())
}
