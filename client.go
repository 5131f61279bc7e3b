package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/hashicorp/go-hclog"
)

// Client starts the process of a plugin, connects to it and kills it. [NewClient] returns
// one, for one process. All methods may be called concurrently.
type Client struct {
	config ClientConfig
	name   string // of the plugin, for errors

	// The life of the plugin. The first Start, or Kill, begins it. A plugin that has
	// started lives in the goroutine of live. These are the stages, in their order; if
	// Start fails, those that are left out never come.
	launched chan struct{}      // closed when there is a process
	starting *result[handshake] // of Start
	exited   *event             // the process has ended; the reason is exit, or errAsked
	finished *event             // its output has ended too; the reason is as for exited, or why Start failed

	killRequested *event // at any time

	process   AttachedRunner // constant when launched is closed
	exit      *ExitError     // constant when exited has happened
	connector connector
	writers   *hostWriters // of config; closed by Kill
}

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
// the plugin is no longer needed, or [CleanupClients] if config has Managed set.
func NewClient(config *ClientConfig) *Client {
	c := &Client{
		config:        config.withDefaults(),
		name:          config.name(),
		launched:      make(chan struct{}),
		starting:      newResult[handshake](),
		exited:        newEvent(),
		finished:      newEvent(),
		killRequested: newEvent(),
	}
	c.writers = c.config.hostWriters()
	c.connector = connector{
		config:        &c.config,
		name:          c.name,
		writers:       c.writers,
		result:        newResult[*RPCClient](),
		exited:        c.exited,
		finished:      c.finished,
		killRequested: c.killRequested,
	}
	if c.config.Managed && !c.config.testMode() {
		managed.Store(c, nil)
	}
	return c
}

// Start calls [Client.StartContext] with a context that does not end.
func (c *Client) Start() (net.Addr, error) { return c.StartContext(context.Background()) }

// StartContext starts the plugin, or reattaches to it, and returns its address. If ctx
// ends first, or Kill is called, it stops the plugin and returns an error. Later calls
// return the same address or error; to try again, use a new Client.
//
// The error of a plugin that does not start is a [*StartError]. If the versions do not
// match, errors.As finds a [*VersionError] in it. [ErrProcessNotFound],
// [ErrChecksumsDoNotMatch], [ErrSecureConfigNoChecksum], [ErrSecureConfigNoHash] and
// [ErrSecureConfigAndReattach] are not wrapped.
func (c *Client) StartContext(ctx context.Context) (net.Addr, error) {
	if c.starting.begin() {
		c.begin(ctx)
		ctx = context.Background() // there is a result
	}
	h, err := c.starting.wait(ctx)
	return h.addr, err
}

// begin begins the life of the plugin: it starts the plugin. The start runs in the
// goroutine of the caller, because a panic of the host's own code, as in ReattachFunc,
// belongs there. Such a start has failed.
func (c *Client) begin(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	forget := context.AfterFunc(c.killRequested.ctx, func() { cancel(errKilled) })
	defer forget()
	var h handshake
	err := errPanicked
	defer func() { c.startIsOver(h, err) }()
	h, err = c.start(ctx)
}

// startIsOver ends the life of the plugin if the start has failed. Otherwise the life goes on.
func (c *Client) startIsOver(h handshake, err error) {
	if err != nil {
		c.logExit(true)
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
	if err == nil {
		h.tls, err = c.config.accept(h, p.cert)
	}
	if err != nil {
		return handshake{}, c.giveUp(p, err)
	}
	return h, nil
}

// giveUp ends a process that has not become a plugin because of err, and describes it.
func (c *Client) giveUp(p *child, err error) error {
	byItself := err == errNoHandshake
	if !byItself {
		_ = p.Kill(c.finished.ctx) // fails only if it has exited
	}
	exited := waitFor(reapTimeout, c.exited.done())
	return p.startError(err, byItself && exited)
}

// reattach finds the plugin that runs already.
func (c *Client) reattach(ctx context.Context) (handshake, error) {
	h := c.config.Reattach.handshake(c.config.VersionedPlugins)
	secure, err := c.config.accept(h, tls.Certificate{})
	if err != nil {
		return handshake{}, reattachError(err)
	}
	h.tls = secure
	p, err := c.config.Reattach.find(ctx, c.config.Logger)
	if err != nil {
		return handshake{}, reattachError(err)
	}
	if p != nil {
		c.adopt(p)
	}
	return h, nil
}

// adopt makes p the process of the client.
func (c *Client) adopt(p AttachedRunner) {
	c.process = p
	close(c.launched)
	go c.watch() // ends with the process and its output, or when finished is set
	c.config.Logger.Debug("started", "pid", p.ID())
}

// watch waits for the end of the process.
func (c *Client) watch() {
	err := c.process.Wait(c.finished.ctx)
	if !errors.As(err, &c.exit) {
		c.exit = &ExitError{Path: c.name, Err: err}
	}
	if c.connector.askedToQuit() {
		c.exited.set(errAsked)
	} else {
		c.exited.set(c.exit)
	}
}

// live is the life of a plugin that has started, to its end.
func (c *Client) live() {
	select {
	case <-c.exited.done():
	case <-c.killRequested.done():
		c.quit()
	}
	c.disconnect()
	c.logExit(c.connector.askedToQuit())
	if c.exited.isSet() {
		c.finish(c.exited.reason())
	} else {
		c.finish(errKilled) // the process may live on
	}
}

// quit asks the plugin to quit, and kills it if it does not exit.
func (c *Client) quit() {
	ctx, cancel := context.WithTimeout(context.Background(), c.config.KillTimeout)
	defer cancel()
	rc, err := c.connector.connect(ctx, c.agreed())
	if err == nil {
		err = rc.quit(ctx)
	}
	if err == nil {
		select {
		case <-c.exited.done():
		case <-ctx.Done():
		}
	} else {
		waitFor(drainTimeout/2, c.exited.done()) // it may be exiting
	}
	if c.exited.isSet() {
		c.writers.await(ctx)
		return
	}
	go c.killProcess() // ends at once, or when the Kill of ReattachFunc's process does
	args := []any{"pid", c.process.ID(), "error", err}
	c.config.Logger.Warn("the plugin does not exit by itself and is killed", args...)
	waitFor(reapTimeout-drainTimeout/2, c.exited.done())
}

// killProcess kills the process. An error does not matter: the end is waited for with a bound.
func (c *Client) killProcess() { _ = c.process.Kill(c.finished.ctx) }

// disconnect ends the connection, if there is one, when the output has been written. It
// does not wait for a slow writer.
func (c *Client) disconnect() {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout/2)
	defer cancel()
	rc := c.connector.connection()
	if rc != nil {
		if c.exited.isSet() {
			rc.waitOutput(ctx)
		}
		rc.disconnect() // another process may hold the connection
	}
	if c.exited.isSet() {
		c.writers.await(ctx)
	}
}

