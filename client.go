package plugin

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/rpc"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	lostTimeout  = 3 * time.Second        // between the end of a connection and that of the process, if that is the cause
	drainTimeout = 500 * time.Millisecond // between the end of a process and that of its output
)

// Client starts the process of a plugin, connects to it and kills it. [NewClient] returns
// one, for one process. All methods may be called concurrently.
type Client struct {
	config ClientConfig
	name   string // of the plugin, for errors
	sets   map[int]PluginSet
	logger hclog.Logger

	life       context.Context // ends when Kill is called
	end        context.CancelCauseFunc
	watching   context.Context // ends when Kill does not wait for the process any more
	abandon    context.CancelFunc
	starting   *once[handshake]
	connecting *once[*RPCClient]
	gone       chan struct{} // closed when the process has ended
	done       chan struct{} // closed when its output has ended too

	mu    sync.Mutex // guards the fields below, and closing done
	proc  AttachedRunner
	asked bool  // Kill was called while the plugin ran
	err   error // how the plugin ended, or nil if asked; constant when done is closed
}

var errKilled = errors.New("plugin: Kill was called")

// managed has the clients that CleanupClients kills, as keys.
var managed sync.Map

// CleanupClients kills all plugins whose ClientConfig has Managed set, and waits for
// them to exit. Call it before the host exits.
func CleanupClients() {
	var killing sync.WaitGroup
	for c := range managed.Range {
		killing.Go(c.(*Client).Kill)
	}
	killing.Wait()
}

// NewClient returns a Client for a plugin. It does not start the plugin: [Client.Client]
// and [Client.Start] do, and return an error if config is invalid. Call [Client.Kill] when
// the plugin is no longer needed, or [CleanupClients] if config has Managed set.
func NewClient(config *ClientConfig) *Client {
	c := &Client{
		config: *config, starting: newOnce[handshake](), connecting: newOnce[*RPCClient](),
		gone: make(chan struct{}), done: make(chan struct{}),
	}
	cfg := &c.config
	c.sets = allVersions(cfg.ProtocolVersion, cfg.Plugins, cfg.VersionedPlugins)
	cfg.StartTimeout = cmp.Or(max(cfg.StartTimeout, 0), defaultStartTimeout)
	cfg.KillTimeout = cmp.Or(max(cfg.KillTimeout, 0), defaultKillTimeout)
	cfg.PluginLogBufferSize = cmp.Or(max(cfg.PluginLogBufferSize, 0), defaultLogBufferSize)
	c.logger = cfg.Logger
	if c.logger == nil {
		c.logger = hclog.Default().Named("plugin")
	}
	switch {
	case cfg.Cmd != nil:
		c.name = pluginName(cfg.Cmd.Path)
		c.logger = c.logger.Named(c.name)
	case cfg.Reattach != nil:
		c.name = fmt.Sprintf("at %v", cfg.Reattach.Addr)
	}
	c.life, c.end = context.WithCancelCause(context.Background())
	c.watching, c.abandon = context.WithCancel(context.Background())
	if cfg.Managed && !c.testMode() {
		managed.Store(c, nil)
	}
	return c
}

func (c *Client) testMode() bool { return c.config.Reattach != nil && c.config.Reattach.Test }

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
	h, err := c.starting.do(ctx, func() (handshake, error) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(c.life, func() { cancel(errKilled) })()
		h, err := c.start(ctx)
		if err != nil {
			c.finish(nil)
		}
		return h, err
	})
	return h.addr, err
}

