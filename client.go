package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file is about the life of a plugin, as its host sees it: the start, the connection,
// and the end, which may be that of the process or Kill.

// Client starts the process of a plugin, connects to it and kills it. [NewClient] returns
// one, for one process. All methods may be called concurrently. The zero Client cannot be
// used.
type Client struct {
	config  ClientConfig
	name    string       // of the plugin, for errors
	writers *hostWriters // of config; closed by Kill

	// The life of the plugin. The first Start, or Kill, begins it. A plugin that has
	// started lives in the goroutine of live. These are its stages, in their order. If Start
	// fails, launched and exited may never happen; starting and finished do.
	launched chan struct{}      // closed when there is a process
	starting *result[handshake] // of Start
	exited   *event             // the process has ended
	finished *event             // its output has ended too; Err returns the reason if it is an *ExitError

	// These come at any time.
	connecting    *result[*RPCClient] // for Client or Kill
	killRequested *event

	process AttachedRunner // a *child, or one that was found; constant when launched is closed
	exit    *ExitError     // constant when exited has happened
	asked   bool           // to quit, before it exited; constant when exited has happened
}

var errKilled = errors.New("plugin: Kill was called")

// managed has the clients and supervisors that CleanupClients kills, as keys.
var managed sync.Map

// CleanupClients kills all plugins whose ClientConfig has Managed set, and waits for
// them to exit. Call it before the host exits.
func CleanupClients() {
	var killing sync.WaitGroup
	for c := range managed.Range {
		killing.Go(c.(interface{ Kill() }).Kill)
	}
	killing.Wait()
}

// NewClient returns a Client for a plugin. It does not start the plugin: [Client.Client]
// and [Client.Start] do, and return an error if config is invalid. Call [Client.Kill] when
// the plugin is no longer needed, or [CleanupClients] if config has Managed set. NewClient
// panics if config is nil.
func NewClient(config *ClientConfig) *Client {
	c := &Client{
		config:        config.withDefaults(),
		name:          config.name(),
		launched:      make(chan struct{}),
		starting:      newResult[handshake](),
		exited:        newEvent(),
		finished:      newEvent(),
		connecting:    newResult[*RPCClient](),
		killRequested: newEvent(),
	}
	c.writers = c.config.hostWriters()
	if c.config.Managed && !c.config.testMode() {
		managed.Store(c, nil)
	}
	return c
}

// Start calls [Client.StartContext] with a context that does not end.
func (c *Client) Start() (net.Addr, error) { return c.StartContext(context.Background()) }

// StartContext starts the plugin, or reattaches to it, and returns its address. If the ctx
// of the first call ends, or Kill is called, it stops the plugin and returns an error.
// Other calls wait for the first, until their own ctx ends, and return the same address or
// error. To try again, use a new Client.
//
// If the process does not become a plugin, the error is a [*StartError]; after
// StartTimeout, or if ctx ended or Kill was called, errors.Is finds the error of a context in
// it. An invalid config, a Kill before the start, and a failed reattach are other errors. If
// the versions do not match, errors.As finds a [*VersionError]. [ErrProcessNotFound],
// [ErrChecksumsDoNotMatch], [ErrSecureConfigNoChecksum], [ErrSecureConfigNoHash] and
// [ErrSecureConfigAndReattach] are not wrapped.
func (c *Client) StartContext(ctx context.Context) (net.Addr, error) {
	if c.starting.begin() {
		c.runStart(ctx)
	}
	h, err := c.starting.wait(ctx)
	return h.addr, err
}

// runStart begins the life of the plugin: it starts the plugin. The start runs in the
// goroutine of the caller, because a panic of the host's own code, as in ReattachFunc,
// belongs there. Such a start has failed.
func (c *Client) runStart(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	context.AfterFunc(c.killRequested.ctx, func() { cancel(errKilled) }) // has no effect after the start
	var h handshake
	err := errors.New("plugin: the host's own code panicked")
	defer func() { c.startIsOver(h, err) }()
	h, err = c.start(ctx)
}

