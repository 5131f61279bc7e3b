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

const (
	maxStreams = 1 << 16 // how many streams a session may have when this side opens another
	maxNotice  = 4 << 10 // the length at which messages of yamux are cut
)

// session is one connection: a yamux session and what runs on it.
type session struct {
	mux    *yamux.Session
	frames *frameConn // the connection of mux
	host   bool       // this is the host's side
	logger hclog.Logger
	peer   string // how errors name the peer

	methodsCtx context.Context // ends when methods of this side should return
	cancel     context.CancelFunc
	ending     atomic.Bool // this side ends the session: its loss is no failure

	diagnose func(received bool) error // that of newSession; called by makeLostErr
	// lostErr returns the error of all that the loss of the connection has ended. The first
	// call makes it, and may wait for the end of the process.
	lostErr func() error

	running group // goroutines of spawn; closed with the session
}

// newSession starts a session on conn. Contexts of methods end with ctx. Errors name the
// peer. If diagnose is not nil, it is called once, when the connection has been lost, and
// returns why. received reports whether the peer has sent anything.
func newSession(
	ctx context.Context, conn io.ReadWriteCloser, host bool, peer string, logger hclog.Logger,
	diagnose func(received bool) error,
) (*session, error) {
	s := &session{host: host, logger: logger, peer: peer, diagnose: diagnose}
	s.frames = newFrameConn(conn)
	s.methodsCtx, s.cancel = context.WithCancel(ctx)
	s.lostErr = sync.OnceValue(s.makeLostErr)
	if b, ok := conn.(interface{ SetWriteBuffer(int) error }); ok {
		_ = b.SetWriteBuffer(socketBuffer) // only for speed
	}
	begin := yamux.Server
	if host {
		begin = yamux.Client
	}
	var err error
	if s.mux, err = begin(s.frames, s.muxConfig()); err != nil {
		_ = conn.Close()
		return nil, err
	}
	s.spawn(s.frames.writeQueue) // ends with the connection
	return s, nil
}

func (s *session) muxConfig() *yamux.Config {
	messages := &lineWriter{max: maxNotice, emit: func(line []byte, _ int) { s.debug(string(line)) }}
	return &yamux.Config{
		AcceptBacklog: maxOpening,
		// No timeouts: a process that is stopped keeps its connection.
		KeepAliveInterval:      math.MaxInt64,
		ConnectionWriteTimeout: math.MaxInt64,
		MaxStreamWindowSize:    streamWindow,
		// At Debug: errors of calls and streams have what matters of these messages.
		Logger: log.New(messages, "", 0),
	}
}

// ---- Streams ----

// open returns a new stream. It waits while maxOpening streams of this side wait to be
// accepted.
func (s *session) open(ctx context.Context) (*stream, error) {
	if s.mux.NumStreams() >= maxStreams {
		return nil, fmt.Errorf("the connection has %d open streams, and cannot have more", maxStreams)
	}
	select {
	case s.frames.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, contextError(ctx)
	case <-s.ended():
		return nil, s.explain(yamux.ErrSessionShutdown)
	}
	st, err := s.mux.OpenStream() // does not wait for the peer: yamux counts like frames.opening
	if err == yamux.ErrRemoteGoAway {
		// Nothing has been opened. With ErrStreamsExhausted, yamux does not give back its
		// own slot, and would block when all are used up: so this keeps its slot, too.
		<-s.frames.opening
	}
	if err != nil {
		return nil, s.explain(err)
	}
	return s.stream(st), nil
}

// accept returns the next stream that the peer opens. A stream with a number of this side
// ends the session, because yamux would lose it when this side uses the number. So does a
// stream far above the limit. The peer may count less than this side, because streams are
// on the way in both directions.
func (s *session) accept() (*stream, error) {
	st, err := s.mux.AcceptStream()
	if err != nil {
		return nil, err
	}
	ofHost := st.StreamID()%2 == 1
	if ofHost == s.host || s.mux.NumStreams() > maxStreams+2*maxOpening {
		s.debug("the peer opened a stream that is not allowed", "stream", st.StreamID())
		s.disconnect()
		return nil, yamux.ErrInvalidMsgType
	}
	return s.stream(st), nil
}

