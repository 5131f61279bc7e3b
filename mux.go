package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/rpc"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	// pingTimeout is how long Ping waits.
	pingTimeout = 4 * time.Second
	// quitTimeout is how long RPCClient.Close waits for the plugin.
	quitTimeout = 2 * time.Second
	// acceptPause is how long a server waits before it accepts again.
	acceptPause = 100 * time.Millisecond
	// lastTimeout is how long a connection that takes nothing more is read.
	lastTimeout = 250 * time.Millisecond
	// outputTimeout is how long a plugin that quits waits until its output is
	// sent, and outputIdle how long it waits for more where the end of the
	// output cannot be seen because a child process holds it open.
	outputTimeout = time.Second
	outputIdle    = 50 * time.Millisecond
)

// session is one connection: a yamux session, what runs on it, and why it ended.
type session struct {
	mux    *yamux.Session
	conn   io.Closer // what mux runs on
	host   bool      // this side is the host's
	logger hclog.Logger
	lost   func() error // why the connection was lost; may take a moment to find out

	calls  context.Context // ends when methods that are served here should stop
	cancel context.CancelFunc

	noting atomic.Bool // something is being logged
	ending atomic.Bool // this side has asked the other to end, or will now

	mu      sync.Mutex // guards closing, and adding to running
	closing bool       // this side has ended the session
	running sync.WaitGroup
}

// newSession begins a session on conn. Methods are served on it until ctx
// ends. If why is not nil it tells why the connection was lost, or nil if it
// was meant to end.
func newSession(ctx context.Context, conn io.ReadWriteCloser, host bool, logger hclog.Logger, why func() error) (*session, error) {
	s := &session{host: host, logger: logger, conn: conn}
	s.calls, s.cancel = context.WithCancel(ctx)
	s.lost = sync.OnceValue(func() error {
		if why == nil {
			return &lostError{errors.New("plugin: the connection was lost")}
		}
		if err := why(); err != nil {
			return &lostError{err}
		}
		return nil
	})
	if c, ok := conn.(net.Conn); ok {
		if b, ok := c.(interface{ SetWriteBuffer(int) error }); ok {
			_ = b.SetWriteBuffer(socketBuffer) // slower without, no more
		}
		conn = &frameConn{Conn: c}
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
		s.mux, err = yamux.Client(conn, config)
	} else {
		s.mux, err = yamux.Server(conn, config)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return s, nil
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
		l.s.note(strings.TrimSpace(fmt.Sprintf(format, v...)))
	}
}

// note logs something at Debug, from a goroutine of its own: the logger is the
// caller's, and no end of a session waits for it. While it does not return,
// nothing more is noted.
func (s *session) note(text string, args ...any) {
	if !s.noting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer s.noting.Store(false)
		defer func() { _ = recover() }()
		s.logger.Debug(text, args...)
	}()
}

// frameConn is a connection that writes a frame in one piece. yamux writes a
// frame's header first and its body behind it, both from one goroutine.
//
// An error of writing is kept from yamux, which would end the session at once:
// the other side is gone, but what it sent before may not have been read. The
// session ends when reading does, which has a bound from then on.
type frameConn struct {
	net.Conn
	frame []byte // the header of a frame whose body comes next
	lost  bool   // nothing can be written any more
}

func (c *frameConn) Write(p []byte) (int, error) {
	const headerSize, dataFrame = 12, 0
	switch {
	case len(c.frame) > 0 && len(p) > maxJoined && !c.lost:
		// One system call and no copy, where there is such a call.
		pieces := net.Buffers{c.frame, p}
		_, err := pieces.WriteTo(c.Conn)
		c.check(err)
		c.frame = c.frame[:0]
	case len(c.frame) > 0:
		c.frame = append(c.frame, p...)
		c.send(c.frame)
		c.frame = c.frame[:0]
	case len(p) == headerSize && p[1] == dataFrame && binary.BigEndian.Uint32(p[8:]) > 0:
		c.frame = append(c.frame, p...)
	default:
		c.send(p)
	}
	return len(p), nil
}