// startIsOver ends the life of the plugin if the start has failed. Otherwise the life goes on.
func (c *Client) startIsOver(h handshake, err error) {
	if err != nil {
		c.logExit(true) // at Debug: the caller has the error
		c.finish(err)
	}
	c.starting.set(h, err)
	if err == nil && !c.config.testMode() {
		go c.live() // ends with the process, or with Kill
	}
}

// start starts the plugin, or reattaches to it.
func (c *Client) start(ctx context.Context) (h handshake, err error) {
	if c.killRequested.isSet() {
		return h, errKilled
	}
	err = c.config.validate()
	if err != nil {
		return h, err
	}
	if c.config.Reattach != nil {
		return c.reattach(ctx)
	}
	p, err := launch(ctx, &c.config, c.writers)
	if err != nil {
		return h, err
	}
	c.adopt(p)
	h, err = p.awaitHandshake(ctx)
	if err != nil {
		return handshake{}, p.giveUp(err, c.exited.done())
	}
	return h, nil
}

// reattach finds the plugin that runs already.
func (c *Client) reattach(ctx context.Context) (handshake, error) {
	h := c.config.Reattach.handshake(c.config.VersionedPlugins)
	var p AttachedRunner
	secure, err := c.config.tlsFor(h, tls.Certificate{})
	if err == nil {
		p, err = c.config.Reattach.find(ctx, c.config.Logger)
	}
	if err != nil {
		return handshake{}, reattachError(err)
	}
	if p != nil {
		c.adopt(p)
	}
	h.tls = secure
	return h, nil
}

// adopt makes p the process of the client.
func (c *Client) adopt(p AttachedRunner) {
	c.process = p
	close(c.launched)
	// Ends with the process and its output, or when finished is set; on Windows, the wait
	// for a reattached process ends only with the process.
	go c.watch()
	c.config.Logger.Debug("started", "pid", p.ID())
}

// watch waits for the end of the process.
func (c *Client) watch() {
	err := c.process.Wait(c.finished.ctx)
	if !errors.As(err, &c.exit) {
		c.exit = &ExitError{Path: c.name, Err: err}
	}
	c.asked = c.askedToQuit()
	c.exited.set(c.exit)
}

// live is the life of a plugin that has started, to its end.
func (c *Client) live() {
	patience := graceTimeout // for a slow writer; after Kill, what is left of KillTimeout
	select {
	case <-c.exited.done():
	case <-c.killRequested.done():
		deadline := time.Now().Add(c.config.KillTimeout)
		c.quit(deadline)
		patience = max(patience, time.Until(deadline))
	}
	if c.exited.isSet() {
		c.writers.await(patience)
	}
	asked := c.askedToQuit()
	c.logExit(asked)
	if asked {
		c.finish(errKilled) // the process may live on
	} else {
		c.finish(c.exit) // it is set: without Kill, only the end of the process leads here
	}
}

// quit asks the plugin to quit, and kills it if it does not exit by the deadline.
func (c *Client) quit(deadline time.Time) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	rc, err := c.connect(ctx)
	if err == nil {
		err = rc.quit(ctx)
	}
	patience := time.Until(deadline)
	if err != nil {
		patience = graceTimeout // it may be exiting
	}
	waitFor(patience, c.exited.done())
	if c.exited.isSet() {
		return
	}
	// Ends at once, or with the Kill of ReattachFunc's process. What it returns says no more
	// than the wait for the end of the process.
	go c.process.Kill(c.finished.ctx)
	c.config.Logger.Warn("the plugin does not exit by itself and is killed", "pid", c.ID(), "error", err)
	waitFor(reapTimeout-graceTimeout, c.exited.done()) // graceTimeout may have passed
}

