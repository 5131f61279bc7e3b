package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/rpc"
	"time"
)

// lostTimeout is between the end of a connection and that of the process, if that is the
// cause.
const lostTimeout = 3 * time.Second

var (
	errKilled   = errors.New("plugin: Kill was called")
	errAsked    = errors.New("plugin: its host asked it to quit")
	errPanicked = errors.New("plugin: the host's own code panicked")
)

// connector makes the connection of a Client, once.
type connector struct {
	config        *ClientConfig
	name          string // of the plugin, for errors
	writers       *hostWriters
	result        *result[*RPCClient]
	exited        *event // those of Client
	finished      *event
	killRequested *event
}

// connect returns the connection to the plugin with that handshake. The first caller
// makes it.
func (c *connector) connect(ctx context.Context, h handshake) (*RPCClient, error) {
	if c.result.begin() {
		c.makeConnection(ctx, h)
		c.dropLateConnection()
		ctx = context.Background() // there is a result
	}
	return c.result.wait(ctx)
}

func (c *connector) makeConnection(ctx context.Context, h handshake) {
	var rc *RPCClient
	err := errPanicked // if a function of TLSConfig does
	defer func() { c.result.set(rc, err) }()
	rc, err = c.dial(ctx, h)
	if err != nil {
		err = fmt.Errorf("plugin %s: connecting: %w", c.name, c.whyNotConnected(ctx, err))
	}
}

// dropLateConnection ends a connection that was made too late for the Client to end it.
func (c *connector) dropLateConnection() {
	rc := c.connection()
	if rc != nil && (c.exited.isSet() || c.finished.isSet()) {
		rc.closeSession()
	}
}

// connection returns the connection, or nil if there is none.
func (c *connector) connection() *RPCClient {
	rc, err, made := c.result.get()
	if err != nil || !made {
		return nil
	}
	return rc
}

// dial connects to the plugin, unless ctx or the process ends.
func (c *connector) dial(ctx context.Context, h handshake) (*RPCClient, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	forget := context.AfterFunc(c.exited.ctx, cancel)
	defer forget()
	conn, err := h.dial(ctx)
	if err != nil {
		return nil, err
	}
	rc, err := newConnection(conn, "plugin "+c.name, c.config.VersionedPlugins[h.version], c.config.Logger, c.whyLost)
	if err != nil {
		return nil, err
	}
	rc.flushes = h.flushes
	rc.testMode = c.config.testMode()
	_ = rc.SyncStreams(c.writers.stdout, c.writers.stderr) // it is always nil
	return rc, nil
}

// whyNotConnected returns why connecting failed, where err does not tell.
func (c *connector) whyNotConnected(ctx context.Context, err error) error {
	// A plugin that has just died is the reason.
	timer := time.NewTimer(drainTimeout)
	defer timer.Stop()
	select {
	case <-c.finished.done():
	case <-c.killRequested.done():
	case <-timer.C:
	}
	exit := c.unexpectedExit()
	switch {
	case exit != nil:
		return exit
	case ctx.Err() != nil:
		return contextError(ctx)
	}
	return err
}

// whyLost returns why the connection was lost. received reports whether anything was
// received on it.
func (c *connector) whyLost(received bool) error {
	timeout, why := lostTimeout, errors.New("the connection was lost, though the process lives")
	if !received {
		timeout, why = drainTimeout, errNotAnswered
	}
	if !c.config.testMode() && !c.askedToQuit() {
		waitFor(timeout, c.finished.done())
	}
	exit := c.unexpectedExit()
	switch {
	case exit != nil:
		return exit
	case c.askedToQuit():
		why = fmt.Errorf("Kill or Close ended the connection: %w", rpc.ErrShutdown)
	}
	return fmt.Errorf("plugin %s: %w", c.name, why)
}

// askedToQuit reports whether Kill or RPCClient.Close was called before the process ended.
func (c *connector) askedToQuit() bool {
	if c.exited.isSet() {
		return c.exited.reason() == errAsked
	}
	rc := c.connection()
	return c.killRequested.isSet() || rc != nil && rc.isEnding()
}

// unexpectedExit returns the ExitError if the life of the plugin has ended with one.
func (c *connector) unexpectedExit() error {
	exit, unexpected := c.finished.reason().(*ExitError)
	if !unexpected {
		return nil
	}
	return exit
}