func (c *frameConn) send(p []byte) {
	if !c.lost {
		_, err := c.Conn.Write(p)
		c.check(err)
	}
}

// check takes the error of a write.
func (c *frameConn) check(err error) {
	if c.lost = err != nil; c.lost {
		_ = c.SetReadDeadline(time.Now().Add(lastTimeout))
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

// close ends the session and waits for its goroutines.
func (s *session) close() {
	s.ending.Store(true)
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.cancel()
	// Readers of yamux's streams spin between the beginning of a Close and the
	// end of receiving. So receiving is ended first, if the connection lets it.
	_ = s.conn.Close()
	select {
	case <-s.mux.CloseChan():
	case <-time.After(lastTimeout):
	}
	_ = s.mux.Close()
	s.running.Wait()
}

// ended is closed when the session has ended, from whichever side.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// explain returns err, or why the connection was lost if that is the cause.
func (s *session) explain(err error) error {
	if err == nil || !s.mux.IsClosed() || s.isClosing() {
		return err
	}
	if lost := s.lost(); lost != nil {
		return lost
	}
	return err
}

// stream is one stream of a session. Its errors say why a session was lost.
type stream struct {
	*yamux.Stream
	session *session
}

func (st *stream) Read(p []byte) (int, error) {
	n, err := st.Stream.Read(p)
	return n, st.session.explain(err)
}

func (st *stream) Write(p []byte) (int, error) {
	n, err := st.Stream.Write(p)
	return n, st.session.explain(err)
}

// lost reports whether the session has ended.
func (st *stream) lost() bool { return st.session.mux.IsClosed() }

func (s *session) open() (*stream, error) {
	st, err := s.mux.OpenStream()
	if err != nil {
		return nil, s.explain(err)
	}
	return &stream{st, s}, nil
}

// accept returns the next stream that the other side opens. One with a number
// of this side's ends the session: yamux would forget it when that number is
// given out here, and whoever reads from it would never learn of the end.
func (s *session) accept() (*stream, error) {
	st, err := s.mux.AcceptStream()
	if err != nil {
		return nil, err
	}
	if odd := st.StreamID()%2 == 1; odd == s.host {
		_ = s.mux.Close()
		return nil, fmt.Errorf("plugin: the other side opened stream %d, whose number is not its own", st.StreamID())
	}
	return &stream{st, s}, nil
}

// serve serves calls on a stream until the caller hangs up.
func (s *session) serve(st *stream, services map[string]*service) {
	if err := newRPCServer(st, services, s.logger, s.host).serve(s.calls); err != io.EOF {
		s.note("an RPC stream ended", "error", err)
	}
}

// RPCClient is the host's end of a connection to a plugin. It is what
// [Client.Client] returns. Its methods may be called concurrently.
type RPCClient struct {
	session *session
	broker  *MuxBroker
	control *rpc.Client
	plugins map[string]Plugin

	output [2]*yamux.Stream // the plugin's stdout and stderr
	copied [2]chan struct{} // closed when all of one has been copied

	quitting once[struct{}]
}

// NewRPCClient makes a client for the plugin on the other end of conn, which
// it closes if it fails. Most programs get theirs from [Client.Client].
func NewRPCClient(conn io.ReadWriteCloser, plugins map[string]Plugin) (*RPCClient, error) {
	return newConnection(conn, plugins, hclog.NewNullLogger(), nil)
}

func newConnection(conn io.ReadWriteCloser, plugins map[string]Plugin, logger hclog.Logger, why func() error) (*RPCClient, error) {
	s, err := newSession(context.Background(), conn, true, logger, why)
	if err != nil {
		return nil, fmt.Errorf("plugin: connecting: %w", err)
	}
	c := &RPCClient{session: s, plugins: plugins, broker: newMuxBroker(s)}
	// The order is part of the protocol: control, stdout, stderr.
	control, err := s.open()
	for i := 0; err == nil && i < len(c.output); i++ {
		c.output[i], err = s.mux.OpenStream()
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("plugin: connecting: %w", err)
	}
	c.control = newRPCClient(control, s.spawn)
	// Ends with the session, and with it end the methods that it serves.
	s.spawn(func() { defer s.cancel(); c.broker.Run() })
	return c, nil
}

// SyncStreams copies the plugin's stdout and stderr to the given writers, from
// goroutines of their own, until the plugin ends them. It returns nil, and
// should be called once, at the beginning: a plugin that nobody listens to is
// stopped by its own output after a while. [Client.Client] calls it with
// [ClientConfig].SyncStdout and SyncStderr. A writer that fails loses the
// rest; the plugin is not stopped by it.
func (c *RPCClient) SyncStreams(stdout, stderr io.Writer) error {
	for i, dst := range []io.Writer{stdout, stderr} {
		c.copied[i] = make(chan struct{})
		// Writes to the caller's writer, so nothing waits for it without a
		// bound. It ends with the stream.
		go func() {
			defer close(c.copied[i])
			c.copyOutput(dst, c.output[i])
		}()
	}
	return nil
}

func (c *RPCClient) copyOutput(dst io.Writer, src io.Reader) {
	if lines, ok := dst.(*lineWriter); ok {
		defer lines.Close()
	}
	// It never fails, so this ends with the stream.
	_, _ = io.Copy(&heedless{w: dst, logger: c.session.logger}, struct{ io.Reader }{src})
}

// Dispense asks the plugin for an instance of the plugin with that name, and
// returns what [Plugin].Client makes of it. The function [Dispense] returns it
// with its type. It fails for a name that either side does not know, if Server
// or Client fails, panics or returns nothing, and if the connection is lost.
func (c *RPCClient) Dispense(name string) (any, error) {
	v, err := c.dispense(name)
	if err != nil {
		return nil, fmt.Errorf("plugin %q cannot be dispensed: %w", name, err)
	}
	return v, nil
}

func (c *RPCClient) dispense(name string) (any, error) {
	p := c.plugins[name]
	if p == nil {
		return nil, fmt.Errorf("the host knows no such plugin; it knows %s", strings.Join(sortedKeys(c.plugins), ", "))
	}
	var id uint32
	ctx := context.Background()
	if err := Call(ctx, c.control, "Dispenser.Dispense", name, &id); err != nil {
		return nil, err
	}
	st, err := c.broker.dial(ctx, id)
	if err != nil {
		return nil, err
	}
	client := newRPCClient(st, c.session.spawn)
	v, err := build(func() (any, error) { return p.Client(c.broker, client) })
	if err != nil {
		_ = client.Close()
		return nil, fmt.Errorf("its Client %w", err)
	}
	return v, nil
}

// build calls a Plugin's Client or Server method.
func build(f func() (any, error)) (v any, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, fmt.Errorf("panicked: %v\n%s", p, debug.Stack())
		}
	}()
	v, err = f()
	if err != nil {
		return nil, fmt.Errorf("failed: %w", err)
	}
	if v == nil {
		return nil, errors.New("returned nil")
	}
	return v, nil
}