// logExit logs the end of the process, if it has ended.
func (c *Client) logExit(expected bool) {
	if !c.exited.isSet() {
		return
	}
	level, reason := hclog.Error, any(c.exit)
	switch {
	case expected:
		level, reason = hclog.Debug, c.exit.State.String() // that of nil is "<nil>"
	case c.exit.State != nil && c.exit.State.Success():
		level = hclog.Info
	}
	args := []any{"plugin", c.name, "pid", c.ID(), "reason", reason}
	if c.exit.Panic != "" {
		args = append(args, "trace", printable(c.exit.Panic))
	}
	c.config.Logger.Log(level, "the process has ended", args...)
}

// finish ends the life of the plugin. The first reason is that of Err.
func (c *Client) finish(reason error) {
	managed.Delete(c)
	c.finished.set(reason)
}

// Client starts the plugin, if it has not been started, and connects to it. Later calls
// return the same connection or error. The errors are those of [Client.StartContext]
// and those of connecting. After Kill, Client returns an error.
func (c *Client) Client() (ClientProtocol, error) {
	_, err := c.Start()
	if err != nil {
		return nil, err
	}
	if c.killRequested.isSet() {
		return nil, errKilled
	}
	timeout := c.config.StartTimeout
	ctx, cancel := context.WithTimeoutCause(c.killRequested.ctx, timeout,
		fmt.Errorf("it has not answered within %v (ClientConfig.StartTimeout)", timeout))
	defer cancel()
	rc, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	return rc, nil
}

// connect returns the connection to the plugin, which has started. The first caller makes it.
func (c *Client) connect(ctx context.Context) (*RPCClient, error) {
	if c.connecting.begin() {
		c.connecting.set(c.dial(ctx))
	}
	return c.connecting.wait(ctx)
}

// dial connects to the plugin, unless ctx or the process ends.
func (c *Client) dial(ctx context.Context) (*RPCClient, error) {
	dialCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(c.exited.ctx, cancel)
	h := c.starting.get()
	conn, err := h.dial(dialCtx)
	if err != nil {
		return nil, c.whyNotConnected(ctx, err)
	}
	plugins := c.config.VersionedPlugins[h.version]
	rc, err := newConnection(conn, peerName(c.name), plugins, c.config.Logger, c.whyLost)
	if err != nil {
		return nil, c.whyNotConnected(ctx, err)
	}
	rc.sameLibrary = h.sameLibrary
	rc.testMode = c.config.testMode()
	_ = rc.SyncStreams(c.writers.stdout, c.writers.stderr) // it is always nil
	// The end of the process may not end the connection, because another may hold it.
	context.AfterFunc(c.finished.ctx, rc.session.disconnect)
	return rc, nil
}

// whyNotConnected returns why connecting failed. err may not tell.
func (c *Client) whyNotConnected(ctx context.Context, err error) error {
	exit := c.awaitCrash(drainTimeout)
	switch {
	case exit != nil:
		err = exit
	case ctx.Err() != nil:
		err = contextError(ctx)
	}
	return fmt.Errorf("%s: connecting: %w", peerName(c.name), err)
}

// whyLost returns why the connection was lost. received reports whether anything was
// received on it.
func (c *Client) whyLost(received bool) error {
	timeout, why := lostTimeout, errors.New("the connection was lost, though the process lives")
	if !received {
		timeout, why = drainTimeout, errNotAnswered
	}
	exit := c.awaitCrash(timeout)
	switch {
	case exit != nil:
		return exit
	case c.askedToQuit():
		why = fmt.Errorf("Kill or Close ended the connection: %w", rpc.ErrShutdown)
	}
	return fmt.Errorf("%s: %w", peerName(c.name), why)
}

// awaitCrash returns the ExitError of a plugin that has just died, or is dying, or nil.
func (c *Client) awaitCrash(timeout time.Duration) error {
	if !c.config.testMode() && !c.askedToQuit() {
		waitFor(timeout, c.finished.done())
	}
	return c.Err()
}

