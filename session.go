package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
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
	// maxStreams is how many streams there may be at a time. The other side can
	// open them, and leave them open here by not closing its end.
	maxStreams = 1 << 16
	// maxPings is how many pings may wait for their answers to be written.
	maxPings = 1 << 14
)

// session is one connection: a yamux session, what runs on it, and why it ended.
type session struct {
	mux     *yamux.Session
	frames  *frameConn // what mux runs on
	host    bool       // this side is the host's
	logger  hclog.Logger
	whyLost func() error // why the connection was lost; may take a moment to find out

	calls  context.Context // ends when methods that are served here should stop
	cancel context.CancelFunc
	ending atomic.Bool // this side has asked the other to end, or will now

	requests, responses sync.Pool // of *gobReader, from streams that have ended

	mu      sync.Mutex // guards closing and fault, and adding to the rest
	closing bool       // this side has ended the session
	fault   error      // what the other side has done to have it ended here
	running sync.WaitGroup
	ends    sync.WaitGroup // streams whose end is being written
}

// newSession begins a session on conn. Methods are served on it until ctx
// ends. If why is not nil it tells why the connection was lost, or nil if it
// was meant to end.
func newSession(ctx context.Context, conn io.ReadWriteCloser, host bool, logger hclog.Logger, why func() error) (*session, error) {
	s := &session{host: host, logger: newNotes(logger), frames: &frameConn{conn: conn, flows: make(map[uint32]*flow)}}
	s.calls, s.cancel = context.WithCancel(ctx)
	s.whyLost = sync.OnceValue(func() error {
		s.mu.Lock()
		fault := s.fault
		s.mu.Unlock()
		if fault != nil {
			return fault
		}
		if why == nil {
			return &lostError{errors.New("plugin: the connection was lost")}
		}
		if err := why(); err != nil {
			return &lostError{err}
		}
		return nil
	})
	if b, ok := conn.(interface{ SetWriteBuffer(int) error }); ok {
		_ = b.SetWriteBuffer(socketBuffer) // slower without, no more
	}
	var below io.ReadWriteCloser = s.frames
	if a, ok := conn.(addresses); ok {
		below = struct {
			*frameConn
			addresses
		}{s.frames, a}
	}
	if host && logger.IsTrace() {
		s.frames.trace = make(frameTrace, 1000)
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
		Logger:                 muxLogger{s},
	}
	var err error
	if host {
		s.mux, err = yamux.Client(below, config)
	} else {
		s.mux, err = yamux.Server(below, config)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if s.frames.trace != nil {
		go s.frames.trace.log(s.logger, s.ended()) // ends with the session
	}
	return s, nil
}

// addresses are what yamux passes on of a connection.
type addresses interface {
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
}

// lostError is what every call and stream gets when the connection was lost.
type lostError struct{ cause error }

func (e *lostError) Error() string   { return e.cause.Error() }
func (e *lostError) Unwrap() []error { return []error{e.cause, io.ErrUnexpectedEOF} }

// muxLogger takes yamux's messages. They are for those who debug this package:
// what matters in them comes out as the error of a call or stream.
type muxLogger struct{ s *session }

func (l muxLogger) Print(v ...any)   { l.Printf("%s", fmt.Sprint(v...)) }
func (l muxLogger) Println(v ...any) { l.Printf("%s", fmt.Sprint(v...)) }
func (l muxLogger) Printf(format string, v ...any) {
	if !l.s.ending.Load() {
		l.s.logger.Debug(strings.TrimSpace(fmt.Sprintf(format, v...)))
	}
}

// spawn runs f in a goroutine that close waits for. It reports false, and does
// nothing, if the session is being closed. f must end when the session does.
func (s *session) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.running.Go(f)
	return true
}

func (s *session) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// close ends the session and waits for its goroutines, except one that is
// inside the caller's own code: a GobEncode, say.
func (s *session) close() {
	s.ending.Store(true)
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.cancel()
	ends := allDone(&s.ends)
	waitFor(lastTimeout, ends)
	// Readers of yamux's streams spin between the beginning of a Close and the
	// end of receiving. So receiving is ended first, if the connection lets it.
	_ = s.frames.Close()
	select {
	case <-s.mux.CloseChan():
	case <-time.After(lastTimeout):
	}
	_ = s.mux.Close()
	waitFor(reapTimeout, ends, allDone(&s.running))
}

// allDone returns a channel that is closed when all of a group is done.
func allDone(group *sync.WaitGroup) chan struct{} {
	done := make(chan struct{})
	go func() { // ends with the group
		group.Wait()
		close(done)
	}()
	return done
}

// ended is closed when the session has ended, from whichever side.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// explain returns err, or why the connection was lost if that is the cause.
func (s *session) explain(err error) error {
	if err == nil || !s.mux.IsClosed() || s.isClosing() {
		return err
	}
	if lost := s.whyLost(); lost != nil {
		return lost
	}
	return err
}

// serve serves calls on a stream until the caller hangs up.
func (s *session) serve(st *stream, services map[string]*service) {
	if err := newRPCServer(st, services, s.logger, s.host, &s.requests).serve(s.calls); err != io.EOF {
		s.logger.Debug("an RPC stream ended", "error", err)
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
		case st.over():
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
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		// Ends when that is written, or with the session.
		s.ends.Go(func() { _ = st.Stream.Close() })
	}
	return nil
}

