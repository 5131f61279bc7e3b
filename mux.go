package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file is about the host's end of a connection: what the host asks of its plugin
// (answer, quit, dispense), and how it gets the plugin's output.

const (
	pingTimeout = 4 * time.Second // how long Ping waits
	quitTimeout = 2 * time.Second // how long RPCClient.Close waits
)

// RPCClient is the host's end of a connection to a plugin. [Client.Client] returns one.
// Its methods may be called concurrently.
type RPCClient struct {
	session *session
	broker  *MuxBroker
	control *rpc.Client
	plugins map[string]Plugin

	output  [2]unexplained // stdout and stderr of the plugin
	writers []*hostWriter  // to which the output is copied

	sameLibrary bool // the plugin uses this library, too
	testMode    bool // the plugin lives on when it has quit

	quitting *result[struct{}] // of asking the plugin to quit: an error or nothing
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
	diagnose func(received bool) error,
) (*RPCClient, error) {
	s, err := newSession(context.Background(), conn, true, peer, logger, diagnose)
	if err != nil {
		return nil, fmt.Errorf("plugin: connecting: %w", err)
	}
	c := &RPCClient{session: s, plugins: plugins, broker: newMuxBroker(s), quitting: newResult[struct{}]()}
	// The order is part of the protocol: control, stdout, stderr.
	var streams [3]*stream
	for i := range streams {
		if streams[i], err = s.open(context.Background()); err != nil {
			s.close()
			return nil, fmt.Errorf("plugin: connecting: %w", err)
		}
	}
	c.control = s.client(streams[0])
	c.output = [2]unexplained{unexplained{stream: streams[1]}, unexplained{stream: streams[2]}}
	s.spawn(func() { acceptNumbered(c.broker) }) // ends with the session
	return c, nil
}

// SyncStreams starts to copy the plugin's stdout and stderr to the writers, each in its
// own goroutine, until the plugin exits. A writer that fails is not written to again.
// [Client.Client] calls SyncStreams with [ClientConfig].SyncStdout and SyncStderr. After
// [NewRPCClient], call it once, before anything else: without a reader, the plugin blocks
// when it has written much. The error is always nil.
func (c *RPCClient) SyncStreams(stdout, stderr io.Writer) error {
	for i, dst := range []io.Writer{stdout, stderr} {
		w, ours := dst.(*hostWriter)
		if !ours {
			w = newHostWriter(dst)
		}
		w.begin()
		c.writers = append(c.writers, w)
		// Ends with the stream, or when the caller's Write returns. So nothing waits
		// for it without a bound.
		go copyOutput(w, c.output[i])
	}
	return nil
}

// copyOutput copies one output of the plugin until its end.
func copyOutput(w *hostWriter, output io.Reader) {
	_, _ = io.Copy(w, output) // an error of the stream is the end of it
	w.end()
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
		return nil, fmt.Errorf("the host knows no such plugin; ClientConfig.Plugins has %s",
			nameList(c.plugins))
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

// Ping checks whether the plugin answers within four seconds. If not, as when the
// process is stopped, the error wraps context.DeadlineExceeded. It also fails if the
// connection is lost.
func (c *RPCClient) Ping() error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), pingTimeout,
		errors.New("plugin: Ping was not answered"))
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

// quit asks the plugin to quit, once, and waits for the end of its output. Later calls
// return the error of the first.
func (c *RPCClient) quit(ctx context.Context) error {
	if c.quitting.begin() {
		c.quitting.set(struct{}{}, c.askToQuit(ctx))
	}
	_, err := c.quitting.wait(ctx)
	if err != nil {
		return fmt.Errorf("plugin: asking it to quit: %w", err)
	}
	if c.testMode {
		// A go-plugin plugin never ends its output then.
		for _, st := range c.output {
			_ = st.SetReadDeadline(time.Now().Add(graceTimeout)) // never fails
		}
	}
	for _, w := range c.writers {
		w.await(ctx)
	}
	return nil
}

// askToQuit asks the plugin to quit and waits for its answer.
func (c *RPCClient) askToQuit(ctx context.Context) error {
	c.session.ending.Store(true)
	if isClosed(c.session.ended()) {
		return net.ErrClosed // the reason would take a while to find out
	}
	if !c.sameLibrary {
		// A go-plugin plugin exits when it has answered Quit. A few round trips
		// give it time to send its output before.
		for range 3 {
			_ = c.ping(ctx) // Quit will fail, too
		}
	}
	return Call(ctx, c.control, "Control.Quit", true, &struct{}{})
}