// askedToQuit reports whether Kill or RPCClient.Close was called before the process ended.
func (c *Client) askedToQuit() bool {
	if c.exited.isSet() {
		return c.asked
	}
	rc := c.connecting.get()
	return c.killRequested.isSet() || rc != nil && rc.session.ending.Load()
}

// Kill asks the plugin to quit and waits for it to exit. After ClientConfig.KillTimeout, or
// a quarter of a second if it cannot ask, it kills the process. It returns at most about two
// seconds later. When it returns, no Write to SyncStdout, SyncStderr or Stderr begins any
// more. The output has been delivered, except what a Writer has not taken in time: Kill logs
// how many bytes it drops. Kill interrupts a Start that is running, but waits for a check of
// SecureConfig and for ReattachFunc. It is safe to call Kill more than once and at any time.
//
// A reattached plugin is killed only if ReattachConfig.Pid is certainly its process, or
// by ReattachConfig.ReattachFunc. In test mode, Kill does nothing.
func (c *Client) Kill() {
	if c.config.testMode() {
		return
	}
	c.killRequested.set(errKilled)
	if c.starting.begin() {
		c.runStart(context.Background()) // and ends at once
	}
	select {
	case <-c.launched:
	case <-c.finished.done():
	}
	ended := waitFor(c.config.KillTimeout+reapTimeout+drainTimeout, c.finished.done())
	if !ended {
		// Code of the host's, such as its Logger, holds up the life of the plugin.
		go c.process.Kill(context.Background()) // as in quit, but finished comes now
		c.finish(errKilled)
	}
	rc := c.connecting.get()
	if rc != nil {
		rc.session.close()
	}
	dropped := c.writers.close()
	if dropped > 0 && ended { // otherwise the Logger may block
		c.config.Logger.Warn("output was dropped, because its Writer has not taken it", "bytes", dropped)
	}
}

// Done returns a channel that is closed when the plugin has exited and its output has
// been delivered, when Start has failed, and when Kill has returned. It waits a quarter of
// a second at most for a Write to SyncStdout, SyncStderr or Stderr. In test mode it is
// closed only if Start has failed.
func (c *Client) Done() <-chan struct{} { return c.finished.done() }

// Err returns an [*ExitError] if the plugin has exited and was not asked to. It returns
// nil until Done is closed.
func (c *Client) Err() error {
	exit, unexpected := c.finished.reason().(*ExitError)
	if !unexpected {
		return nil
	}
	return exit
}

// Exited reports whether Done is closed. If a call failed because the plugin died,
// Exited is true when the call returns.
func (c *Client) Exited() bool { return c.finished.isSet() }

// ID returns the pid, or AttachedRunner.ID with ReattachConfig.ReattachFunc. It returns
// "" before Start and in test mode.
func (c *Client) ID() string {
	if !isClosed(c.launched) {
		return ""
	}
	return c.process.ID()
}

// Protocol starts the plugin, if it has not been started, and returns its protocol, or
// ProtocolInvalid if it does not start.
func (c *Client) Protocol() Protocol {
	_, _ = c.Start() // if it fails, there is no protocol
	return c.starting.get().protocol
}

// NegotiatedVersion returns the protocol version that both sides use, or 0 before Start.
func (c *Client) NegotiatedVersion() int { return c.starting.get().version }

// ReattachConfig detaches the plugin, as ClientConfig.Detach does, and returns the
// configuration with which another host can use it, or nil before Start has succeeded. On
// Windows, or if a process between host and plugin closes inherited descriptors, it cannot
// detach: set Detach instead. A reattached Client returns a copy of its own configuration.
// To get the pid without detaching, use ID.
func (c *Client) ReattachConfig() *ReattachConfig {
	h := c.starting.get()
	if h.addr == nil {
		return nil // it has not started
	}
	if c.config.Reattach != nil {
		same := *c.config.Reattach
		return &same
	}
	return c.process.(*child).detach(h) // which start has launched
}