// Ping asks the plugin for a sign of life. It fails if the connection is lost,
// and with an error that is context.DeadlineExceeded if none comes within four
// seconds, as from a process that is stopped.
func (c *RPCClient) Ping() error {
	ctx, cancel := context.WithTimeout(context.Background(), pingTimeout)
	defer cancel()
	if err := c.ping(ctx); err != nil {
		return fmt.Errorf("plugin: ping: %w", err)
	}
	return nil
}

func (c *RPCClient) ping(ctx context.Context) error {
	return Call(ctx, c.control, "Control.Ping", true, &struct{}{})
}

// Close asks the plugin to quit, waits until its output is here, but not
// longer than two seconds, and ends the connection. It returns an error if the
// plugin did not answer. Calling it again returns the same.
// The process is the business of [Client.Kill].
func (c *RPCClient) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	err := c.quit(ctx)
	c.session.close()
	return err
}

// quit asks the plugin to quit, once, and waits for the end of its output.
func (c *RPCClient) quit(ctx context.Context) error {
	_, err := c.quitting.do(ctx, func() (none struct{}, err error) {
		c.session.ending.Store(true)
		// A plugin made with go-plugin sends no more output once it has
		// answered Quit; a few round trips give it time to send it before.
		for range 3 {
			if err = c.ping(ctx); err != nil {
				return none, err
			}
		}
		return none, Call(ctx, c.control, "Control.Quit", true, &struct{}{})
	})
	if err != nil {
		return fmt.Errorf("plugin: asking it to quit: %w", err)
	}
	c.waitOutput(ctx)
	return nil
}

