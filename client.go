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
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	defaultStartTimeout  = time.Minute
	defaultKillTimeout   = 2 * time.Second
	defaultLogBufferSize = 64 << 10

	lostTimeout  = 3 * time.Second        // how long a process may outlive its connection before the error says so
	reapTimeout  = 900 * time.Millisecond // how long Kill waits for what it has killed
	drainTimeout = 500 * time.Millisecond // how long output is read after the process has exited
)

// ClientConfig describes a plugin to a host. NewClient copies it, and nothing
// in it is changed but Cmd.Process and Cmd.ProcessState, so that one
// ClientConfig can be used again to start the plugin again. Either Cmd or
// Reattach must be set.
type ClientConfig struct {
	// HandshakeConfig must be the plugin's.
	HandshakeConfig

	// Plugins are the plugins that can be dispensed where
	// HandshakeConfig.ProtocolVersion is negotiated.
	Plugins PluginSet

	// VersionedPlugins are the plugins that can be dispensed by the protocol
	// version that is negotiated: the highest that both sides have. A version
	// that is also HandshakeConfig.ProtocolVersion has these and not Plugins.
	VersionedPlugins map[int]PluginSet

	// Cmd is the command that starts the plugin. A copy of it is started.
	// Cmd.Stdin is os.Stdin if nil. Cmd.Stdout and Cmd.Stderr must be nil: see
	// SyncStdout, SyncStderr and Stderr. In the environment, the variables of
	// the handshake win over Cmd.Env, and those over the host's own.
	Cmd *exec.Cmd

	// Reattach describes a plugin that runs already.
	Reattach *ReattachConfig

	// SecureConfig, if not nil, is what the binary must be.
	SecureConfig *SecureConfig

	// TLSConfig, if not nil, is used on the connection. The plugin needs a
	// ServeConfig.TLSProvider that goes with it.
	TLSConfig *tls.Config

	// Managed makes CleanupClients kill the plugin.
	Managed bool

	// MinPort and MaxPort are the TCP ports of the loopback interface among
	// which a plugin picks one on Windows. If MaxPort is zero, any free one is
	// taken. Any local user can connect to it: see AutoMTLS. Elsewhere plugins
	// use Unix sockets.
	MinPort, MaxPort uint

	// StartTimeout is how long the plugin may take until its handshake, and
	// again until there is a connection. Zero or less means one minute.
	StartTimeout time.Duration

	// KillTimeout is how long Kill gives the plugin to end by itself before it
	// is killed. Zero or less means two seconds.
	KillTimeout time.Duration

	// Stderr, if not nil, gets the bytes that the process writes to its
	// stderr, which also go to Logger, line by line.
	Stderr io.Writer

	// SyncStdout and SyncStderr get what the plugin writes to os.Stdout and
	// os.Stderr while it serves. Where one is nil, the lines go to Logger at
	// Debug; io.Discard drops them.
	SyncStdout io.Writer
	SyncStderr io.Writer

	// AllowedProtocols are the protocols that the plugin may speak. Nil means
	// ProtocolNetRPC, which is the only one that works.
	AllowedProtocols []Protocol

	// Logger gets what the plugin logs, under the name of its binary, and what
	// this library logs. Nil means hclog.Default() named "plugin".
	Logger hclog.Logger

	// PluginLogBufferSize is where a longer line of the plugin's output is cut
	// before it is logged, in bytes. Zero or less means 64 KiB.
	PluginLogBufferSize int

	// AutoMTLS encrypts the connection, with certificates that are made for
	// this start, so that nobody but this host can connect and nobody but the
	// plugin can answer. Without it, on Windows any local user can call the
	// plugin. The plugin needs no setting. TLSConfig is ignored then, and
	// Reattach is not possible.
	AutoMTLS bool

	// SkipHostEnv keeps the host's environment from the plugin: it gets Cmd.Env
	// and the handshake.
	SkipHostEnv bool

	// UnixSocketConfig says where the plugin's socket is made and who may
	// connect. Nil means the directory for temporary files, and this user. On
	// Windows, where there is no socket, it is ignored.
	UnixSocketConfig *UnixSocketConfig

	// Detach lets the plugin live on when the host ends without having killed
	// it, so that another host can reattach. Calling ReattachConfig does so,
	// too, but not on Windows. Otherwise the plugin ends with its host.
	Detach bool
}

