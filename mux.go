package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

const (
	// pingTimeout is how long Ping waits.
	pingTimeout = 4 * time.Second
	// quitTimeout is how long RPCClient.Close waits for the plugin.
	quitTimeout = 2 * time.Second
	// acceptPause is how long a server waits before it accepts again.
	acceptPause = 100 * time.Millisecond
	// outputTimeout is how long a plugin that quits waits until its output is
	// sent, and outputIdle how long it waits for more where the end of the
	// output cannot be seen because a child process holds it open.
	outputTimeout = time.Second
)

// RPCClient is the host's end of a connection to a plugin. It is what
// [Client.Client] returns. Its methods may be called concurrently.
type RPCClient struct {
	session *session
	broker  *MuxBroker
	control *rpc.Client
	plugins map[string]Plugin

	output [2]*yamux.Stream // the plugin's stdout and stderr
	copied [2]chan struct{} // closed when all of one has been copied

	flushes  bool // the plugin sends its output before it answers Quit
	quitting *once[struct{}]
}

// NewRPCClient makes a client for the plugin on the other end of conn, which
// it closes if it fails. Most programs get theirs from [Client.Client].
func NewRPCClient(conn io.ReadWriteCloser, plugins map[string]Plugin) (*RPCClient, error) {
	return newConnection(conn, plugins, hclog.NewNullLogger(), nil)
}

func newConnection(conn io.ReadWriteCloser, plugins map[string]Plugin, logger hclog.Logger, why func(heard bool) error) (*RPCClient, error) {
	s, err := newSession(context.Background(), conn, true, logger, why)
	if err != nil {
		return nil, fmt.Errorf("plugin: connecting: %w", err)
	}
	c := &RPCClient{session: s, plugins: plugins, broker: newMuxBroker(s), quitting: newOnce[struct{}]()}
	// The order is part of the protocol: control, stdout, stderr.
	var streams [3]*stream
	for i := range streams {
		if streams[i], err = s.open(); err != nil {
			s.close()
			return nil, fmt.Errorf("plugin: connecting: %w", err)
		}
	}
	c.control = newRPCClient(streams[0], s.spawn)
	// Without the reason for an error: finding it out waits for the output.
	c.output = [2]*yamux.Stream{streams[1].Stream, streams[2].Stream}
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
			_, _ = io.Copy(&forgiving{dst}, c.output[i])
			if lines, ok := dst.(*lineWriter); ok {
				_ = lines.Close()
			}
		}()
	}
	return nil
}

// Dispense asks the plugin for an instance of the plugin with that name, and
// returns what [Plugin].Client makes of it. The function [Dispense] returns it
// with its type. It fails for a name that either side does not know, if Server
// or Client fails, panics or returns nothing, and if the connection is lost.
// Otherwise it waits for as long as Server takes.
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
		return nil, fmt.Errorf("the host knows no such plugin; ClientConfig.Plugins has %s", nameList(c.plugins))
	}
	var id uint32
	if err := Call(context.Background(), c.control, "Dispenser.Dispense", name, &id); err != nil {
		return nil, err
	}
	conn, err := c.broker.Dial(id)
	if err != nil {
		return nil, err
	}
	client := newRPCClient(conn, c.session.spawn)
	v, err := build(func() (any, error) { return p.Client(c.broker, client) })
	if err != nil {
		_ = client.Close()
		return nil, fmt.Errorf("its Client %w", err)
	}
	return v, nil
}

// build calls a Plugin's Client or Server method.
func build(f func() (any, error)) (any, error) {
	v, err := f()
	if err != nil {
		return nil, fmt.Errorf("failed: %w", err)
	}
	if v == nil {
		return nil, errors.New("returned nil")
	}
	return v, nil
}

