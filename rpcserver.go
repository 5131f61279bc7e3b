package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file is about the plugin's end of a connection: it accepts the streams that the host
// opens first, answers its calls of control, and dispenses plugins.

const (
	acceptPause   = 100 * time.Millisecond // between a failed Accept and the next
	acceptTries   = 20                     // how often the first connection may fail in succession
	outputTimeout = time.Second            // how long a plugin that quits sends output
)

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

	begun      sync.Once // sets the fields below
	done       func()    // closes DoneCh
	outputs    [2]*output
	methodsCtx context.Context // ends when methods should return
	endCalls   context.CancelCauseFunc
	connsCtx   context.Context // ends when connections should be closed
	endConns   context.CancelFunc

	connections sync.WaitGroup // ServeConn of accepted connections, and acceptConnections of serving.accept
	windingDown sync.Once
}

// Init does nothing. It is part of [ServerProtocol].
func (s *RPCServer) Init() error { return nil }

// Config returns "". It is part of [ServerProtocol].
func (s *RPCServer) Config() string { return "" }

// Serve serves the connections that lis accepts. It returns when lis is closed, and when
// the first connection could not be accepted for two seconds.
func (s *RPCServer) Serve(lis net.Listener) {
	err := s.acceptConnections(lis)
	if err != nil {
		s.logger.Error("no connection can be accepted", "error", err)
	}
	s.done()
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
	sess, err := newSession(s.methodsCtx, conn, false, anyPeer, s.logger, whyHostLost)
	if err != nil {
		s.logger.Debug("a connection could not be served", "error", err)
		return
	}
	stop := context.AfterFunc(s.connsCtx, sess.close)
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
	var streams [3]*stream // control, stdout and stderr
	for i := range streams {
		st, err := sess.accept()
		if err != nil {
			return err
		}
		streams[i] = st
	}
	s.outputs[0].attach(streams[1])
	s.outputs[1].attach(streams[2])
	broker := newMuxBroker(sess)
	sess.spawn(func() { acceptNumbered(broker) }) // ends with the session
	server := newCallServer(streams[0], nil, s.logger, false)
	control, _ := newService(&controlService{server: s, stream: server}) // it has methods
	dispenser, _ := newService(&dispenseService{plugins: s.Plugins, broker: broker})
	server.services = map[string]*service{"Control": control, "Dispenser": dispenser}
	// Not s.methodsCtx: windDown, which Quit calls, ends that, and would end Quit's own context.
	return server.answerCalls(context.Background())
}

// acceptNumbered accepts the numbered streams of a session until it ends. Then it ends the
// contexts of the methods that the session serves: the peer does not need them any more.
func acceptNumbered(b *MuxBroker) {
	b.Run()
	b.session.cancel()
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
		s.methodsCtx, s.endCalls = context.WithCancelCause(context.Background())
		s.connsCtx, s.endConns = context.WithCancel(context.Background())
		for i, src := range []io.Reader{s.Stdout, s.Stderr} {
			if src == nil {
				src = strings.NewReader("")
			}
			s.outputs[i] = newOutput(src)
		}
	})
}

// windDown ends the contexts of all calls and sends the rest of the output.
func (s *RPCServer) windDown() {
	s.begin()
	s.windingDown.Do(func() {
		s.endCalls(errExiting)
		if s.endOutput != nil {
			s.endOutput()
		}
		end := time.Now().Add(outputTimeout)
		for _, out := range s.outputs {
			out.finish(time.Until(end))
		}
	})
}

// controlService is the service "Control" of the protocol.
type controlService struct {
	server *RPCServer
	stream *callServer
}

// Ping returns, which shows that the plugin answers.
func (c *controlService) Ping(bool, *struct{}) error { return nil }

// Quit ends the plugin when its answer has been sent.
func (c *controlService) Quit(ctx context.Context, _ bool, _ *struct{}) error {
	c.server.windDown()
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

// notNil returns the results of Client or Server of a Plugin, or an error if v is nil.
func notNil(v any, err error) (any, error) {
	if v == nil && err == nil {
		err = errors.New("it returned nil")
	}
	return v, err
}