// validate says what is wrong with a configuration.
func (c *ClientConfig) validate() error {
	switch {
	case c.SecureConfig != nil && c.Reattach != nil:
		return ErrSecureConfigAndReattach
	case (c.Cmd == nil) == (c.Reattach == nil):
		return errors.New("plugin: exactly one of ClientConfig.Cmd and ClientConfig.Reattach must be set")
	case c.MinPort > c.MaxPort:
		return fmt.Errorf("plugin: ClientConfig.MinPort, %d, is above MaxPort, %d", c.MinPort, c.MaxPort)
	case c.Reattach != nil && c.AutoMTLS:
		return errors.New("plugin: ClientConfig.AutoMTLS cannot be used with Reattach: only the host that started the plugin has the certificates")
	case c.Reattach != nil && c.Reattach.Addr == nil:
		return errors.New("plugin: ReattachConfig has no Addr")
	case c.Reattach != nil:
		return nil
	case c.MagicCookieKey == "" || c.MagicCookieValue == "":
		return errors.New("plugin: ClientConfig has no magic cookie: set HandshakeConfig.MagicCookieKey and MagicCookieValue")
	case c.Cmd.Stdout != nil || c.Cmd.Stderr != nil:
		return errors.New("plugin: ClientConfig.Cmd has Stdout or Stderr set: the plugin needs them to report to its host; see SyncStdout and Stderr")
	}
	return nil
}

// Client is a plugin as its host has it: it starts the process, connects to
// it, and ends it. Use one for each process. All methods may be called
// concurrently.
type Client struct {
	config ClientConfig
	name   string // of the plugin, for errors
	sets   map[int]PluginSet
	logger hclog.Logger

	life       context.Context // ends when Kill is called
	end        context.CancelCauseFunc
	watching   context.Context // ends when Kill has stopped waiting for the process
	abandon    context.CancelFunc
	starting   *once[ready]
	connecting *once[*RPCClient]
	gone       chan struct{} // closed when the process has ended
	done       chan struct{} // closed when its output has been delivered as well

	mu    sync.Mutex // guards the fields below, and closing done
	proc  AttachedRunner
	asked bool  // this client has ended the plugin
	err   error // how the plugin ended, if not asked to; constant once done is closed
}

// ready is what is known of a plugin that can be connected to.
type ready struct {
	handshake
	tls *tls.Config // nil for none
}

var errKilled = errors.New("plugin: Kill was called")

// managed has the clients that CleanupClients kills, as keys.
var managed sync.Map

// CleanupClients kills all plugins whose ClientConfig has Managed set, at
// once, and returns when all are gone: call it before the host exits.
func CleanupClients() {
	var killing sync.WaitGroup
	for c := range managed.Range {
		killing.Go(c.(*Client).Kill)
	}
	killing.Wait()
}

// NewClient returns a client for a plugin that it does not start yet: see
// Start, and Client, which starts it, too. What is wrong with config is said
// there. When the plugin is no longer needed, call Kill, or CleanupClients if
// config has Managed set.
func NewClient(config *ClientConfig) *Client {
	c := &Client{
		config: *config, starting: newOnce[ready](), connecting: newOnce[*RPCClient](),
		gone: make(chan struct{}), done: make(chan struct{}),
	}
	cfg := &c.config
	c.sets = allVersions(cfg.ProtocolVersion, cfg.Plugins, cfg.VersionedPlugins)
	cfg.StartTimeout = cmp.Or(max(cfg.StartTimeout, 0), defaultStartTimeout)
	cfg.KillTimeout = cmp.Or(max(cfg.KillTimeout, 0), defaultKillTimeout)
	cfg.PluginLogBufferSize = cmp.Or(max(cfg.PluginLogBufferSize, 0), defaultLogBufferSize)
	if cfg.AllowedProtocols == nil {
		cfg.AllowedProtocols = []Protocol{ProtocolNetRPC}
	}
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

// Start is [Client.StartContext] without a context of its own.
func (c *Client) Start() (net.Addr, error) { return c.StartContext(context.Background()) }

// StartContext starts the plugin, or finds the one to reattach to, and returns
// its address when it is ready. If ctx ends before, or Kill is called, the
// plugin is not started. Calling it again returns the same result, also an
// error; to try again, make a new client.
//
// A plugin that does not start is a [*StartError]; if the versions do not
// match, errors.As finds a [*VersionError] in it. [ErrProcessNotFound],
// [ErrChecksumsDoNotMatch], [ErrSecureConfigNoChecksum],
// [ErrSecureConfigNoHash] and [ErrSecureConfigAndReattach] are returned as
// they are.
func (c *Client) StartContext(ctx context.Context) (net.Addr, error) {
	r, err := c.starting.do(ctx, func() (ready, error) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(c.life, func() { cancel(errKilled) })()
		r, err := c.start(ctx)
		if err != nil {
			c.finish(nil)
		}
		return r, err
	})
	return r.addr, err
}