func (c *Client) start(ctx context.Context) (h handshake, err error) {
	if c.life.Err() != nil {
		return h, errKilled
	}
	if err := c.config.validate(); err != nil {
		return h, err
	}
	if c.config.Reattach != nil {
		return c.reattach(ctx)
	}
	failed := &StartError{Path: c.config.Cmd.Path}
	p, err := launch(&c.config, c.logger, versionList(c.sets))
	if err == nil {
		c.own(p)
		if h, err = p.awaitHandshake(ctx, c.config.StartTimeout); err == nil {
			h.tls, err = c.accept(h, p)
		}
		if err == nil {
			return h, nil
		}
		if err != errNoHandshake {
			_ = p.Kill(ctx)
		}
		if waitFor(reapTimeout, c.gone) && err == errNoHandshake {
			failed.State = p.cmd.ProcessState
		}
		failed.Stdout, failed.Stderr = p.noise.String(), p.log.tail.String()
	}
	if err == ErrSecureConfigNoChecksum || err == ErrSecureConfigNoHash || err == ErrChecksumsDoNotMatch {
		return handshake{}, err
	}
	failed.Err = err
	failed.hint = startHint(failed, &c.config)
	return handshake{}, failed
}

// own makes p the process of the client and watches it.
func (c *Client) own(p AttachedRunner) {
	c.mu.Lock()
	c.proc = p
	c.mu.Unlock()
	c.logger.Debug("started", "pid", p.ID())
	go c.watch(p) // ends with the process, or when Kill stops waiting for it
}

// watch waits until the process and its output have ended.
func (c *Client) watch(p AttachedRunner) {
	err := p.Wait(c.watching)
	close(c.gone)
	<-c.starting.done
	if rc := c.connecting.result(); rc != nil {
		waitFor(drainTimeout/2, rc.copied[0], rc.copied[1])
		rc.session.disconnect() // another process may hold the connection
	}
	var exit *ExitError
	if !errors.As(err, &exit) {
		exit = &ExitError{Path: c.name, Err: err}
	}
	level, reason := hclog.Error, any(exit)
	switch {
	case c.wasAsked() || c.starting.err != nil:
		level, reason = hclog.Debug, exit.State
	case exit.State != nil && exit.State.Success():
		level = hclog.Info
	}
	args := []any{"plugin", c.name, "pid", p.ID(), "reason", reason}
	if exit.Panic != "" {
		args = append(args, "trace", printable(exit.Panic))
	}
	c.logger.Log(level, "the process has ended", args...)
	c.finish(exit)
}