func (s *session) stream(st *yamux.Stream) *stream {
	wrapped := &stream{
		Stream:  st,
		session: s,
		flow:    s.frames.flow(st.StreamID()),
		reading: newLock(),
		writing: newLock(),
	}
	wrapped.readDeadline.Store(newDeadline(time.Time{}))
	wrapped.writeDeadline.Store(newDeadline(time.Time{}))
	return wrapped
}

// ---- The end ----

// disconnect closes the connection, which ends the session. It waits for nothing.
func (s *session) disconnect() { _ = s.frames.Close() }

// ended returns a channel that is closed when the session has ended.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// close closes the session and waits for its goroutines, but not for one that runs the
// caller's code, such as a GobEncode.
func (s *session) close() {
	// What fails from here on is no failure.
	s.ending.Store(true)
	// No goroutine begins that nobody would wait for.
	s.running.close()
	// Methods that serve the peer should return.
	s.cancel()
	// The ends of streams that were closed before arrive, if the peer reads.
	s.frames.closeQueue()
	waitFor(flushTimeout, s.frames.flushed)
	// Every Read, Write, open and accept ends, and then the connection.
	_ = s.mux.Close()
	// So the goroutines end.
	waitFor(reapTimeout, s.running.allDone())
}

// spawn runs f in a goroutine that close waits for. It returns false if the session is
// closed. f must return when the session ends.
func (s *session) spawn(f func()) bool { return s.running.spawn(f) }

// explain returns why the connection was lost, if it was, or that this side is ending it,
// and otherwise err.
func (s *session) explain(err error) error {
	switch {
	case err == nil || err == io.EOF: // even if the connection was lost later
		return err
	case s.mux.IsClosed():
		return s.lostErr()
	case s.ending.Load():
		return fmt.Errorf("%s: the connection is being closed: %w", s.peer, rpc.ErrShutdown)
	}
	return err
}

// makeLostErr makes the error that lostErr returns.
func (s *session) makeLostErr() error {
	switch {
	case s.diagnose != nil:
		return &lostError{cause: s.diagnose(s.frames.received.Load()), kind: io.ErrUnexpectedEOF}
	case s.ending.Load():
		return fmt.Errorf("%s: the connection was closed: %w", s.peer, rpc.ErrShutdown)
	}
	return &lostError{cause: errors.New("plugin: the connection was lost"), kind: io.ErrUnexpectedEOF}
}

// debug logs, unless the session is about to end.
func (s *session) debug(msg string, args ...any) {
	if !s.ending.Load() {
		s.logger.Debug(msg, args...)
	}
}

// ---- A stream ----

// stream is one stream of a session. If the session was lost, its errors have the reason.
type stream struct {
	*yamux.Stream // keeps what arrives
	session       *session
	flow          *flow
	reading       lock // of Read
	writing       lock // of Write
	readDeadline  atomic.Pointer[deadline]
	writeDeadline atomic.Pointer[deadline]
}

// deadline ends at a time, or when another deadline is set.
type deadline struct {
	context.Context
	end context.CancelFunc
}

// newDeadline returns a deadline. The zero time is never.
func newDeadline(at time.Time) *deadline {
	d := new(deadline)
	if at.IsZero() {
		d.Context, d.end = context.WithCancel(context.Background())
	} else {
		d.Context, d.end = context.WithDeadline(context.Background(), at)
	}
	return d
}

func (st *stream) Read(p []byte) (int, error) {
	n, err := st.read(p)
	return n, st.session.explain(err)
}

// read reads like Read. If the session was lost, its error does not have the reason.
func (st *stream) read(p []byte) (int, error) {
	// In yamux, two Reads of a stream that the peer has closed may wait for each other.
	if err := st.wait(st.reading, nil, &st.readDeadline); err != nil { // locks it
		return 0, err
	}
	defer st.reading.unlock()
	var waited error // counts only if nothing has arrived meanwhile
	for {
		n, err := st.session.frames.take(st.flow, len(p))
		switch {
		case n > 0:
			return st.readArrived(p[:n])
		case err == io.EOF:
			return st.Stream.Read(p) // so yamux has ended the stream, too
		case err != nil:
			return 0, err
		case waited != nil || len(p) == 0:
			return 0, waited
		}
		waited = st.wait(st.flow.readable, nil, &st.readDeadline)
	}
}

