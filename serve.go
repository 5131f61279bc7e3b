package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/hashicorp/go-hclog"
)

// This file is about the plugin's side: Serve, from the variables of the host to the end.

// ServeConfig describes a plugin to its host.
type ServeConfig struct {
	// HandshakeConfig must be that of the host.
	HandshakeConfig

	// TLSProvider, if not nil, returns the configuration of the connection. The
	// host needs a matching ClientConfig.TLSConfig. TLSProvider disables
	// ClientConfig.AutoMTLS, which needs nothing in the plugin. If it returns an
	// error, Serve fails.
	TLSProvider func() (*tls.Config, error)

	// Plugins are the plugins of version HandshakeConfig.ProtocolVersion.
	Plugins PluginSet

	// VersionedPlugins are the plugins of each protocol version. The highest
	// version that both sides have is used, or the lowest if the host does not
	// send its versions. If it has HandshakeConfig.ProtocolVersion, Plugins is
	// ignored.
	VersionedPlugins map[int]PluginSet

	// Logger logs for this library. The default logs JSON to stderr, for the
	// Logger of the host; in test mode, it is hclog.Default() named "plugin".
	Logger hclog.Logger

	// Test, if not nil, makes Serve run in test mode.
	Test *ServeTestConfig
}

// ServeTestConfig configures the test mode of [Serve], in which a plugin runs in the
// process of a test or a debugger, and a host in any process reattaches to it. Serve does
// not check the cookie, and does not change the environment or the handling of signals.
type ServeTestConfig struct {
	// Context makes Serve return when it ends. The default is
	// context.Background().
	Context context.Context

	// ReattachConfigCh, if not nil, gets the configuration for the host. Serve
	// accepts connections when it has been received.
	ReattachConfigCh chan<- *ReattachConfig

	// CloseCh, if not nil, is closed when Serve returns.
	CloseCh chan<- struct{}

	// SyncStdio sends the output of the process to the host too. Serve replaces
	// os.Stdout and os.Stderr while it runs.
	SyncStdio bool
}

// Serve serves plugins to the host that started this process. The main function of a
// plugin calls it, once. Serve returns when the host asks the plugin to quit, when the host
// is gone, and on SIGTERM and SIGHUP, even if they are sent to the process group of the
// host. (Under nohup, SIGHUP does nothing.) Then main should return. [Client.Kill] kills the
// process after ClientConfig.KillTimeout. If the host is gone, the process ends at most 1.5
// seconds later; if it is stopped, it ends when it is continued. After SIGTERM, SIGHUP or
// [RPCClient.Close], main has no time limit. SIGINT is left to the host.
//
// While Serve runs, output to os.Stdout and os.Stderr goes to the host; outside Serve, they
// behave normally. On Unix, the host normally receives everything, even after a crash;
// ClientConfig.SyncStdout lists the exceptions. Serve removes the variables of the handshake
// from the environment, so that child processes do not inherit them.
//
// If the process was not started by a host, or Serve fails for another reason, it prints
// the reason to stderr and exits with status 1. In test mode, it logs the reason and
// returns.
func Serve(config *ServeConfig) {
	if config.Test != nil {
		serveTest(config)
		return
	}
	if err := serve(config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// ServeMuxMap maps names to the plugins of one binary.
type ServeMuxMap map[string]*ServeConfig

// ServeMux calls [Serve] for the plugin that the only argument of the command names. If
// there is none, it prints the names to stderr and exits with status 1.
func ServeMux(m ServeMuxMap) {
	if len(os.Args) == 2 {
		if config := m[os.Args[1]]; config != nil {
			Serve(config)
			return
		}
	}
	fmt.Fprintf(os.Stderr, "This program is a plugin. Its host starts it %s: %s.\n",
		withOneArgument, nameList(m))
	os.Exit(1)
}

// serve is Serve outside test mode. Its error is for a person.
func serve(config *ServeConfig) error {
	if err := checkCookie(&config.HandshakeConfig); err != nil {
		return err
	}
	env := takeEnvironment(config.MagicCookieKey)
	logger := config.Logger
	if logger == nil {
		logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true})
	}
	terminate := catchSignals()
	info := parseHostInfo(env[envHost])
	hostIsParent := info.isParent()
	watch := watchHost(info, env[EnvUnixSocketDir], logger)
	pipes := watch.takePipes(hostIsParent)

	s, err := newServing(config, env, logger)
	if err != nil {
		return err
	}
	// The parent has set envHost, so it uses this library. Another host might misread the
	// seventh field of the handshake.
	s.handshake.sameLibrary = hostIsParent
	err = s.run(terminate, watch, pipes)
	s.close()
	if watch.shouldRemoveDir(hostIsParent) {
		removePrivate(env[EnvUnixSocketDir])
	}
	// The signal that ended the host may reach this process later, and main should finish.
	if !isClosed(watch.gone) {
		signal.Stop(terminate)
	}
	return err
}