// accept checks whether this host can use a plugin with that handshake, and returns the
// TLS configuration for it.
func (c *Client) accept(h handshake, p *child) (*tls.Config, error) {
	if h.protocol == ProtocolGRPC {
		return nil, errors.New("it uses gRPC, and this library only net/rpc: the plugin must be served with this library, or with the net/rpc half of go-plugin")
	}
	if allowed := c.config.AllowedProtocols; h.protocol != ProtocolNetRPC || allowed != nil && !slices.Contains(allowed, h.protocol) {
		return nil, fmt.Errorf("it uses the protocol %q, and ClientConfig.AllowedProtocols is %q", h.protocol, allowed)
	}
	if _, known := c.sets[h.version]; !known {
		return nil, &VersionError{Plugin: h.version, Host: sortedKeys(c.sets)}
	}
	if !c.config.AutoMTLS {
		return c.config.TLSConfig, nil
	}
	if len(h.cert) == 0 {
		return nil, errors.New("it has not answered with a certificate, as AutoMTLS needs: was it served with a ServeConfig.TLSProvider?")
	}
	cert, err := x509.ParseCertificate(h.cert)
	if err != nil {
		return nil, fmt.Errorf("its certificate cannot be read: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return mutualTLS(p.cert, pool), nil
}

// reattach finds the plugin that runs already.
func (c *Client) reattach(ctx context.Context) (h handshake, err error) {
	rc := c.config.Reattach
	h = handshake{version: rc.ProtocolVersion, addr: rc.Addr, protocol: cmp.Or(rc.Protocol, ProtocolNetRPC)}
	if c.sets[h.version] == nil && h.version == 0 && len(c.sets) == 1 {
		h.version = sortedKeys(c.sets)[0] // go-plugin's configs do not tell
	}
	defer func() {
		if err != nil && err != ErrProcessNotFound {
			err = fmt.Errorf("plugin: reattaching: %w", err)
		}
	}()
	if h.tls, err = c.accept(h, nil); err != nil {
		return handshake{}, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, rc.Addr.Network(), rc.Addr.String())
	switch {
	case ctx.Err() != nil:
		return handshake{}, contextError(ctx)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.Errno(10061)), errors.Is(err, fs.ErrNotExist): // 10061 on Windows
		return handshake{}, ErrProcessNotFound
	case err != nil: // says nothing about the plugin
		return handshake{}, err
	}
	_ = conn.Close()
	if rc.Test {
		return h, nil
	}
	find := rc.ReattachFunc
	if find == nil {
		find = func() (AttachedRunner, error) { return findProcess(rc, c.logger) }
	}
	p, err := find()
	if err == nil && p == nil {
		err = ErrProcessNotFound
	}
	if err != nil {
		return handshake{}, err
	}
	c.own(p)
	return h, nil
}

// Client starts the plugin, if it has not been started, and connects to it. Later calls
// return the same connection or error. The errors are those of [Client.StartContext]
// and those of connecting. After Kill, Client returns an error.
func (c *Client) Client() (ClientProtocol, error) {
	if _, err := c.Start(); err != nil {
		return nil, err
	}
	if c.life.Err() != nil {
		return nil, errKilled
	}
	ctx, cancel := context.WithTimeout(c.life, c.config.StartTimeout)
	defer cancel()
	rc, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	return rc, nil
}

func (c *Client) connect(ctx context.Context) (*RPCClient, error) {
	return c.connecting.do(ctx, func() (*RPCClient, error) {
		rc, err := c.dial(ctx)
		if err == nil {
			return rc, nil
		}
		if waitFor(drainTimeout, c.done) && c.Err() != nil {
			err = c.Err() // a plugin that has just died is the reason
		} else if ctx.Err() != nil {
			err = contextError(ctx)
		}
		return nil, fmt.Errorf("plugin %s: connecting: %w", c.name, err)
	})
}

func (c *Client) dial(ctx context.Context) (*RPCClient, error) {
	h := c.starting.result()
	conn, err := new(net.Dialer).DialContext(ctx, h.addr.Network(), h.addr.String())
	if err != nil {
		return nil, err
	}
	if h.tls != nil {
		secure := tls.Client(conn, h.tls)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			if err == io.EOF {
				err = errNotHeard
			}
			return nil, err
		}
		conn = secure
	}
	rc, err := newConnection(conn, c.sets[h.version], c.logger, c.whyLost)
	if err != nil {
		return nil, err
	}
	rc.flushes = h.flushes
	return rc, rc.SyncStreams(c.orLog(c.config.SyncStdout), c.orLog(c.config.SyncStderr))
}

// orLog returns w or, if w is nil, a writer that logs each line.
func (c *Client) orLog(w io.Writer) io.Writer {
	if w != nil {
		return w
	}
	return &lineWriter{max: c.config.PluginLogBufferSize, emit: func(line []byte, left int) {
		c.logger.Log(hclog.Debug, printable(string(line))+cutMark(left))
	}}
}

var errNotHeard = errors.New("the connection was closed during its handshake: does one side use TLS and the other not?")

// whyLost returns why the connection was lost. heard reports whether anything was
// received on it.
func (c *Client) whyLost(heard bool) error {
	timeout, why := lostTimeout, errors.New("the connection was lost, though the process lives")
	if !heard {
		timeout, why = drainTimeout, errNotHeard
	}
	if !c.testMode() && !c.wasAsked() && waitFor(timeout, c.done) && c.err != nil {
		return c.err
	}
	if c.wasAsked() {
		why = fmt.Errorf("Kill or Close ended the connection: %w", rpc.ErrShutdown)
	}
	return fmt.Errorf("plugin %s: %w", c.name, why)
}

// wasAsked reports whether this client has asked the plugin to quit, by Kill or by
// RPCClient.Close.
func (c *Client) wasAsked() bool {
	rc := c.connecting.result()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked || rc != nil && rc.session.isEnding()
}

