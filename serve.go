package plugin

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"

	"github.com/hashicorp/go-hclog"
)

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
// is gone, and on SIGTERM and SIGHUP. Then main should return: the process is ended after
// ClientConfig.KillTimeout, or after 1.5 seconds if the host is gone. SIGINT is left to the
// host.
//
// While Serve runs, output to os.Stdout and os.Stderr goes to the host; outside Serve, they
// behave normally. Serve removes the variables of the handshake from the environment, so
// that child processes do not inherit them.
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

// ServeMuxMap has the plugins of one binary by their names.
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
	fmt.Fprintf(os.Stderr, "This program is a plugin. It is started by its host, with one argument: %s.\n", nameList(m))
	os.Exit(1)
}

// serve is Serve outside test mode. Its error is for a person.
func serve(config *ServeConfig) error {
	if config.MagicCookieKey == "" || config.MagicCookieValue == "" {
		return errors.New("plugin: ServeConfig has no magic cookie: set HandshakeConfig.MagicCookieKey and MagicCookieValue")
	}
	if os.Getenv(config.MagicCookieKey) != config.MagicCookieValue {
		return errors.New("this program is a plugin: it is started by its host, the program that uses it, and does nothing by itself")
	}
	env := takeEnvironment(config.MagicCookieKey)
	stdout := os.Stdout
	logger := config.Logger
	if logger == nil {
		logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true})
	}

	// Signals are caught and not ignored, because child processes inherit the
	// latter. SIGINT and SIGPIPE stay so after Serve: main should finish, even if
	// it writes to a pipe that is closed.
	terminate := make(chan os.Signal, 1)
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGPIPE)
	signal.Notify(terminate, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(terminate, syscall.SIGHUP)
	}
	host := parseHostInfo(env[envHost])
	orphaned := watchHost(host, env[EnvUnixSocketDir])
	defer func() {
		// The signal that ended the host may reach this process later.
		if !isClosed(orphaned) {
			signal.Stop(terminate)
		}
	}()

	s, err := newServing(config, env, logger)
	if err != nil {
		return err
	}
	s.handshake.flushes = host.pid == os.Getppid() // and not a host further up
	defer func() {
		s.close()
		if s.handshake.flushes || isClosed(orphaned) || host.pid != 0 && !alive(host.pid) {
			removePrivate(env[EnvUnixSocketDir]) // the host may be gone
		}
	}()
	if err := s.capture(io.Discard, io.Discard); err != nil {
		return err
	}
	if _, err := io.WriteString(stdout, s.handshake.String()+"\n"); err != nil {
		if waitFor(orphanTimeout/2, orphaned) {
			return nil // the host is gone
		}
		return fmt.Errorf("plugin: the handshake could not be written: %w", err)
	}
	s.serve()
	select {
	case <-s.quit:
	case <-terminate:
	case <-orphaned:
	}
	return nil
}

// serveTest is Serve in test mode.
func serveTest(config *ServeConfig) {
	test := config.Test
	if test.CloseCh != nil {
		defer close(test.CloseCh)
	}
	ctx := cmp.Or(test.Context, context.Background())
	logger := config.Logger
	if logger == nil {
		logger = hclog.Default().Named("plugin")
	}
	env := map[string]string{EnvUnixSocketDir: os.Getenv(EnvUnixSocketDir)}
	s, err := newServing(config, env, logger)
	if err == nil {
		defer s.server.serving.Wait()
		defer s.close()
		if test.SyncStdio {
			err = s.capture(os.Stdout, os.Stderr)
		}
	}
	if err != nil {
		logger.Error("the plugin cannot serve", "error", err)
		return
	}
	if test.ReattachConfigCh != nil {
		h := s.handshake
		select {
		case test.ReattachConfigCh <- &ReattachConfig{Protocol: h.protocol, ProtocolVersion: h.version, Addr: h.addr, Pid: os.Getpid(), Test: true}:
		case <-ctx.Done():
			return
		}
	}
	s.serve()
	select {
	case <-s.quit:
	case <-ctx.Done():
	}
}