func (c *Client) start(ctx context.Context) (r ready, err error) {
	if c.life.Err() != nil {
		return r, errKilled
	}
	if err := c.config.validate(); err != nil {
		return r, err
	}
	if c.config.Reattach != nil {
		return c.reattach(ctx)
	}
	failed := &StartError{Path: c.config.Cmd.Path}
	p, err := launch(&c.config, c.logger, versionList(c.sets))
	if err == nil {
		c.own(p)
		var h handshake
		if h, err = p.awaitHandshake(ctx, c.config.StartTimeout); err == nil {
			r, err = c.accept(h, p)
		}
		if err == nil {
			return r, nil
		}
		if err != errNoHandshake {
			_ = p.Kill(ctx)
		}
		if waitFor(reapTimeout, c.gone) && err == errNoHandshake {
			failed.State = p.cmd.ProcessState
		}
		failed.Stdout, failed.Stderr = p.noise.String(), p.log.tail.String()
	}
	switch err {
	case ErrSecureConfigNoChecksum, ErrSecureConfigNoHash, ErrChecksumsDoNotMatch:
		return ready{}, err
	}
	failed.Err = err
	failed.hint = startHint(failed, &c.config)
	return ready{}, failed
}

// own makes p the client's process and watches it.
func (c *Client) own(p AttachedRunner) {
	c.mu.Lock()
	c.proc = p
	c.mu.Unlock()
	c.logger.Debug("started", "pid", p.ID())
	go c.watch(p) // ends with the process, or when Kill stops waiting for it
}

// watch waits for the end of the process and of its output.
func (c *Client) watch(p AttachedRunner) {
	err := p.Wait(c.watching)
	close(c.gone)
	<-c.starting.done
	if rc := c.connecting.result(); rc != nil {
		ctx, cancel := context.WithTimeout(context.Background(), drainTimeout/2)
		rc.waitOutput(ctx)
		cancel()
	}
	var exit *ExitError
	if !errors.As(err, &exit) {
		exit = &ExitError{Path: c.name, Err: err}
	}
	level := hclog.Error
	switch {
	case c.wasAsked() || c.starting.err != nil:
		level = hclog.Debug
	case exit.State != nil && exit.State.Success():
		level = hclog.Info
	}
	c.logger.Log(level, "the process has ended", "plugin", c.name, "pid", p.ID(), "reason", exit)
	c.finish(exit)
}

// accept says whether this host can use a plugin with that handshake, and how.
func (c *Client) accept(h handshake, p *child) (r ready, err error) {
	if h.protocol == ProtocolGRPC {
		return r, errors.New("it speaks gRPC, and this library speaks net/rpc alone: the plugin must be served with this library, or with the net/rpc half of go-plugin")
	}
	if h.protocol != ProtocolNetRPC || !slices.Contains(c.config.AllowedProtocols, h.protocol) {
		return r, fmt.Errorf("it speaks the protocol %q, and this host allows %q", h.protocol, c.config.AllowedProtocols)
	}
	if _, known := c.sets[h.version]; !known {
		return r, &VersionError{Plugin: h.version, Host: sortedKeys(c.sets)}
	}
	r = ready{h, c.config.TLSConfig}
	if c.config.AutoMTLS {
		if len(h.cert) == 0 {
			return r, errors.New("it has not answered with a certificate, as AutoMTLS needs: was it served with a ServeConfig.TLSProvider?")
		}
		cert, err := x509.ParseCertificate(h.cert)
		if err != nil {
			return r, fmt.Errorf("its certificate cannot be read: %w", err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(cert)
		r.tls = mutualTLS(p.cert, pool)
	}
	return r, nil
}

// reattach finds the plugin that runs already.
func (c *Client) reattach(ctx context.Context) (r ready, err error) {
	rc := c.config.Reattach
	h := handshake{version: rc.ProtocolVersion, addr: rc.Addr, protocol: cmp.Or(rc.Protocol, ProtocolNetRPC)}
	if c.sets[h.version] == nil && h.version == 0 && len(c.sets) == 1 {
		h.version = sortedKeys(c.sets)[0] // go-plugin's configs do not tell
	}
	defer func() {
		if err != nil && err != ErrProcessNotFound {
			err = fmt.Errorf("plugin: reattaching: %w", err)
		}
	}()
	if r, err = c.accept(h, nil); err != nil {
		return ready{}, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, rc.Addr.Network(), rc.Addr.String())
	switch {
	case ctx.Err() != nil:
		return ready{}, contextError(ctx)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return ready{}, ErrProcessNotFound
	case err != nil: // says nothing about the plugin
		return ready{}, err
	}
	_ = conn.Close()
	if rc.Test {
		return r, nil
	}
	find := rc.ReattachFunc
	if find == nil {
		find = func() (AttachedRunner, error) { return findProcess(rc, c.logger) }
	}
	p, err := find()
	if err != nil {
		return ready{}, err
	}
	c.own(p)
	return r, nil
}

// Client starts the plugin, if that has not been done, and connects to it. It
// returns the same connection, or error, every time. The errors are those of
// Start, and why there is no connection. After Kill it returns an error.
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
	r := c.starting.result()
	conn, err := new(net.Dialer).DialContext(ctx, r.addr.Network(), r.addr.String())
	if err != nil {
		return nil, err
	}
	if r.tls != nil {
		secure := tls.Client(conn, r.tls)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			if err == io.EOF {
				err = errNotHeard
			}
			return nil, err
		}
		conn = secure
	}
	rc, err := newConnection(conn, c.sets[r.version], c.logger, c.whyLost)
	if err != nil {
		return nil, err
	}
	rc.flushes = r.flushes
	return rc, rc.SyncStreams(c.orLog(c.config.SyncStdout), c.orLog(c.config.SyncStderr))
}

