package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/rpc"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

const (
	streamWindow = 1 << 20 // how many bytes a stream holds that have not been read
	socketBuffer = 1 << 20 // the size of the system's send buffer
	maxJoined    = 4 << 10 // the longest body that is copied behind its header
	maxPings     = 1 << 14 // how many pings may wait for room for their answers
	maxStreams   = 1 << 16 // how many streams a session may have
	// lastTimeout limits reading after an error of writing, and the writing of the
	// ends of streams when a session is closed.
	lastTimeout = 250 * time.Millisecond
)

// session is one connection: a yamux session and what runs on it.
type session struct {
	mux     *yamux.Session
	frames  *frameConn // the connection of mux
	host    bool       // this is the host's side
	logger  hclog.Logger
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
	s := &session{host: host, logger: logger, frames: &frameConn{conn: conn, flows: make(map[uint32]*flow)}}
	s.calls, s.cancel = context.WithCancel(ctx)
	s.whyLost = sync.OnceValue(func() error {
		switch {
		case why != nil:
			return &lostError{why(s.frames.heard.Load())}
		case s.ending.Load():
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

// lostError is the error of every call and stream when the connection was lost.
type lostError struct{ cause error }

func (e *lostError) Error() string   { return e.cause.Error() }
func (e *lostError) Unwrap() []error { return []error{e.cause, io.ErrUnexpectedEOF} }

// group is a sync.WaitGroup that can be closed.
type group struct {
	mu     sync.Mutex // guards closed, and calls of Add
	closed bool
	sync.WaitGroup
}

// enter adds one, which must call Done. It returns false if the group is closed.
func (g *group) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.Add(1)
	}
	return !g.closed
}

func (g *group) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// allDone returns a channel that is closed when all have called Done.
func (g *group) allDone() <-chan struct{} {
	done := make(chan struct{})
	go func() { // ends with the group
		g.Wait()
		close(done)
	}()
	return done
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
	s.ending.Store(true)
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

// once calls a function once and keeps its result.
type once[T any] struct {
	begun atomic.Bool
	done  chan struct{} // closed when v and err are set
	v     T
	err   error
}

func newOnce[T any]() *once[T] { return &once[T]{done: make(chan struct{})} }

// do calls f for the first caller. Other callers wait for the result or the end of ctx.
func (o *once[T]) do(ctx context.Context, f func() (T, error)) (v T, err error) {
	if o.begun.CompareAndSwap(false, true) {
		defer close(o.done)
		o.err = errors.New("plugin: the host's own code panicked") // if f does
		o.v, o.err = f()
		return o.v, o.err
	}
	select {
	case <-o.done:
		return o.v, o.err
	case <-ctx.Done():
		return v, fmt.Errorf("plugin: waiting for another call: %w", contextError(ctx))
	}
}

// result returns the result of f, or the zero value before f has returned.
func (o *once[T]) result() (v T) {
	if isClosed(o.done) {
		return o.v
	}
	return v
}

// ended returns a channel that is closed when the session has ended.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// explain returns why the connection was lost, if it was, and otherwise err.
func (s *session) explain(err error) error {
	if err == nil || !s.mux.IsClosed() {
		return err
	}
	return s.whyLost()
}

// serve answers calls on a stream until the peer closes it. Contexts of methods end with
// ctx.
func (s *session) serve(ctx context.Context, st *stream, svc *service) {
	if err := newRPCServer(st, map[string]*service{"Plugin": svc}, s.logger, s.host).serve(ctx); err != io.EOF {
		s.debug("an RPC stream ended", "error", err)
	}
}

// debug logs, unless the session is about to end.
func (s *session) debug(msg string, args ...any) {
	if !s.ending.Load() {
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
		_ = s.frames.Close()
		return nil, yamux.ErrInvalidMsgType
	}
	return s.stream(st), nil
}

func (s *session) stream(st *yamux.Stream) *stream {
	return &stream{Stream: st, session: s, flow: s.frames.flow(st.StreamID())}
}

// frameConn is the connection below yamux. yamux manages the streams and handles what
// arrives. Data is written here directly, because yamux copies it, starts a timer, and
// lets another goroutine write it in two pieces. So frameConn reads the frames that pass
// to know how much each stream may send. The frames are described in
// https://github.com/hashicorp/yamux/blob/master/spec.md.
//
// An error of writing is not returned: the peer is gone, but data from it may not have
// been read. The session ends when reading ends, which has a limit from then on.
type frameConn struct {
	conn  io.ReadWriteCloser
	pings atomic.Int32 // received and not answered: yamux has a goroutine for each
	heard atomic.Bool  // something has been received

	writing sync.Mutex // serialises writers; guards the fields below
	broken  bool       // nothing can be written any more
	frame   []byte     // a buffer for writing

	mu    sync.Mutex // guards flows and each flow
	flows map[uint32]*flow

	// The state of the one reader:
	header [frameHeader]byte
	have   int    // how many bytes of the header have been read
	body   uint32 // how many bytes of the body have not been read
}

// flow is the sending side of a stream. It exists from the first frame of the stream to
// the last.
type flow struct {
	window   uint32        // how many bytes may be sent
	received bool          // the peer has closed its side
	finished bool          // this side is closed
	sent     bool          // the peer has been told so
	reset    bool          // the stream was reset
	changed  chan struct{} // holds one if a field has changed
}

const (
	frameHeader = 12 // version, type, flags (2), stream (4), length or window (4)
	firstWindow = 256 << 10

	frameData   = 0
	frameWindow = 1
	framePing   = 2

	flagSYN = 1
	flagFIN = 4
	flagRST = 8
)

// Read reads for yamux.
func (c *frameConn) Read(p []byte) (int, error) {
	n, err := c.conn.Read(p)
	if n > 0 {
		c.heard.Store(true)
	}
	for b := p[:n]; len(b) > 0; {
		if c.body > 0 {
			inside := min(c.body, uint32(len(b)))
			c.body -= inside
			b = b[inside:]
			continue
		}
		more := copy(c.header[c.have:], b)
		c.have += more
		b = b[more:]
		if c.have == frameHeader {
			c.have = 0
			c.pass(c.header[:], true)
			switch c.header[1] {
			case frameData:
				c.body = binary.BigEndian.Uint32(c.header[8:])
			case framePing:
				if c.pings.Add(1) > maxPings {
					return 0, errors.New("plugin: the peer sends pings and reads no answers")
				}
			}
		}
	}
	return n, err
}

// Write writes a frame for yamux, which has no body.
func (c *frameConn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if p[1] == framePing {
		c.pings.Add(-1)
	}
	c.pass(p, false)
	c.send(p, nil)
	return len(p), nil
}

func (c *frameConn) Close() error { return c.conn.Close() }

// pass updates the flow of a frame.
func (c *frameConn) pass(header []byte, received bool) {
	flags := binary.BigEndian.Uint16(header[2:])
	id := binary.BigEndian.Uint32(header[4:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if header[1] > frameWindow { // a ping, or the end of the session
		return
	}
	f := c.flows[id]
	if f == nil && flags&flagSYN != 0 {
		f = &flow{window: firstWindow, changed: make(chan struct{}, 1)}
		c.flows[id] = f
	}
	if f == nil || received && header[1] == frameData && flags == 0 {
		return
	}
	if received && header[1] == frameWindow {
		f.window += binary.BigEndian.Uint32(header[8:])
	}
	f.received = f.received || received && flags&flagFIN != 0
	f.sent = f.sent || !received && flags&flagFIN != 0
	f.reset = f.reset || flags&flagRST != 0
	if f.reset || f.sent && f.received {
		delete(c.flows, id)
	}
	f.signal()
}

// hasEnded reports whether the peer has closed its side.
func (c *frameConn) hasEnded(f *flow) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.received
}

// finish closes this side.
func (c *frameConn) finish(f *flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.finished = true
	f.signal()
}

// signal wakes a Write that waits for a change.
func (f *flow) signal() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// flow returns the flow of a stream.
func (c *frameConn) flow(id uint32) *flow {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flows[id]; f != nil {
		return f
	}
	return &flow{reset: true, changed: make(chan struct{}, 1)} // the stream has ended
}

// reserve takes up to size bytes of what f may send.
func (c *frameConn) reserve(f *flow, size int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case f.reset:
		return 0, yamux.ErrConnectionReset
	case f.finished:
		return 0, yamux.ErrStreamClosed
	}
	n := min(uint32(min(size, math.MaxInt32)), f.window)
	f.window -= n
	return int(n), nil
}

// sendData sends as much of p as the window allows, which may be nothing.
func (c *frameConn) sendData(id uint32, f *flow, p []byte) (int, error) {
	if _, err := c.reserve(f, 0); err != nil {
		return 0, err // without waiting for other writers
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	n, err := c.reserve(f, len(p))
	if n == 0 {
		return 0, err
	}
	c.frame = append(c.frame[:0], 0, frameData, 0, 0)
	c.frame = binary.BigEndian.AppendUint32(c.frame, id)
	c.frame = binary.BigEndian.AppendUint32(c.frame, uint32(n))
	if n <= maxJoined {
		c.frame = append(c.frame, p[:n]...)
		c.send(c.frame, nil)
	} else {
		c.send(c.frame, p[:n])
	}
	return n, nil
}

// send writes a frame, if possible in one system call.
func (c *frameConn) send(header, body []byte) {
	if c.broken {
		return
	}
	var err error
	if body == nil {
		_, err = c.conn.Write(header)
	} else {
		pieces := net.Buffers{header, body}
		_, err = pieces.WriteTo(c.conn)
	}
	if err == nil {
		return
	}
	c.broken = true
	// Files have this method, but it may fail.
	d, ok := c.conn.(interface{ SetReadDeadline(time.Time) error })
	if !ok || d.SetReadDeadline(time.Now().Add(lastTimeout)) != nil {
		_ = c.conn.Close()
	}
}

// waitFor waits until all channels are closed. It returns false after the timeout.
func waitFor(timeout time.Duration, chans ...<-chan struct{}) bool {
	late := time.NewTimer(timeout)
	defer late.Stop()
	for _, ch := range chans {
		select {
		case <-ch:
		case <-late.C:
			return false
		}
	}
	return true
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
