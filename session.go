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
	// streamWindow is how much a stream may hold that nobody has read, in bytes.
	streamWindow = 1 << 20
	// socketBuffer is how much the kernel is asked to hold of what is sent.
	socketBuffer = 1 << 20
	// maxJoined is the longest body that is copied behind its header.
	maxJoined = 4 << 10
	// lastTimeout is how long a connection that takes nothing more is read, and
	// how long the ends of streams may take to be written at the end.
	lastTimeout = 250 * time.Millisecond
	// maxStreams is how many streams there may be at a time.
	maxStreams = 1 << 16
)

// session is one connection: a yamux session, what runs on it, and why it ended.
type session struct {
	mux     *yamux.Session
	frames  *frameConn // what mux runs on
	host    bool       // this side is the host's
	logger  hclog.Logger
	whyLost func() error // why the connection ended; may take a moment to find out

	calls  context.Context // ends when methods that are served here should stop
	cancel context.CancelFunc
	ending atomic.Bool // this side has asked the other to end, or will now

	running group // closed when this side ends the session
	ends    group // streams whose end is being written
}

// newSession begins a session on conn. Methods are served on it until ctx
// ends. If why is not nil it tells why the connection ended; heard is whether
// anything had been received.
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
		_ = b.SetWriteBuffer(socketBuffer) // slower without, no more
	}
	config := &yamux.Config{
		AcceptBacklog: 256, // what go-plugin has: more would be refused there
		// A process that is stopped is not lost: as long as it lives, nothing
		// here runs out of time.
		EnableKeepAlive:        false,
		KeepAliveInterval:      math.MaxInt64,
		ConnectionWriteTimeout: math.MaxInt64,
		StreamOpenTimeout:      0,
		StreamCloseTimeout:     0,
		MaxStreamWindowSize:    streamWindow,
		// What matters in yamux's messages is in the errors of calls and streams.
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

// lostError is what every call and stream gets when the connection was lost.
type lostError struct{ cause error }

func (e *lostError) Error() string   { return e.cause.Error() }
func (e *lostError) Unwrap() []error { return []error{e.cause, io.ErrUnexpectedEOF} }

// group is what is under way, until it is closed.
type group struct {
	mu     sync.Mutex // guards closed, and adding to the rest
	closed bool
	sync.WaitGroup
}

// enter reports whether there is one more, which must call Done.
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

func (g *group) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// allDone returns a channel that is closed when all of the group is done.
func (g *group) allDone() <-chan struct{} {
	done := make(chan struct{})
	go func() { // ends with the group
		g.Wait()
		close(done)
	}()
	return done
}

// spawn runs f in a goroutine that close waits for. It reports false, and does
// nothing, if the session is being closed. f must end when the session does.
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

// close ends the session and waits for its goroutines, except one that is
// inside the caller's own code: a GobEncode, say.
func (s *session) close() {
	s.ending.Store(true)
	s.running.close()
	s.ends.close()
	s.cancel()
	ends := s.ends.allDone()
	waitFor(lastTimeout, ends)
	// Readers of yamux's streams spin between the beginning of a Close and the
	// end of receiving. So receiving is ended first, if the connection lets it.
	_ = s.frames.Close()
	waitFor(lastTimeout, s.ended())
	_ = s.mux.Close()
	waitFor(reapTimeout, ends, s.running.allDone())
}

// once does something once, for all who ask.
type once[T any] struct {
	begun atomic.Bool
	done  chan struct{} // closed when v and err are set
	v     T
	err   error
}

func newOnce[T any]() *once[T] { return &once[T]{done: make(chan struct{})} }

// do runs f for the first caller. The others wait for its result, or for the
// end of ctx.
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

// result returns what f has returned, or the zero value before.
func (o *once[T]) result() (v T) {
	if isClosed(o.done) {
		return o.v
	}
	return v
}

// ended is closed when the session has ended, from whichever side.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// explain returns err, or why the connection was lost if that is the cause.
func (s *session) explain(err error) error {
	if err == nil || !s.mux.IsClosed() {
		return err
	}
	return s.whyLost()
}

// serve serves calls on a stream until the caller hangs up. The contexts of
// methods end with ctx.
func (s *session) serve(ctx context.Context, st *stream, svc *service) {
	services := map[string]*service{"Plugin": svc}
	if err := newRPCServer(st, services, s.logger, s.host).serve(ctx); err != io.EOF {
		s.debug("an RPC stream ended", "error", err)
	}
}

// debug logs what may explain a fault, and nothing once the session is to end.
func (s *session) debug(msg string, args ...any) {
	if !s.ending.Load() {
		s.logger.Debug(msg, args...)
	}
}

// stream is one stream of a session. Its errors say why a session was lost.
type stream struct {
	*yamux.Stream
	session *session
	flow    *flow

	writing sync.Mutex                // serialises writers
	late    atomic.Pointer[time.Time] // when writing shall end; nil or zero for never
}

func (st *stream) Read(p []byte) (int, error) {
	n, err := st.Stream.Read(p)
	if err == io.EOF && st.session.frames.hasEnded(st.flow) {
		return n, err // whatever has become of the connection since
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

// waitWindow waits until the other side has read something.
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

// Close ends the stream. It waits for nobody: the other side is told when the
// connection takes it.
func (st *stream) Close() error {
	st.session.frames.finish(st.flow)
	if ends := &st.session.ends; ends.enter() {
		// Ends when that is written, or with the session.
		go func() {
			defer ends.Done()
			_ = st.Stream.Close()
		}()
	}
	return nil
}

// abort closes conn and ends a Read or Write that is waiting on it.
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

// SetWriteDeadline sets until when Write waits for the other side to read.
func (st *stream) SetWriteDeadline(t time.Time) error {
	st.late.Store(&t)
	st.flow.signal()
	return nil
}

// open returns a new stream, which the other side has yet to be told of.
func (s *session) open() (*stream, error) {
	st, err := s.mux.OpenStream()
	if err != nil {
		return nil, s.explain(err)
	}
	return s.stream(st), nil
}

// accept returns the next stream that the peer opens. One with a number of this
// side's ends the session, because yamux would forget it when that number is
// given out here; so does one too many.
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

// frameConn is the connection below yamux. yamux looks after the streams and
// takes in what arrives. What a stream sends is written here directly: yamux
// would copy it, start a timer and have another goroutine write it, in two
// pieces. So this keeps account of what each stream may send, from the frames
// that pass; they are described in
// https://github.com/hashicorp/yamux/blob/master/spec.md.
//
// An error of writing is reported to nobody: the other side is gone, but what it
// sent before may not have been read. The session ends when reading does, which has
// a bound from then on.
type frameConn struct {
	conn  io.ReadWriteCloser
	heard atomic.Bool // something has been received

	writing sync.Mutex // serialises writers; guards the fields below
	broken  bool       // nothing can be written any more
	frame   []byte     // what is written next, to be used again

	mu    sync.Mutex // guards flows and each flow
	flows map[uint32]*flow

	// What of a frame has been read. There is one reader.
	header [frameHeader]byte
	have   int    // how much of the header
	body   uint32 // how much of the body is to come
}

// flow is what a stream may send. There is one from the first frame of a
// stream to the last.
type flow struct {
	window   uint32        // how many bytes
	received bool          // all that the other side sends
	finished bool          // this side sends no more
	sent     bool          // the other side has been told so
	reset    bool          // the stream was broken off
	changed  chan struct{} // holds something when one of these has changed
}

const (
	frameHeader = 12 // version, type, flags (2), stream (4), length or window (4)
	firstWindow = 256 << 10

	frameData   = 0
	frameWindow = 1

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
			if c.header[1] == frameData {
				c.body = binary.BigEndian.Uint32(c.header[8:])
			}
		}
	}
	return n, err
}

// Write writes a frame of yamux's own, which has no body.
func (c *frameConn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.pass(p, false)
	c.send(p, nil)
	return len(p), nil
}

func (c *frameConn) Close() error { return c.conn.Close() }

// pass takes account of a frame.
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

// hasEnded reports whether the other side has said that it sends no more.
func (c *frameConn) hasEnded(f *flow) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.received
}

// finish says that no more will be sent.
func (c *frameConn) finish(f *flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.finished = true
	f.signal()
}

// signal has the stream look at its flow again.
func (f *flow) signal() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// flow returns that of a stream.
func (c *frameConn) flow(id uint32) *flow {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flows[id]; f != nil {
		return f
	}
	return &flow{reset: true, changed: make(chan struct{}, 1)} // it is over already
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

// sendData sends as much of p as the window lets it: maybe nothing.
func (c *frameConn) sendData(id uint32, f *flow, p []byte) (int, error) {
	if _, err := c.reserve(f, 0); err != nil {
		return 0, err // without waiting for others
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

// send writes a frame, in one system call where there is one for two pieces.
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
	// Some, as a file, have deadlines in name only.
	d, ok := c.conn.(interface{ SetReadDeadline(time.Time) error })
	if !ok || d.SetReadDeadline(time.Now().Add(lastTimeout)) != nil {
		_ = c.conn.Close()
	}
}

// waitFor waits until all channels are closed, but not longer than that.
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