// waitOutput waits until all output has been copied, but not past ctx.
func (c *RPCClient) waitOutput(ctx context.Context) {
	for _, copied := range c.copied {
		if copied == nil {
			continue
		}
		select {
		case <-copied:
		case <-ctx.Done():
		}
	}
}

// RPCServer is the plugin's end: it serves plugins on connections from hosts.
// [Serve] makes one; a program needs its own only to serve in another way.
// The fields must not be changed after the first use.
type RPCServer struct {
	// Plugins are the plugins that can be dispensed.
	Plugins map[string]Plugin

	// Stdout and Stderr are read and sent to the host that connected last. If
	// nil, the host gets nothing.
	Stdout io.Reader
	Stderr io.Reader

	// DoneCh, if not nil, is closed when a host has asked the plugin to quit,
	// or when Serve returns.
	DoneCh chan<- struct{}

	logger  hclog.Logger // nil for none
	release func()       // ends Stdout and Stderr, if that can be done

	mu       sync.Mutex // guards the fields below
	outputs  [2]*output // nil until first used
	calls    context.Context
	cancel   context.CancelFunc
	sessions map[*session]struct{}
	closed   bool

	conns    sync.WaitGroup // ServeConn calls that Serve has started
	doneOnce sync.Once
	flushed  sync.Once
}

// Init does nothing; it is part of [ServerProtocol].
func (s *RPCServer) Init() error { return nil }

// Config returns nothing; it is part of [ServerProtocol].
func (s *RPCServer) Config() string { return "" }

// Serve serves every connection that lis accepts, until lis is closed.
func (s *RPCServer) Serve(lis net.Listener) {
	defer s.done()
	for {
		conn, err := lis.Accept()
		if err != nil && !passing(err) {
			return
		}
		if err != nil {
			s.log().Warn("a connection could not be accepted", "error", err)
			time.Sleep(acceptPause)
			continue
		}
		// Ends with the connection; close ends that and waits.
		s.conns.Go(func() { s.ServeConn(conn) })
	}
}

// passing reports whether accepting may work again after a while: being out of
// descriptors must not be the end of a plugin.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *RPCServer) log() hclog.Logger {
	if s.logger == nil {
		return hclog.NewNullLogger()
	}
	return s.logger
}

// ServeConn serves one connection and returns when it has ended.
func (s *RPCServer) ServeConn(conn io.ReadWriteCloser) {
	if err := s.serveConn(conn); err != nil {
		s.log().Debug("a connection ended", "error", err)
	}
}

