package plugin

// This file is about the two ends of a connection: what the host asks of its plugin
// (answer, quit, dispense), and how the plugin's output gets to the host.

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
)

const (
	pingTimeout   = 4 * time.Second        // how long Ping waits
	quitTimeout   = 2 * time.Second        // how long RPCClient.Close waits
	acceptPause   = 100 * time.Millisecond // between a failed Accept and the next
	acceptTries   = 20                     // how often the first connection may fail in succession
	outputTimeout = time.Second            // how long a plugin that quits sends output
)

// RPCClient is the host's end of a connection to a plugin. [Client.Client] returns one.
// Its methods may be called concurrently.
type RPCClient struct {
	session *session
	broker  *MuxBroker
	control *rpc.Client
	plugins map[string]Plugin

	output [2]io.Reader     // stdout and stderr of the plugin
	copied [2]chan struct{} // closed when the output has been copied

	flushes bool // the plugin sends its output before it answers Quit

	quitting lock  // guards the fields below; held while the plugin is asked
	asked    bool  // the plugin has been asked to quit
	quitErr  error // why it has not answered
}

// NewRPCClient returns a client for the plugin at the other end of conn. If it fails,
// it closes conn. Most programs use [Client.Client].
func NewRPCClient(conn io.ReadWriteCloser, plugins map[string]Plugin) (*RPCClient, error) {
	return newConnection(conn, anyPeer, plugins, hclog.NewNullLogger(), nil)
}

// newConnection is NewRPCClient with a name for [session].peer, a logger and a function for
// [newSession].
func newConnection(
	conn io.ReadWriteCloser, peer string, plugins map[string]Plugin, logger hclog.Logger,
	why func(received bool) error,
) (*RPCClient, error) {
	s, err := newSession(context.Background(), conn, true, logger, why)
	if err != nil {
		return nil, fmt.Errorf("plugin: connecting: %w", err)
	}
	s.peer = peer
	c := &RPCClient{session: s, plugins: plugins, broker: newMuxBroker(s), quitting: newLock()}
	// The order is part of the protocol: control, stdout, stderr.
	var streams [3]*stream
	for i := range streams {
		if streams[i], err = s.open(context.Background()); err != nil {
			s.close()
			return nil, fmt.Errorf("plugin: connecting: %w", err)
		}
	}
	c.control = s.client(streams[0])
	c.output = [2]io.Reader{unexplained{stream: streams[1]}, unexplained{stream: streams[2]}}
	s.spawn(func() { acceptNumbered(c.broker) }) // ends with the session
	return c, nil
}

// acceptNumbered accepts the numbered streams of a session until it ends. Then it ends the
// contexts of the methods that the session serves: the peer does not need them any more.
func acceptNumbered(b *MuxBroker) {
	b.Run()
	b.session.cancel()
}

// SyncStreams starts to copy the plugin's stdout and stderr to the writers, each in its
// own goroutine, until the plugin exits. A writer that fails is not written to again.
// [Client.Client] calls SyncStreams with [ClientConfig].SyncStdout and SyncStderr. After
// [NewRPCClient], call it once: without a reader, the plugin blocks when it has written
// much. The error is always nil.
func (c *RPCClient) SyncStreams(stdout, stderr io.Writer) error {
	for i, dst := range []io.Writer{stdout, stderr} {
		c.copied[i] = make(chan struct{})
		// Ends with the stream, and when the caller's Write returns. So nothing
		// waits for it without a bound.
		go c.copyOutput(i, dst)
	}
	return nil
}

// copyOutput copies one output of the plugin to dst until its end.
func (c *RPCClient) copyOutput(i int, dst io.Writer) {
	defer close(c.copied[i])
	_, _ = io.Copy(newHostWriter(dst), c.output[i]) // an error of the stream is the end of it
	if lines, ok := dst.(*lineWriter); ok {
		_ = lines.Close() // it never fails
	}
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
	client, err := c.broker.dialService(context.Background(), id)
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
	c.closeSession()
	return err
}

// isEnding reports whether this side has asked the plugin to quit.
func (c *RPCClient) isEnding() bool { return c.session.isEnding() }

// ended returns a channel that is closed when the connection has ended.
func (c *RPCClient) ended() <-chan struct{} { return c.session.ended() }

// disconnect ends the connection at once.
func (c *RPCClient) disconnect() { c.session.disconnect() }

// closeSession ends the connection without asking the plugin, and waits for its goroutines.
func (c *RPCClient) closeSession() { c.session.close() }

// quit asks the plugin to quit, once, and waits for the end of its output.
func (c *RPCClient) quit(ctx context.Context) error {
	if err := c.askToQuit(ctx); err != nil {
		return fmt.Errorf("plugin: asking it to quit: %w", err)
	}
	c.waitOutput(ctx)
	return nil
}

