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
	pingTimeout   = 4 * time.Second        // how long Ping waits
	quitTimeout   = 2 * time.Second        // how long RPCClient.Close waits
	acceptPause   = 100 * time.Millisecond // between a failed Accept and the next
	outputTimeout = time.Second            // how long a plugin that quits sends output
)

// RPCClient is the host's end of a connection to a plugin. [Client.Client] returns one.
// Its methods may be called concurrently.
type RPCClient struct {
	session *session
	broker  *MuxBroker
	control *rpc.Client
	plugins map[string]Plugin

	output [2]*yamux.Stream // stdout and stderr of the plugin
	copied [2]chan struct{} // closed when the output has been copied

	flushes  bool // the plugin sends its output before it answers Quit
	quitting *once[struct{}]
}

// NewRPCClient returns a client for the plugin at the other end of conn. If it fails,
// it closes conn. Most programs use [Client.Client].
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

// SyncStreams starts to copy the plugin's stdout and stderr to the writers, each in its
// own goroutine, until the plugin exits. A writer that fails is not written to again.
// [Client.Client] calls SyncStreams with [ClientConfig].SyncStdout and SyncStderr. After
// [NewRPCClient], call it once: without a reader, the plugin blocks when it has written
// much. The error is always nil.
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

// Dispense calls [Plugin].Server in the plugin and returns the result of [Plugin].Client,
// which is a new instance. It fails if either side does not have the name, if Server or
// Client fails or returns nil, or if the connection is lost. It waits for Server without
// a limit. The function [Dispense] returns the instance with its type.
func (c *RPCClient) Dispense(name string) (v any, err error) {
	defer func() {
		if err != nil {
			v, err = nil, fmt.Errorf("plugin %q cannot be dispensed: %w", name, err)
		}
	}()
	p := c.plugins[name]
	if p == nil {
		return nil, fmt.Errorf("the host knows no such plugin; ClientConfig.Plugins has %s", nameList(c.plugins))
	}
	var id uint32
	if err := Call(context.Background(), c.control, "Dispenser.Dispense", name, &id); err != nil {
		return nil, err
	}
	client, err := c.broker.DialRPC(id)
	if err != nil {
		return nil, err
	}
	if v, err = notNil(p.Client(c.broker, client)); err != nil {
		_ = client.Close()
		return nil, fmt.Errorf("its Client failed: %w", err)
	}
	return v, nil
}

// notNil returns the results of Client or Server of a Plugin, or an error if v is nil.
func notNil(v any, err error) (any, error) {
	if v == nil && err == nil {
		err = errors.New("it returned nil")
	}
	return v, err
}

// Ping checks whether the plugin answers within four seconds. If not, as when the
// process is stopped, the error wraps context.DeadlineExceeded. It also fails if the
// connection is lost.
func (c *RPCClient) Ping() error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), pingTimeout, errors.New("plugin: Ping was not answered"))
	defer cancel()
	return c.ping(ctx)
}

func (c *RPCClient) ping(ctx context.Context) error {
	return Call(ctx, c.control, "Control.Ping", true, &struct{}{})
}

// Close asks the plugin to quit, waits up to two seconds for its output, and closes the
// connection. It returns an error if the plugin does not answer. Later calls return the
// same error. Close does not wait for the process: see [Client.Kill].
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
		c.session.expectEnd()
		for i := 0; i < 3 && !c.flushes; i++ {
			// A go-plugin plugin exits when it has answered Quit. A few round
			// trips give it time to send its output before.
			_ = c.ping(ctx)
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

// RPCServer is the plugin's end: it serves plugins on connections from hosts. Most
// programs use [Serve]. The zero RPCServer has no plugins. The fields must not be changed
// after the first use. The methods may be called concurrently.
type RPCServer struct {
	// Plugins are the plugins that can be dispensed.
	Plugins map[string]Plugin

	// Stdout and Stderr are copied to the host that connected last. They may be
	// nil, and are not closed.
	Stdout io.Reader
	Stderr io.Reader

	// DoneCh, if not nil, is closed when a host has asked the plugin to quit,
	// or when Serve returns.
	DoneCh chan<- struct{}

	logger  hclog.Logger
	release func() // ends Stdout and Stderr; may be nil

	begun    sync.Once // sets the fields below
	done     func()    // closes DoneCh
	outputs  [2]*output
	calls    context.Context // ends when methods should return
	endCalls context.CancelFunc
	conns    context.Context // ends when connections should be closed
	endConns context.CancelFunc

	serving sync.WaitGroup // ServeConn calls that Serve has started
	flushed sync.Once
}

// Init does nothing. It is part of [ServerProtocol].
func (s *RPCServer) Init() error { return nil }

// Config returns "". It is part of [ServerProtocol].
func (s *RPCServer) Config() string { return "" }

// Serve serves the connections that lis accepts. It returns when lis is closed.
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
		// Ends with the connection.
		s.serving.Go(func() { s.ServeConn(conn) })
	}
}