// serving is the state of a Serve that runs.
type serving struct {
	server    *RPCServer
	listener  net.Listener
	handshake handshake
	quit      chan struct{} // closed when a host has asked the plugin to quit
	dir       string        // of the socket, if it has to be removed

	restore func()      // restores os.Stdout and os.Stderr
	output  [2]*os.File // what is written to them
}

// newServing listens as the variables of the host say.
func newServing(config *ServeConfig, env map[string]string, logger hclog.Logger) (_ *serving, err error) {
	sets := allVersions(config.ProtocolVersion, config.Plugins, config.VersionedPlugins)
	maps.DeleteFunc(sets, func(_ int, set PluginSet) bool { return len(set) == 0 })
	if len(sets) == 0 {
		return nil, errors.New("plugin: ServeConfig has no plugins: set Plugins or VersionedPlugins")
	}
	s := &serving{quit: make(chan struct{}), restore: func() {}}
	defer func() {
		if err != nil {
			err = cannotServe(err)
			s.unlisten()
		}
	}()
	h := handshake{version: negotiate(sets, env[envVersions]), protocol: ProtocolNetRPC}
	var secure *tls.Config
	if config.TLSProvider != nil {
		if secure, err = config.TLSProvider(); err != nil {
			return nil, fmt.Errorf("ServeConfig.TLSProvider: %w", err)
		}
	}
	if hosts := env[envClientCert]; secure == nil && hosts != "" {
		if secure, h.cert, err = answerMutualTLS(hosts); err != nil {
			return nil, fmt.Errorf("AutoMTLS: %w", err)
		}
	}
	if err = s.listen(env); err != nil {
		return nil, err
	}
	h.addr = s.listener.Addr()
	s.handshake = h
	if secure != nil {
		s.listener = tls.NewListener(s.listener, secure)
	}
	s.server = &RPCServer{Plugins: sets[h.version], DoneCh: s.quit, logger: logger}
	return s, nil
}

// listen listens on a Unix socket, in the directory of the host or a new one. On Windows,
// it listens on a TCP port.
func (s *serving) listen(env map[string]string) (err error) {
	if runtime.GOOS == "windows" {
		s.listener, err = listenTCP(env[envMinPort], env[envMaxPort])
		return err
	}
	dir := env[EnvUnixSocketDir]
	if dir == "" {
		if dir, err = new(UnixSocketConfig).makeDir(); err != nil {
			return err
		}
		s.dir = dir
	}
	path := filepath.Join(dir, fmt.Sprintf("%s%d-%x", socketPrefix, os.Getpid(), rand.Uint32()))
	if s.listener, err = net.Listen("unix", path); err != nil {
		return err
	}
	if group := env[EnvUnixSocketGroup]; group != "" {
		return giveToGroup(path, group, 0o660)
	}
	return nil
}

// unlisten undoes listen.
func (s *serving) unlisten() {
	if s.listener != nil {
		_ = s.listener.Close()
	}
	removePrivate(s.dir)
}

// capture sends the output of the process to the host, and copies it to the writers.
func (s *serving) capture(teeOut, teeErr io.Writer) (err error) {
	stdout, stderr := os.Stdout, os.Stderr
	var w [2]*os.File
	for i := range w {
		if s.output[i], w[i], err = os.Pipe(); err != nil {
			return cannotServe(err)
		}
	}
	s.server.Stdout, s.server.Stderr = io.TeeReader(s.output[0], teeOut), io.TeeReader(s.output[1], teeErr)
	s.restore = sync.OnceFunc(func() {
		os.Stdout, os.Stderr = stdout, stderr
		_ = w[0].Close()
		_ = w[1].Close()
	})
	s.server.release = s.restore
	os.Stdout, os.Stderr = w[0], w[1]
	return nil
}

func cannotServe(err error) error { return fmt.Errorf("plugin: cannot serve: %w", err) }

// serve accepts connections until close closes the listener and waits.
func (s *serving) serve() {
	s.server.serving.Go(func() { s.server.Serve(s.listener) })
}

// close sends the rest of the output and restores os.Stdout and os.Stderr. It ends the
// connections without waiting for them, as the process is about to exit.
func (s *serving) close() {
	s.unlisten()
	s.server.flush()
	s.server.endConns()
	s.restore()
	for _, r := range s.output {
		_ = r.Close()
	}
}