// askToQuit asks the plugin to quit and waits for its answer. Later calls return the error
// of the first.
func (c *RPCClient) askToQuit(ctx context.Context) error {
	if err := c.quitting.lock(ctx); err != nil {
		return err
	}
	defer c.quitting.unlock()
	if c.asked {
		return c.quitErr
	}
	c.asked = true
	c.session.expectEnd()
	if !c.flushes {
		// A go-plugin plugin exits when it has answered Quit. A few round trips
		// give it time to send its output before.
		for range 3 {
			_ = c.ping(ctx) // Quit will fail, too
		}
	}
	c.quitErr = Call(ctx, c.control, "Control.Quit", true, &struct{}{})
	return c.quitErr
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

	logger    hclog.Logger
	endOutput func() // ends Stdout and Stderr; may be nil

	begun    sync.Once // sets the fields below
	done     func()    // closes DoneCh
	outputs  [2]*output
	calls    context.Context // ends when methods should return
	endCalls context.CancelCauseFunc
	conns    context.Context // ends when connections should be closed
	endConns context.CancelFunc

	connections sync.WaitGroup // ServeConn calls that Serve has started
	flushed     sync.Once
}

// Init does nothing. It is part of [ServerProtocol].
func (s *RPCServer) Init() error { return nil }

// Config returns "". It is part of [ServerProtocol].
func (s *RPCServer) Config() string { return "" }

// Serve serves the connections that lis accepts. It returns when lis is closed, and when
// the first connection could not be accepted for two seconds.
func (s *RPCServer) Serve(lis net.Listener) {
	s.begin()
	defer s.done()
	err := s.acceptConnections(lis)
	if err != nil {
		s.logger.Error("no connection can be accepted", "error", err)
	}
}

// acceptConnections accepts connections until lis is closed. It gives up if the first one
// cannot be accepted, as when too many files are open: its host would wait forever.
func (s *RPCServer) acceptConnections(lis net.Listener) error {
	s.begin()
	accepted, failures := false, 0
	for {
		conn, err := lis.Accept()
		switch {
		case err == nil:
			accepted = true
			// Ends with the connection.
			s.connections.Go(func() { s.ServeConn(conn) })
			continue
		case errors.Is(err, net.ErrClosed):
			return nil
		}
		failures++
		if !accepted && failures == acceptTries {
			return fmt.Errorf("plugin: the connection of the host cannot be accepted: %w", err)
		}
		s.logger.Warn("a connection could not be accepted", "error", err)
		time.Sleep(acceptPause)
	}
}

// ServeConn serves one connection. It returns when the connection has ended.
func (s *RPCServer) ServeConn(conn io.ReadWriteCloser) {
	s.begin()
	sess, err := newSession(s.calls, conn, false, s.logger, whyHostLost)
	if err != nil {
		s.logger.Debug("a connection could not be served", "error", err)
		return
	}
	stop := context.AfterFunc(s.conns, sess.close)
	err = s.serveSession(sess)
	if err != io.EOF {
		sess.debug("a connection ended", "error", err)
	}
	stop()
	sess.close()
}

func whyHostLost(bool) error { return errors.New("plugin: the connection to the host has ended") }

// serveSession accepts the streams that the host opens first, and answers its calls of
// control until the host closes that stream.
func (s *RPCServer) serveSession(sess *session) error {
	controlStream, err := sess.accept()
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
	sess.spawn(func() { acceptNumbered(broker) }) // ends with the session
	server := newRPCServer(controlStream, nil, s.logger, false)
	control, err := newService(&controlService{server: s, stream: server})
	if err != nil {
		return err
	}
	dispenser, err := newService(&dispenseService{plugins: s.Plugins, broker: broker})
	if err != nil {
		return err
	}
	server.services = map[string]*service{"Control": control, "Dispenser": dispenser}
	return server.answerCalls(context.Background())
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
		s.calls, s.endCalls = context.WithCancelCause(context.Background())
		s.conns, s.endConns = context.WithCancel(context.Background())
		for i, src := range []io.Reader{s.Stdout, s.Stderr} {
			if src == nil {
				src = strings.NewReader("")
			}
			s.outputs[i] = newOutput(src)
		}
	})
}

// flush ends the contexts of all calls and sends the rest of the output.
func (s *RPCServer) flush() {
	s.begin()
	s.flushed.Do(func() {
		s.endCalls(errExiting)
		if s.endOutput != nil {
			s.endOutput()
		}
		ctx, cancel := context.WithTimeout(context.Background(), outputTimeout)
		defer cancel()
		for _, out := range s.outputs {
			out.finish(ctx)
		}
	})
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
	// Ends when the answer has been sent, or after outputTimeout.
	go c.endAfterAnswer(ctx.Done())
	return nil
}

// endAfterAnswer ends the plugin when the answer of Quit has been sent. The answer is in
// the buffer of the stream when the context of the call ends: the server of the stream
// ends that context when it has encoded the answer, and not before.
func (c *controlService) endAfterAnswer(encoded <-chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), outputTimeout)
	defer cancel()
	select {
	case <-encoded:
	case <-ctx.Done():
	}
	_ = c.stream.w.drain(ctx) // if the host is gone, it needs no answer
	c.server.done()
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
	instance, err := notNil(p.Server(d.broker))
	if err != nil {
		return fmt.Errorf("its Server failed: %w", err)
	}
	svc, err := newService(instance)
	if err != nil {
		return fmt.Errorf("its Server returned what cannot be served: %w", err)
	}
	*id = d.broker.offer(svc, &svc.calls, untilStopped).id
	return nil
}
