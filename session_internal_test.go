package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

// A process that is stopped keeps its connection, for however long.
func TestMuxHasNoTimeouts(t *testing.T) {
	config := new(session).muxConfig()
	limits := config.StreamOpenTimeout + config.StreamCloseTimeout // 0 is none
	if config.EnableKeepAlive || config.ConnectionWriteTimeout < math.MaxInt64 || limits > 0 {
		t.Errorf("it has timeouts: %+v", config)
	}
}

// A peer that opens far more streams than a session may have ends the session.
func TestTooManyStreams(t *testing.T) {
	t.Parallel()
	conn, peer := TestConn(t)
	s, err := newSession(context.Background(), conn, true, anyPeer, hclog.NewNullLogger(), nil)
	check(t, err)
	defer s.close()
	// As many at a time as may wait to be accepted, which is faster than one by one.
	var accepted, opened int
	for err == nil && accepted <= maxStreams+2*maxOpening {
		var frames []byte
		for range maxOpening {
			opened++
			frames = append(frames, 0, frameWindow, 0, flagSYN)
			frames = binary.BigEndian.AppendUint32(frames, uint32(2*opened))
			frames = binary.BigEndian.AppendUint32(frames, 0)
		}
		_, err = peer.Write(frames)
		for ; err == nil && accepted < opened; accepted++ {
			_, err = s.accept()
		}
	}
	// NumStreams counts those that wait to be accepted, too.
	if err == nil || accepted <= maxStreams+maxOpening {
		t.Errorf("after %d streams, accept returned %v", accepted, err)
	}
}

// Opening a stream at the limit fails, and the session goes on.
func TestStreamLimit(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	conn, peer := TestConn(t)
	here, err := newSession(ctx, conn, true, anyPeer, hclog.NewNullLogger(), nil)
	check(t, err)
	defer here.close()
	there, err := newSession(ctx, peer, false, anyPeer, hclog.NewNullLogger(), nil)
	check(t, err)
	defer there.close()
	var ends [2]*stream
	opening := make(chan error, 1)
	go func() { // ends when all are open, or with the session
		var err error
		for range maxStreams {
			ends[0], err = here.open(ctx)
			if err != nil {
				break
			}
		}
		opening <- err
	}()
	for range maxStreams {
		ends[1], err = there.accept()
		check(t, err)
	}
	check(t, receive(t, "the last stream", opening))
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

// When the peer accepts no more streams, each open fails at once.
func TestOpenRefused(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	defer cancel()
	conn, peer := TestConn(t)
	here, err := newSession(ctx, conn, true, anyPeer, hclog.NewNullLogger(), nil)
	check(t, err)
	defer here.close()
	there, err := newSession(ctx, peer, false, anyPeer, hclog.NewNullLogger(), nil)
	check(t, err)
	defer there.close()
	check(t, there.mux.GoAway())
	// It has arrived before a stream that is opened later.
	_, err = there.open(ctx)
	check(t, err)
	_, err = here.accept()
	check(t, err)
	for range 2 * maxOpening {
		_, err = here.open(ctx)
		if !errors.Is(err, yamux.ErrRemoteGoAway) {
			t.Fatal("open returned", err)
		}
	}
}

// What has arrived behind a frame that ends the session is lost, and that is no clean end.
func TestReadAfterProtocolError(t *testing.T) {
	t.Parallel()
	conn, peer := TestConn(t)
	s, err := newSession(context.Background(), conn, true, anyPeer, hclog.NewNullLogger(), nil)
	check(t, err)
	defer s.close()
	_, err = peer.Write([]byte{0, frameWindow, 0, flagSYN, 0, 0, 0, 2, 0, 0, 0, 0})
	check(t, err)
	st, err := s.accept()
	check(t, err)
	invalid := []byte{9, frameWindow, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	frames := append(appendDataHeader(invalid, st.StreamID(), 5), "bytes"...)
	_, err = peer.Write(frames)
	check(t, err)
	_, err = st.Read(make([]byte, 10))
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error("Read returned", err)
	}
}