// abort closes conn and ends a Read or Write that is waiting on it.
func abort(conn io.Closer) error {
	err := conn.Close()
	if d, ok := conn.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Unix(1, 0))
	}
	return err
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

// over reports whether the session has ended.
func (st *stream) over() bool { return st.session.mux.IsClosed() }

// open returns a new stream, which the other side has yet to be told of.
func (s *session) open() (*stream, error) {
	st, err := s.mux.OpenStream()
	if err != nil {
		return nil, s.explain(err)
	}
	return s.stream(st), nil
}

// accept returns the next stream that the other side opens, which it has yet
// to be told of. One with a number of this side's ends the session: yamux would
// forget it when that number is given out here, and whoever reads from it would
// never learn of the end.
func (s *session) accept() (*stream, error) {
	st, err := s.mux.AcceptStream()
	if err != nil {
		return nil, err
	}
	if odd := st.StreamID()%2 == 1; odd == s.host {
		err = fmt.Errorf("plugin: the other side opened stream %d, whose number is not its own", st.StreamID())
	} else if s.mux.NumStreams() > maxStreams {
		err = fmt.Errorf("plugin: there are more than %d streams", maxStreams)
	}
	if err != nil {
		s.mu.Lock()
		s.fault = &lostError{err}
		s.mu.Unlock()
		_ = s.mux.Close()
		return nil, err
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
	trace frameTrace // nil if nobody looks

	writing sync.Mutex // serialises writers; guards the fields below and flow.held
	broken  bool       // nothing can be written any more
	frame   []byte     // what is written next, to be used again

	mu    sync.Mutex // guards flows, the rest of each flow, and pings
	flows map[uint32]*flow
	pings int // of the other side, which have not been answered

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
	held     []byte        // the frame that opens the stream, until there is another
}

const (
	frameHeader = 12 // version, type, flags (2), stream (4), length or window (4)
	firstWindow = 256 << 10

	frameData   = 0
	frameWindow = 1
	framePing   = 2

	flagSYN = 1
	flagACK = 2
	flagFIN = 4
	flagRST = 8
)

// Read reads for yamux.
func (c *frameConn) Read(p []byte) (int, error) {
	n, err := c.conn.Read(p)
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
			c.trace.add(c.header[:], true)
			c.pass(c.header[:], true)
			if c.header[1] == framePing && c.unanswered() > maxPings {
				return 0, errors.New("plugin: the other side sends pings and takes no answers")
			}
			if c.header[1] == frameData {
				c.body = binary.BigEndian.Uint32(c.header[8:])
			}
		}
	}
	return n, err
}

// Write writes a frame of yamux's own, which has no body. One that opens a
// stream waits for the next of that stream, to save the other side a read.
func (c *frameConn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.trace.add(p, false)
	f := c.pass(p, false)
	switch flags := binary.BigEndian.Uint16(p[2:]); {
	case f == nil:
		c.send(p, nil)
	case flags == flagSYN || flags == flagACK:
		f.held = slices.Clone(p)
	default:
		c.frame = append(append(c.frame[:0], f.held...), p...)
		f.held = nil
		c.send(c.frame, nil)
	}
	return len(p), nil
}

func (c *frameConn) Close() error { return c.conn.Close() }

// pass takes account of a frame, and returns the flow that it belongs to.
func (c *frameConn) pass(header []byte, received bool) *flow {
	flags := binary.BigEndian.Uint16(header[2:])
	id := binary.BigEndian.Uint32(header[4:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if header[1] > frameWindow { // a ping, or the end of the session
		switch {
		case header[1] == framePing && received && flags&flagSYN != 0:
			c.pings++ // yamux has a goroutine for each
		case header[1] == framePing && !received && flags&flagACK != 0:
			c.pings--
		}
		return nil
	}
	f := c.flows[id]
	if f == nil && flags&flagSYN != 0 {
		f = &flow{window: firstWindow, changed: make(chan struct{}, 1)}
		c.flows[id] = f
	}
	if f == nil || received && header[1] == frameData && flags == 0 {
		return f
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
	return f
}

func (c *frameConn) unanswered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pings
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
	c.frame = append(append(c.frame[:0], f.held...), 0, frameData, 0, 0)
	c.frame = binary.BigEndian.AppendUint32(c.frame, id)
	c.frame = binary.BigEndian.AppendUint32(c.frame, uint32(n))
	c.trace.add(c.frame[len(f.held):], false)
	f.held = nil
	if n <= maxJoined {
		c.frame = append(c.frame, p[:n]...)
		c.send(c.frame, nil)
	} else {
		c.send(c.frame, p[:n])
	}
	return n, nil
}

// announce tells the other side of streams; so does the first Write of one.
func (c *frameConn) announce(streams ...*stream) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.frame = c.frame[:0]
	for _, st := range streams {
		c.frame = append(c.frame, st.flow.held...)
		st.flow.held = nil
	}
	if len(c.frame) > 0 {
		c.send(c.frame, nil)
	}
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