// Ping asks the plugin for a sign of life. It fails if the connection is lost,
// and with an error that wraps context.DeadlineExceeded if none comes within
// four seconds, as from a process that is stopped.
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
	_, err := c.quitting.do(ctx, func() (struct{}, error) {
		c.session.ending.Store(true)
		for i := 0; i < 3 && !c.flushes; i++ {
			// A go-plugin plugin sends no output after its answer to Quit. A
			// few round trips give it the time to send it before.
			if err := c.ping(ctx); err != nil {
				return struct{}{}, err
			}
		}
		return struct{}{}, Call(ctx, c.control, "Control.Quit", true, &struct{}{})
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
// [Serve] makes one; a program needs its own only to serve in another way, and
// it then ends with its connections. The fields must not be changed after the
// first use. The methods may be called concurrently.
type RPCServer struct {
	// Plugins are the plugins that can be dispensed.
	Plugins map[string]Plugin

	// Stdout and Stderr are read and sent to the host that connected last. If
	// nil, the host gets nothing. They are not closed.
	Stdout io.Reader
	Stderr io.Reader

	// DoneCh, if not nil, is closed when a host has asked the plugin to quit,
	// or when Serve returns.
	DoneCh chan<- struct{}

	logger  hclog.Logger
	release func() // ends Stdout and Stderr, if that can be done

	begun    sync.Once // makes the fields below
	outputs  [2]*output
	calls    context.Context // ends when methods should stop
	endCalls context.CancelFunc
	conns    context.Context // ends when connections should
	endConns context.CancelFunc

	serving  sync.WaitGroup // ServeConn calls that Serve has started
	doneOnce sync.Once
	flushed  sync.Once
}

// Init does nothing; it is part of [ServerProtocol].
func (s *RPCServer) Init() error { return nil }

// Config returns nothing; it is part of [ServerProtocol].
func (s *RPCServer) Config() string { return "" }

// Serve serves every connection that lis accepts, until lis is closed.
func (s *RPCServer) Serve(lis net.Listener) {
	s.begin()
	defer s.done()
	for {
		conn, err := lis.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.logger.Warn("a connection could not be accepted", "error", err)
			time.Sleep(acceptPause)
			continue
		}
		// Ends with the connection; close ends that and waits.
		s.serving.Go(func() { s.ServeConn(conn) })
	}
}

// ServeConn serves one connection and returns when it has ended.
func (s *RPCServer) ServeConn(conn io.ReadWriteCloser) {
	s.begin()
	sess, err := newSession(s.calls, conn, false, s.logger, func(bool) error {
		return errors.New("plugin: the host is gone")
	})
	if err != nil {
		s.logger.Debug("a connection could not be served", "error", err)
		return
	}
	defer sess.close()
	defer context.AfterFunc(s.conns, sess.close)()
	if err := s.serveSession(sess); err != io.EOF {
		sess.debug("a connection ended", "error", err)
	}
}

func (s *RPCServer) serveSession(sess *session) error {
	control, err := sess.accept()
	if err != nil {
		return err
	}
	for _, out := range s.outputs {
		st, err := sess.accept()
		if err != nil {
			return err
		}
		out.attach(st)
	}
	broker := newMuxBroker(sess)
	// Ends with the session.
	sess.spawn(func() { defer sess.cancel(); broker.Run() })
	server := newRPCServer(control, nil, s.logger, false)
	server.services = make(map[string]*service)
	for name, rcvr := range map[string]any{
		"Control":   &controlService{s, server},
		"Dispenser": &dispenseService{s.Plugins, broker},
	} {
		if server.services[name], err = newService(rcvr); err != nil {
			return err
		}
	}
	return server.serve(context.Background())
}

// begin makes what all connections share.
func (s *RPCServer) begin() {
	s.begun.Do(func() {
		if s.logger == nil {
			s.logger = hclog.NewNullLogger()
		}
		s.calls, s.endCalls = context.WithCancel(context.Background())
		s.conns, s.endConns = context.WithCancel(context.Background())
		for i, src := range []io.Reader{s.Stdout, s.Stderr} {
			if src == nil {
				src = strings.NewReader("")
			}
			s.outputs[i] = &output{src: src, done: make(chan struct{})}
		}
	})
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
	s.begin()
	s.flushed.Do(func() {
		s.endCalls()
		if s.release != nil {
			s.release()
		}
		ctx, cancel := context.WithTimeout(context.Background(), outputTimeout)
		defer cancel()
		for _, out := range s.outputs {
			out.finish(ctx)
		}
	})
}

// output sends what the plugin prints to the host that connected last. What
// is printed before the first one connects waits for it; what is printed when
// none is connected any more is dropped, so that it cannot stop the plugin.
type output struct {
	src   io.Reader
	start sync.Once     // begins to send
	done  chan struct{} // closed when all of src has been sent

	mu   sync.Mutex // guards host
	host *stream
}

// attach makes st the stream of the host that gets the output.
func (o *output) attach(st *stream) {
	o.mu.Lock()
	before := o.host
	o.host = st
	o.mu.Unlock()
	if before != nil {
		_ = before.Close()
	}
	o.start.Do(func() {
		go func() { // ends with src, which Serve closes; another reader is its owner's
			defer close(o.done)
			_, _ = io.Copy(o, o.src)
		}()
	})
}

// Write never fails.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	host := o.host
	o.mu.Unlock()
	if host == nil {
		return len(p), nil
	}
	if _, err := host.Write(p); err != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.host == host {
			o.host = nil
		}
	}
	return len(p), nil
}

// finish ends the host's stream when all has been sent, or ctx ends.
func (o *output) finish(ctx context.Context) {
	o.start.Do(func() { close(o.done) }) // nobody has connected
	select {
	case <-o.done:
	case <-ctx.Done():
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.host != nil {
		_ = o.host.Close()
	}
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
		return fmt.Errorf("the plugin knows no such plugin; ServeConfig.Plugins has %s", nameList(d.plugins))
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
			sess.serve(sess.calls, st, svc)
		}
	})
	return nil
}