func checkCookie(config *HandshakeConfig) error {
	if config.MagicCookieKey == "" || config.MagicCookieValue == "" {
		return errors.New("plugin: ServeConfig has no magic cookie: " +
			"set HandshakeConfig.MagicCookieKey and MagicCookieValue")
	}
	if os.Getenv(config.MagicCookieKey) != config.MagicCookieValue {
		return errors.New("this program " + isPlugin + ": " +
			"it is started by its host, the program that uses it, and does nothing by itself")
	}
	return nil
}

// catchSignals returns a channel that receives the signals that end the plugin. It catches
// SIGINT and SIGPIPE in a channel that is never read, so that they do nothing, even after
// Serve: main should finish, even if it writes to a pipe that is closed. To ignore them
// would not do, because child processes inherit that.
func catchSignals() chan os.Signal {
	unread := make(chan os.Signal, 1)
	signal.Notify(unread, os.Interrupt, syscall.SIGPIPE)
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(terminate, syscall.SIGHUP)
	}
	return terminate
}

// serveTest is Serve in test mode.
func serveTest(config *ServeConfig) {
	test := config.Test
	if test.CloseCh != nil {
		defer close(test.CloseCh)
	}
	logger := config.Logger
	if logger == nil {
		logger = hclog.Default().Named("plugin")
	}
	env := map[string]string{EnvUnixSocketDir: os.Getenv(EnvUnixSocketDir)}
	s, err := newServing(config, env, logger)
	if err == nil {
		err = s.runTest(test)
		s.close()
		s.server.connections.Wait() // the process goes on, and nothing of Serve should
	}
	if err != nil {
		logger.Error("the plugin cannot serve", "error", err)
	}
}

// serving is the state of a Serve that runs: newServing listens, run or runTest serves
// until the plugin should end, and close ends what both have begun.
type serving struct {
	server    *RPCServer
	listener  net.Listener
	handshake handshake
	quit      chan struct{} // closed when a host has asked the plugin to quit
	failed    chan error    // receives why no connection can be accepted, or nil after close
	capture   *capture      // of the output; nil if it is not captured
}

// newServing chooses the version and listens, as the variables of the host say.
func newServing(config *ServeConfig, env map[string]string, logger hclog.Logger) (*serving, error) {
	sets := allVersions(config.ProtocolVersion, config.Plugins, config.VersionedPlugins)
	maps.DeleteFunc(sets, func(_ int, set PluginSet) bool { return len(set) == 0 })
	if len(sets) == 0 {
		return nil, errors.New("plugin: ServeConfig has no plugins: set Plugins or VersionedPlugins")
	}
	version := negotiate(sets, env[envVersions])
	secure, cert, err := serverTLS(config, env[envClientCert])
	if err != nil {
		return nil, cannotServe(err)
	}
	listener, err := listen(env)
	if err != nil {
		return nil, cannotServe(err)
	}
	if secure != nil {
		listener = tls.NewListener(listener, secure)
	}
	quit := make(chan struct{})
	return &serving{
		server:    &RPCServer{Plugins: sets[version], DoneCh: quit, logger: logger},
		listener:  listener,
		handshake: handshake{version: version, addr: listener.Addr(), protocol: ProtocolNetRPC, cert: cert},
		quit:      quit,
		failed:    make(chan error, 1),
	}, nil
}

func cannotServe(err error) error { return fmt.Errorf("plugin: cannot serve: %w", err) }

// serverTLS returns the configuration of the connection, or nil if it is not encrypted.
// With AutoMTLS, it also returns the plugin's certificate.
func serverTLS(config *ServeConfig, hostCert string) (secure *tls.Config, cert []byte, err error) {
	if config.TLSProvider != nil {
		secure, err = config.TLSProvider()
		if err != nil {
			return nil, nil, fmt.Errorf("ServeConfig.TLSProvider: %w", err)
		}
	}
	if secure != nil || hostCert == "" {
		return secure, nil, nil
	}
	secure, cert, err = answerMutualTLS(hostCert)
	if err != nil {
		return nil, nil, fmt.Errorf("AutoMTLS: %w", err)
	}
	return secure, cert, nil
}

// run serves until the host has asked the plugin to quit, a signal has come, or the host
// is gone. Output goes to the pipes of the host, if there are any.
func (s *serving) run(terminate <-chan os.Signal, watch *hostWatch, pipes [2]*os.File) error {
	stdout := os.Stdout
	if err := s.captureOutput(io.Discard, io.Discard, pipes, canReplace); err != nil {
		return err
	}
	if _, err := io.WriteString(stdout, s.handshake.String()+"\n"); err != nil {
		gone := waitFor(orphanTimeout/2, watch.gone)
		if gone {
			return nil // it needs no handshake
		}
		return fmt.Errorf("plugin: the handshake could not be written: %w", err)
	}
	s.accept()
	detached := watch.detached
	for {
		select {
		case <-s.quit:
			return nil
		case <-terminate:
			return nil
		case <-watch.gone:
			return nil
		case err := <-s.failed:
			return err
		case <-detached:
			s.capture.leavePipes()
			detached = nil
		}
	}
}