func (s *RPCServer) serveConn(conn io.ReadWriteCloser) error {
	sess, err := s.enter(conn)
	if err != nil {
		return err
	}
	defer s.leave(sess)
	control, err := sess.accept()
	if err != nil {
		return err
	}
	for _, out := range s.outputs {
		st, err := sess.accept()
		if err != nil {
			return err
		}
		out.attach(st.Stream)
	}
	broker := newMuxBroker(sess)
	// Ends with the session.
	sess.spawn(func() { defer sess.cancel(); broker.Run() })
	server := newRPCServer(control, nil, s.log(), false)
	server.services = make(map[string]*service)
	for name, rcvr := range map[string]any{
		"Control":   &controlService{s, server},
		"Dispenser": &dispenseService{s.Plugins, broker},
	} {
		if server.services[name], err = newService(rcvr); err != nil {
			return err
		}
	}
	if err := server.serve(context.Background()); err != io.EOF {
		return err
	}
	return nil
}

// enter begins a session, with all that the first one needs.
func (s *RPCServer) enter(conn io.ReadWriteCloser) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	if s.sessions == nil {
		s.sessions = make(map[*session]struct{})
		s.calls, s.cancel = context.WithCancel(context.Background())
		s.outputs = [2]*output{newOutput(s.Stdout), newOutput(s.Stderr)}
	}
	sess, err := newSession(s.calls, conn, false, s.log(), func() error {
		return errors.New("plugin: the host is gone")
	})
	if err == nil {
		s.sessions[sess] = struct{}{}
	}
	return sess, err
}

func (s *RPCServer) leave(sess *session) {
	sess.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, sess)
}

// done tells whoever waits at DoneCh.
func (s *RPCServer) done() {
	s.doneOnce.Do(func() {
		if s.DoneCh != nil {
			close(s.DoneCh)
		}
	})
}

// flush ends the contexts of all calls and sends what is left of the output.
func (s *RPCServer) flush() {
	s.flushed.Do(func() {
		s.mu.Lock()
		outputs, cancel := s.outputs, s.cancel
		s.mu.Unlock()
		if cancel != nil {
			cancel()
		}
		if s.release != nil {
			s.release()
		}
		deadline := time.Now().Add(outputTimeout)
		for _, out := range outputs {
			if out != nil {
				out.finish(deadline)
			}
		}
	})
}

// close ends all sessions and waits for what Serve has started.
func (s *RPCServer) close() {
	s.mu.Lock()
	s.closed = true
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	for _, sess := range sessions {
		sess.close()
	}
	s.conns.Wait()
}

// controlService is the service "Control" of the protocol.
type controlService struct {
	server *RPCServer
	stream *rpcServer
}

// Ping is a sign of life.
func (c *controlService) Ping(bool, *struct{}) error { return nil }

// Quit ends the plugin, once it has been answered.
func (c *controlService) Quit(ctx context.Context, _ bool, _ *struct{}) error {
	c.server.flush()
	// A call's context ends when its answer is under way.
	context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.Background(), outputTimeout)
		defer cancel()
		_ = c.stream.w.drain(ctx)
		c.server.done()
	})
	return nil
}

// dispenseService is the service "Dispenser" of the protocol.
type dispenseService struct {
	plugins map[string]Plugin
	broker  *MuxBroker
}

// Dispense makes an instance of a plugin and serves it to whoever dials id.
func (d *dispenseService) Dispense(name string, id *uint32) error {
	p := d.plugins[name]
	if p == nil {
		return fmt.Errorf("the plugin knows no such plugin; it knows %s", strings.Join(sortedKeys(d.plugins), ", "))
	}
	v, err := build(func() (any, error) { return p.Server(d.broker) })
	if err != nil {
		return fmt.Errorf("its Server %w", err)
	}
	svc, err := newService(v)
	if err != nil {
		return fmt.Errorf("its Server returned what cannot be served: %w", err)
	}
	*id = d.broker.NextId()
	sess := d.broker.session
	dispensed := *id
	sess.spawn(func() {
		// No time-out: the host dials at once, unless it is stopped or gone.
		st, err := d.broker.accept(context.Background(), dispensed)
		if err == nil {
			sess.serve(st, map[string]*service{"Plugin": svc})
		}
	})
	return nil
}
