package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net/rpc"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

// maxStreams is how many streams a session may have.
const maxStreams = 1 << 16

// session is one connection: a yamux session and what runs on it.
type session struct {
	mux     *yamux.Session
	frames  *frameConn // the connection of mux
	host    bool       // this is the host's side
	logger  hclog.Logger
	peer    string       // how errors name the peer
	whyLost func() error // why the connection ended; may wait for the end of the process

	calls  context.Context // ends when methods of this side should return
	cancel context.CancelFunc
	ending atomic.Bool // this side has asked the peer to quit, or closes the session

	running group // goroutines of spawn; closed with the session
	ends    group // streams whose end is being written; closed with the session
}

// newSession starts a session on conn. Contexts of methods end with ctx. If why is not
// nil, it returns why the connection ended; heard reports whether anything was received.
func newSession(ctx context.Context, conn io.ReadWriteCloser, host bool, logger hclog.Logger, why func(heard bool) error) (*session, error) {
	s := &session{host: host, logger: logger, peer: anyPeer, frames: &frameConn{conn: conn, flows: make(map[uint32]*flow)}}
	s.calls, s.cancel = context.WithCancel(ctx)
	s.whyLost = sync.OnceValue(func() error {
		switch {
		case why != nil:
			return &lostError{why(s.frames.heard.Load())}
		case s.isEnding():
			return fmt.Errorf("plugin: the connection was closed: %w", rpc.ErrShutdown)
		}
		return &lostError{errors.New("plugin: the connection was lost")}
	})
	if b, ok := conn.(interface{ SetWriteBuffer(int) error }); ok {
		_ = b.SetWriteBuffer(socketBuffer) // only for speed
	}
	config := &yamux.Config{
		AcceptBacklog: 256, // as in go-plugin, which refuses more
		// No timeouts: a process that is stopped keeps its connection.
		KeepAliveInterval:      math.MaxInt64,
		ConnectionWriteTimeout: math.MaxInt64,
		MaxStreamWindowSize:    streamWindow,
		// Errors of calls and streams have what matters of yamux's messages.
		Logger: log.New(&lineWriter{max: maxJoined, emit: func(line []byte, _ int) { s.debug(string(line)) }}, "", 0),
	}
	begin := yamux.Server
	if host {
		begin = yamux.Client
	}
	var err error
	if s.mux, err = begin(s.frames, config); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return s, nil
}

// spawn runs f in a goroutine that close waits for. It returns false if the session is
// closed. f must return when the session ends.
func (s *session) spawn(f func()) bool {
	if !s.running.enter() {
		return false
	}
	go func() {
		defer s.running.Done()
		f()
	}()
	return true
}

// close closes the session and waits for its goroutines, but not for one that runs the
// caller's code, such as a GobEncode.
func (s *session) close() {
	s.expectEnd()
	s.running.close()
	s.ends.close()
	s.cancel()
	ends := s.ends.allDone()
	waitFor(lastTimeout, ends)
	// Readers of yamux streams spin while Close waits for the end of receiving. So
	// end receiving first.
	_ = s.frames.Close()
	waitFor(lastTimeout, s.ended())
	_ = s.mux.Close()
	waitFor(reapTimeout, ends, s.running.allDone())
}

// expectEnd says that this side is about to end the session. Its loss is no failure then.
func (s *session) expectEnd() { s.ending.Store(true) }

// isEnding reports whether this side has called expectEnd or close.
func (s *session) isEnding() bool { return s.ending.Load() }

// disconnect closes the connection, which ends the session. It waits for nothing.
func (s *session) disconnect() { _ = s.frames.Close() }

// ended returns a channel that is closed when the session has ended.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// explain returns why the connection was lost, if it was, and otherwise err.
func (s *session) explain(err error) error {
	if err == nil || !s.mux.IsClosed() {
		return err
	}
	return s.whyLost()
}

// debug logs, unless the session is about to end.
func (s *session) debug(msg string, args ...any) {
	if !s.isEnding() {
		s.logger.Debug(msg, args...)
	}
}

// stream is one stream of a session. If the session was lost, its errors have the reason.
type stream struct {
	*yamux.Stream
	session *session
	flow    *flow

	writing sync.Mutex                // serialises writers
	late    atomic.Pointer[time.Time] // the deadline of Write; nil or zero for none
}

func (st *stream) Read(p []byte) (int, error) {
	n, err := st.Stream.Read(p)
	if err == io.EOF && st.session.frames.hasEnded(st.flow) {
		return n, err // also if the connection was lost later
	}
	return n, st.session.explain(err)
}

func (st *stream) Write(p []byte) (n int, err error) {
	st.writing.Lock()
	defer st.writing.Unlock()
	for n < len(p) && err == nil {
		var sent int
		sent, err = st.session.frames.sendData(st.StreamID(), st.flow, p[n:])
		n += sent
		switch {
		case st.session.mux.IsClosed():
			err = yamux.ErrSessionShutdown
		case sent == 0 && err == nil:
			err = st.waitWindow()
		}
	}
	return n, st.session.explain(err)
}

// waitWindow waits until the peer has read something.
func (st *stream) waitWindow() error {
	var late <-chan time.Time
	if t := st.late.Load(); t != nil && !t.IsZero() {
		late = time.After(time.Until(*t))
	}
	select {
	case <-st.flow.changed:
	case <-st.session.ended():
	case <-late:
		return yamux.ErrTimeout
	}
	return nil
}

// Close closes the stream. It does not wait until that has been written.
func (st *stream) Close() error {
	st.session.frames.finish(st.flow)
	if ends := &st.session.ends; ends.enter() {
		// Ends when the end has been written, or with the session.
		go func() {
			defer ends.Done()
			_ = st.Stream.Close()
		}()
	}
	return nil
}

// abort closes conn and ends a Read or Write that is running.
func abort(conn io.ReadWriteCloser) {
	_ = conn.Close()
	if d, ok := conn.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Unix(1, 0))
	}
}

// SetDeadline sets the deadlines of Read and Write.
func (st *stream) SetDeadline(t time.Time) error {
	_ = st.SetReadDeadline(t)
	return st.SetWriteDeadline(t)
}

// SetWriteDeadline sets the deadline until which Write waits for the peer to read.
func (st *stream) SetWriteDeadline(t time.Time) error {
	st.late.Store(&t)
	st.flow.signal()
	return nil
}

// open returns a new stream. The peer does not know it before the first Write.
func (s *session) open() (*stream, error) {
	st, err := s.mux.OpenStream()
	if err != nil {
		return nil, s.explain(err)
	}
	return s.stream(st), nil
}

// accept returns the next stream that the peer opens. A stream with a number of this side
// ends the session, because yamux would lose it when this side uses the number. So does a
// stream above the limit.
func (s *session) accept() (*stream, error) {
	st, err := s.mux.AcceptStream()
	if err != nil {
		return nil, err
	}
	if odd := st.StreamID()%2 == 1; odd == s.host || s.mux.NumStreams() > maxStreams {
		s.debug("the peer opened a stream that is not allowed", "stream", st.StreamID())
		s.disconnect()
		return nil, yamux.ErrInvalidMsgType
	}
	return s.stream(st), nil
}

func (s *session) stream(st *yamux.Stream) *stream {
	return &stream{Stream: st, session: s, flow: s.frames.flow(st.StreamID())}
}