// finish closes done; err is how the plugin ended.
func (c *Client) finish(err error) {
	if c.wasAsked() {
		err = nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !isClosed(c.done) {
		c.err = err
		managed.Delete(c)
		close(c.done)
	}
}

// Kill asks the plugin to quit and waits for it to exit. After ClientConfig.KillTimeout
// it kills the process. It returns at most about two seconds later. When it returns,
// the output of the plugin has been delivered. It is safe to call Kill more than once and
// at any time. It interrupts a Start that is running.
//
// A reattached plugin is killed only if ReattachConfig.Pid is certainly its process, or
// by ReattachConfig.ReattachFunc. In test mode, Kill does nothing.
func (c *Client) Kill() {
	if c.testMode() {
		return
	}
	c.end(errKilled)
	_, startErr := c.starting.do(context.Background(), func() (handshake, error) { return handshake{}, errKilled })
	c.mu.Lock()
	p := c.proc
	c.asked = c.asked || p != nil && !isClosed(c.gone)
	c.mu.Unlock()
	if p != nil {
		if startErr == nil && !isClosed(c.gone) {
			c.quit(p)
		}
		waitFor(reapTimeout, c.done)
	}
	c.abandon()
	if rc, err := c.connecting.do(context.Background(), func() (*RPCClient, error) { return nil, errKilled }); err == nil {
		rc.session.close()
	}
	c.finish(nil)
}

// quit ends a process that has started.
func (c *Client) quit(p AttachedRunner) {
	ctx, cancel := context.WithTimeout(context.Background(), c.config.KillTimeout)
	defer cancel()
	rc, err := c.connect(ctx)
	if err == nil {
		err = rc.quit(ctx)
	}
	switch {
	case err != nil && waitFor(drainTimeout/2, c.gone): // it was exiting
		return
	case err == nil:
		select {
		case <-c.gone:
			return
		case <-ctx.Done():
		}
	}
	c.logger.Warn("the plugin does not exit by itself and is killed", "pid", p.ID(), "error", err)
	go func() { _ = p.Kill(c.watching) }() // ends with watching, or when ReattachFunc's Kill returns
}

// Done returns a channel that is closed when the plugin has exited and its output has
// been delivered, when Start has failed, and when Kill has returned. In test mode it is
// never closed.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns an [*ExitError] if the plugin has exited and was not asked to. It returns
// nil until Done is closed.
func (c *Client) Err() error {
	if !isClosed(c.done) {
		return nil
	}
	return c.err
}

// Exited reports whether Done is closed. If a call failed because the plugin died,
// Exited is true when the call returns.
func (c *Client) Exited() bool { return isClosed(c.done) }

// ID returns the pid, or AttachedRunner.ID with ReattachConfig.ReattachFunc. It returns
// "" before Start and in test mode.
func (c *Client) ID() string {
	if p := c.process(); p != nil {
		return p.ID()
	}
	return ""
}

func (c *Client) process() AttachedRunner {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.proc
}

// Protocol starts the plugin, if it has not been started, and returns its protocol, or
// ProtocolInvalid if it does not start.
func (c *Client) Protocol() Protocol {
	_, _ = c.Start()
	return c.starting.result().protocol
}

// NegotiatedVersion returns the protocol version that both sides use, or 0 before Start.
func (c *Client) NegotiatedVersion() int { return c.starting.result().version }

// ReattachConfig returns the configuration with which another host can use the plugin,
// or nil before Start. It detaches the plugin, as ClientConfig.Detach does; on Windows,
// only Detach does. To get the pid without detaching, use ID.
func (c *Client) ReattachConfig() *ReattachConfig {
	h := c.starting.result()
	if h.addr == nil {
		return nil
	}
	if c.config.Reattach != nil {
		same := *c.config.Reattach
		return &same
	}
	p := c.process().(*child)
	p.detach()
	return &ReattachConfig{Protocol: h.protocol, ProtocolVersion: h.version, Addr: h.addr, Pid: p.cmd.Process.Pid}
}