// runTest serves until a host has asked the plugin to quit, or the test ends.
func (s *serving) runTest(test *ServeTestConfig) error {
	ctx := test.Context
	if ctx == nil {
		ctx = context.Background()
	}
	if test.SyncStdio {
		// Tests expect the variables back, and Serve may run many times.
		if err := s.captureOutput(os.Stdout, os.Stderr, [2]*os.File{}, false); err != nil {
			return err
		}
	}
	if test.ReattachConfigCh != nil {
		reattach := &ReattachConfig{
			Protocol:        s.handshake.protocol,
			ProtocolVersion: s.handshake.version,
			Addr:            s.handshake.addr,
			Pid:             os.Getpid(),
			Test:            true,
		}
		select {
		case test.ReattachConfigCh <- reattach:
		case <-ctx.Done():
			return nil
		}
	}
	s.accept()
	select {
	case <-s.quit:
	case <-ctx.Done():
	case err := <-s.failed:
		return err
	}
	return nil
}

// accept starts to accept connections.
func (s *serving) accept() {
	// Ends when close closes the listener.
	s.server.connections.Go(func() { s.failed <- s.server.acceptConnections(s.listener) })
}

// close sends the rest of the output, restores os.Stdout and os.Stderr, and ends the
// connections. It does not wait for them: the process is about to exit, or serveTest waits.
func (s *serving) close() {
	_ = s.listener.Close() // it is not needed any more
	s.server.windDown()
	s.server.endConns()
	if s.capture != nil {
		_ = s.capture.readers[0].Close() // what is left in it is dropped
		_ = s.capture.readers[1].Close()
	}
}

// captureOutput brings the output of the process to the host. What it sends over
// connections, it also copies to the writers. keepsFiles is that of the capture.
func (s *serving) captureOutput(stdout, stderr io.Writer, pipes [2]*os.File, keepsFiles bool) (err error) {
	s.capture, err = newCapture(pipes, keepsFiles)
	if err != nil {
		return cannotServe(err)
	}
	s.server.Stdout = io.TeeReader(s.capture.readers[0], stdout)
	s.server.Stderr = io.TeeReader(s.capture.readers[1], stderr)
	s.server.endOutput = s.capture.restore
	return nil
}

// capture puts pipes in the place of os.Stdout and os.Stderr: those that the host reads, or
// its own, whose output is sent over connections.
type capture struct {
	process          [2]*os.File // stdout and stderr outside Serve
	hostPipes        [2]*os.File // those that the host reads; nil if there are none
	readers, writers [2]*os.File // of its own pipes
	files            [2]*os.File // os.Stdout and os.Stderr within Serve: hostPipes, or else writers

	// If keepsFiles, restore leaves the variables os.Stdout and os.Stderr as they are within
	// Serve: methods that run may read them, and the program may have copied them. Then it
	// changes only where their descriptors lead.
	keepsFiles bool

	mu       sync.Mutex // guards restored, and the descriptors of hostPipes
	restored bool
}

func newCapture(hostPipes [2]*os.File, keepsFiles bool) (c *capture, err error) {
	c = &capture{
		process:    [2]*os.File{os.Stdout, os.Stderr},
		hostPipes:  hostPipes,
		keepsFiles: keepsFiles,
	}
	for i := range c.readers {
		c.readers[i], c.writers[i], err = os.Pipe()
		if err != nil {
			return nil, err
		}
		// Fd makes Writes block in the system: one that waits in the poller of the runtime
		// would not be woken when the descriptor has been replaced.
		_ = c.writers[i].Fd()
	}
	c.files = c.writers
	if hostPipes[0] != nil {
		c.files = hostPipes
	}
	os.Stdout, os.Stderr = c.files[0], c.files[1]
	return c, nil
}

// leavePipes changes from the pipes of the host, which may exit, to the others.
func (c *capture) leavePipes() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.restored {
		replace(c.hostPipes[0], c.writers[0])
		replace(c.hostPipes[1], c.writers[1])
	}
}

// restore sends output to stdout and stderr of the process again. So the pipes reach their end.
func (c *capture) restore() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restored = true
	if !c.keepsFiles {
		os.Stdout, os.Stderr = c.process[0], c.process[1]
	}
	for i, w := range c.writers {
		if c.keepsFiles {
			replace(c.files[i], c.process[i])
		}
		// With keepsFiles and without pipes of the host, os.Stdout is still w, which replace
		// has led to the stdout of the process: it must stay open. In all other cases, w is
		// the end of a pipe that nobody needs any more.
		if c.files[i] != w || !c.keepsFiles {
			_ = w.Close() // nothing is buffered in it
		}
	}
}