// orLog returns w, or a writer that logs each line.
func (c *Client) orLog(w io.Writer) io.Writer {
	if w != nil {
		return w
	}
	return &lineWriter{max: c.config.PluginLogBufferSize, emit: func(line []byte, left int) {
		c.logger.Log(hclog.Debug, printable(string(line))+cutMark(left))
	}}
}

var errNotHeard = errors.New("the connection was closed during its handshake: does one side use TLS and the other not?")

// whyLost says why the connection was lost. heard tells whether anything had
// been received on it.
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

// wasAsked reports whether this client has ended the plugin: by itself, or by
// closing the connection, which asks the plugin to quit.
func (c *Client) wasAsked() bool {
	rc := c.connecting.result()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked || rc != nil && rc.session.ending.Load()
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

// Kill asks the plugin to quit and waits until its process is gone, which it
// forces after ClientConfig.KillTimeout. All that the plugin wrote before has
// been delivered then. It returns about two seconds after KillTimeout at the
// latest, may be called at any time, also while Start runs, which it
// interrupts, and more than once.
//
// A plugin that was reattached to is killed only if its process is surely that
// of the plugin, and so never on Windows, unless ReattachConfig.ReattachFunc
// is set. In test mode Kill does nothing.
func (c *Client) Kill() {
	if c.testMode() {
		return
	}
	c.end(errKilled)
	_, startErr := c.starting.do(context.Background(), func() (ready, error) { return ready{}, errKilled })
	c.mu.Lock()
	p := c.proc
	c.asked = c.asked || p != nil && !isClosed(c.gone) // and not dead already
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
	go func() { _ = p.Kill(c.watching) }() // the caller's, with ReattachFunc: nothing waits for it
}

// Done is closed when the plugin has ended and all of its output has been
// delivered; also when it could not be started, and when Kill has returned. A
// plugin in test mode is not watched, and Done is never closed.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns how the plugin ended: nil until Done is closed, nil if this
// client has ended it, and otherwise an [*ExitError].
func (c *Client) Err() error {
	if !isClosed(c.done) {
		return nil
	}
	return c.err
}

// Exited reports whether Done is closed.
func (c *Client) Exited() bool { return isClosed(c.done) }

// ID returns the process's id, or "" before Start and in test mode.
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

// Protocol starts the plugin, if that has not been done, and returns what it
// speaks, or ProtocolInvalid if it does not start.
func (c *Client) Protocol() Protocol {
	if _, err := c.Start(); err != nil {
		return ProtocolInvalid
	}
	return c.starting.result().protocol
}

// NegotiatedVersion returns the protocol version that both sides have agreed
// on, or 0 before Start.
func (c *Client) NegotiatedVersion() int { return c.starting.result().version }

// ReattachConfig returns what another host needs to use the plugin, or nil
// before Start. A plugin that this client has started is detached by it: it
// lives on when this host ends without having killed it. (On Windows only
// ClientConfig.Detach does that.) To learn the pid without that, use ID.
func (c *Client) ReattachConfig() *ReattachConfig {
	r := c.starting.result()
	if r.addr == nil {
		return nil
	}
	if c.config.Reattach != nil {
		same := *c.config.Reattach
		return &same
	}
	p := c.process().(*child)
	p.detach()
	return &ReattachConfig{Protocol: r.protocol, ProtocolVersion: r.version, Addr: r.addr, Pid: p.cmd.Process.Pid}
}