// readArrived fills p with what has arrived.
func (st *stream) readArrived(p []byte) (int, error) {
	n, err := io.ReadFull(st.Stream, p)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		// Not the end of the stream: yamux has ended the session before it took p.
		err = yamux.ErrSessionShutdown
	}
	return n, err
}

// unexplained is a stream of a plugin's output. Its Read does not find out why the session was
// lost: Client.whyLost waits for the end of the output.
type unexplained struct{ *stream }

func (u unexplained) Read(p []byte) (int, error) { return u.read(p) }

// Write has few frames on the stack, because it is called in new goroutines, and a stack
// that must grow takes as long as all the rest of Write.
func (st *stream) Write(p []byte) (sent int, err error) {
	if err := st.waitToWrite(st.writing); err != nil { // locks it
		return 0, st.session.explain(err)
	}
	defer st.writing.unlock()
	frames := st.session.frames
	for sent < len(p) {
		if err := st.waitToWrite(frames.turn); err != nil { // locks it
			return sent, st.session.explain(err)
		}
		n, err := frames.sendInTurn(st.flow, p[sent:])
		frames.turn.unlock()
		sent += n
		if err == nil && n == 0 {
			err = st.waitToWrite(st.flow.writable)
		}
		if err == nil && st.session.mux.IsClosed() {
			err = yamux.ErrSessionShutdown
		}
		if err != nil {
			return sent, st.session.explain(err)
		}
	}
	return sent, nil
}

// waitToWrite waits for ready, and locks it if it is a lock. Close and the deadline of Write
// end the wait.
func (st *stream) waitToWrite(ready <-chan struct{}) error {
	return st.wait(ready, st.flow.finished, &st.writeDeadline)
}

// wait waits for ready, until finished is closed, the session ends, or the deadline has
// passed. It takes what ready holds: if that is a lock, wait locks it.
func (st *stream) wait(ready, finished <-chan struct{}, current *atomic.Pointer[deadline]) error {
	select {
	case <-ready: // whatever else has happened
		return nil
	default:
	}
	for {
		d := current.Load()
		select {
		case <-ready:
			return nil
		case <-finished:
			return yamux.ErrStreamClosed
		case <-st.session.ended():
			return yamux.ErrSessionShutdown
		case <-d.Done():
		}
		if d.Err() == context.DeadlineExceeded {
			return yamux.ErrTimeout
		}
	}
}

// queue sends p, which is short, and waits for nothing. It fails if the peer has no room
// for p.
func (st *stream) queue(p []byte) error {
	err := st.session.frames.queueData(st.flow, p)
	return st.session.explain(err)
}

// Close closes the stream. It does not wait until that has been written.
func (st *stream) Close() error {
	st.session.frames.finish(st.flow)
	_ = st.Stream.Close() // fails if the session has ended
	return nil
}

// SetDeadline sets the deadlines of Read and Write.
func (st *stream) SetDeadline(t time.Time) error {
	_ = st.SetReadDeadline(t) // never fails
	return st.SetWriteDeadline(t)
}

// SetReadDeadline sets the deadline of Read.
func (st *stream) SetReadDeadline(t time.Time) error {
	st.readDeadline.Swap(newDeadline(t)).end()
	return nil
}

// SetWriteDeadline sets the deadline of Write. It does not end a Write whose data the
// system is taking: the end of the connection does.
func (st *stream) SetWriteDeadline(t time.Time) error {
	st.writeDeadline.Swap(newDeadline(t)).end()
	return nil
}

// abort closes conn and ends a Read or Write that is running.
func abort(conn io.ReadWriteCloser) {
	_ = conn.Close()
	if d, ok := conn.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Unix(1, 0))
	}
}