// ServeConn serves one connection. It returns when the connection has ended.
func (s *RPCServer) ServeConn(conn io.ReadWriteCloser) {
	s.begin()
	sess, err := newSession(s.calls, conn, false, s.logger, func(bool) error {
		return errors.New("plugin: the connection to the host has ended")
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
	st, err := sess.accept()
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
	server := newRPCServer(st, nil, s.logger, false)
	control, _ := newService(&controlService{s, server})
	dispenser, _ := newService(&dispenseService{s.Plugins, broker})
	server.services = map[string]*service{"Control": control, "Dispenser": dispenser}
	return server.serve(context.Background())
}

// begin sets the fields that all connections share.
func (s *RPCServer) begin() {
	s.begun.Do(func() {
		s.done = sync.OnceFunc(func() {
			if s.DoneCh != nil {
				close(s.DoneCh)
			}
		})
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

// flush ends the contexts of all calls and sends the rest of the output.
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

// output copies the output of the plugin to the host that connected last. Output before
// the first connection waits for it. Output after the last connection is dropped, so
// that it does not block the plugin.
type output struct {
	src   io.Reader
	start sync.Once     // starts to send
	done  chan struct{} // closed when all of src has been sent

	mu   sync.Mutex // guards host
	host *stream
}

// attach makes st the stream that gets the output.
func (o *output) attach(st *stream) {
	o.mu.Lock()
	before := o.host
	o.host = st
	o.mu.Unlock()
	if before != nil {
		_ = before.Close()
	}
	o.start.Do(func() {
		go func() { // ends with src, which Serve or the owner of another reader closes
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
	if host != nil {
		_, _ = host.Write(p) // fails at once if the session has ended
	}
	return len(p), nil
}

// finish closes the stream when all output has been sent, or ctx ends.
func (o *output) finish(ctx context.Context) {
	o.start.Do(func() { close(o.done) }) // no host has connected
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

// Ping returns, which shows that the plugin answers.
func (c *controlService) Ping(bool, *struct{}) error { return nil }

// Quit ends the plugin when its answer has been sent.
func (c *controlService) Quit(ctx context.Context, _ bool, _ *struct{}) error {
	c.server.flush()
	// The context of a call ends when its answer has been encoded.
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

// Dispense makes an instance of a plugin and serves it as id.
func (d *dispenseService) Dispense(name string, id *uint32) error {
	p := d.plugins[name]
	if p == nil {
		return fmt.Errorf("the plugin knows no such plugin; ServeConfig.Plugins has %s", nameList(d.plugins))
	}
	v, err := notNil(p.Server(d.broker))
	if err != nil {
		return fmt.Errorf("its Server failed: %w", err)
	}
	svc, err := newService(v)
	if err != nil {
		return fmt.Errorf("its Server returned what cannot be served: %w", err)
	}
	b, dispensed := d.broker, d.broker.NextId()
	*id = dispensed
	b.session.spawn(func() {
		// Without a limit: the host dials at once, unless it is stopped or gone.
		if st, err := b.accept(context.Background(), dispensed); err == nil {
			b.session.serve(b.session.calls, st, svc)
		}
	})
	return nil
}