// logExit logs the end of the process, if it has ended.
func (c *Client) logExit(expected bool) {
	if !c.exited.isSet() {
		return
	}
	level, reason := hclog.Error, any(c.exit)
	switch {
	case expected:
		level, reason = hclog.Debug, c.exit.State
	case c.exit.State != nil && c.exit.State.Success():
		level = hclog.Info
	}
	args := []any{"plugin", c.name, "pid", c.process.ID(), "reason", reason}
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
	rc, err := c.connector.connect(ctx, c.agreed())
	if err != nil {
		return nil, err
	}
	return rc, nil
}

// Kill asks the plugin to quit and waits for it to exit. After ClientConfig.KillTimeout
// it kills the process. It returns at most about two seconds later. When it returns,
// the output of the plugin has been delivered, and no Write to SyncStdout, SyncStderr or
// Stderr begins any more. Output that a Writer has not taken until then is dropped, and
// Kill logs how many bytes that are. It is safe to call Kill more than once and at any time. It
// interrupts a Start that is running.
//
// A reattached plugin is killed only if ReattachConfig.Pid is certainly its process, or
// by ReattachConfig.ReattachFunc. In test mode, Kill does nothing.
func (c *Client) Kill() {
	if c.config.testMode() {
		return
	}
	c.killRequested.set(errKilled)
	if c.starting.begin() {
		c.begin(context.Background()) // and ends at once
	}
	select {
	case <-c.launched:
	case <-c.finished.done():
	}
	ended := waitFor(c.config.KillTimeout+reapTimeout+drainTimeout, c.finished.done())
	if !ended {
		// Code of the host's, such as its Logger, holds up the life of the plugin.
		go c.killProcess() // ends at once, or when the Kill of ReattachFunc's process does
		c.finish(errKilled)
	}
	rc := c.connector.connection()
	if rc != nil {
		rc.closeSession()
	}
	dropped := c.writers.close()
	if dropped > 0 {
		c.config.Logger.Warn("output was dropped, because its Writer has not taken it", "bytes", dropped)
	}
}

// Done returns a channel that is closed when the plugin has exited and its output has
// been delivered, when Start has failed, and when Kill has returned. It waits a quarter of
// a second at most for a Write to SyncStdout, SyncStderr or Stderr. In test mode it is
// never closed.
func (c *Client) Done() <-chan struct{} { return c.finished.done() }

// Err returns an [*ExitError] if the plugin has exited and was not asked to. It returns
// nil until Done is closed.
func (c *Client) Err() error { return c.connector.unexpectedExit() }

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

// agreed returns the handshake, or the zero handshake if Start has failed or is not over.
func (c *Client) agreed() handshake {
	h, err, over := c.starting.get()
	if err != nil || !over {
		return handshake{}
	}
	return h
}

// Protocol starts the plugin, if it has not been started, and returns its protocol, or
// ProtocolInvalid if it does not start.
func (c *Client) Protocol() Protocol {
	_, err := c.Start()
	if err != nil {
		return ProtocolInvalid
	}
	return c.agreed().protocol
}

// NegotiatedVersion returns the protocol version that both sides use, or 0 before Start.
func (c *Client) NegotiatedVersion() int { return c.agreed().version }

// ReattachConfig returns the configuration with which another host can use the plugin,
// or nil before Start. It detaches the plugin, as ClientConfig.Detach does; on Windows,
// only Detach does, and also if a process between host and plugin closes descriptors that
// it does not know. To get the pid without detaching, use ID.
func (c *Client) ReattachConfig() *ReattachConfig {
	h, err, over := c.starting.get()
	if !over || err != nil {
		return nil
	}
	if c.config.Reattach != nil {
		same := *c.config.Reattach
		return &same
	}
	p, ours := c.process.(*child)
	if !ours {
		return nil
	}
	p.detach(h.flushes)
	return &ReattachConfig{
		Protocol:        h.protocol,
		ProtocolVersion: h.version,
		Addr:            h.addr,
		Pid:             p.cmd.Process.Pid,
	}
}
