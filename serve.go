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
	"maps"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

// orphanTimeout is how long a plugin whose host is gone may take to end.
const orphanTimeout = 1500 * time.Millisecond

// ServeConfig describes what a plugin serves.
type ServeConfig struct {
	// HandshakeConfig must be the host's.
	HandshakeConfig

	// TLSProvider, if not nil, returns the configuration of the connection.
	// The host needs a ClientConfig.TLSConfig that goes with it. It is not
	// needed for ClientConfig.AutoMTLS, which it disables. It is called once,
	// and its error is why Serve cannot serve.
	TLSProvider func() (*tls.Config, error)

	// Plugins are served where HandshakeConfig.ProtocolVersion is negotiated.
	Plugins PluginSet

	// VersionedPlugins are served by the protocol version that is negotiated:
	// the highest that both sides have, or the lowest here if the host does
	// not tell its own. A version that is also HandshakeConfig.ProtocolVersion
	// has these and not Plugins.
	VersionedPlugins map[int]PluginSet

	// Logger gets what this library logs. Nil means a logger to stderr in the
	// form that hosts understand.
	Logger hclog.Logger

	// Test, if not nil, makes Serve serve within a test. See ServeTestConfig.
	Test *ServeTestConfig
}

// ServeTestConfig is the test mode of [Serve], in which the plugin runs in the
// process of a test, debugger or program of its author's, and the host, there
// or elsewhere, reattaches to it. Nothing that belongs to the whole process is
// touched: no environment, signals or exit, and the cookie is not asked for.
type ServeTestConfig struct {
	// Context ends the serving. Nil means context.Background().
	Context context.Context

	// ReattachConfigCh, if not nil, gets what a host needs to connect. Nobody
	// is served before that has been received.
	ReattachConfigCh chan<- *ReattachConfig

	// CloseCh, if not nil, is closed when the serving has ended.
	CloseCh chan<- struct{}

	// SyncStdio sends what the process prints to the host, too, which takes
	// replacing os.Stdout and os.Stderr after all, until the serving ends.
	SyncStdio bool
}

// Serve serves plugins to the host that has started this process: a plugin's
// main calls it and little else. It returns when the host has asked the plugin
// to quit, when the host is gone, and on SIGTERM and SIGHUP; what main does
// then it should do in two seconds. An interrupt (SIGINT) is left to the host.
// On Windows the closing of its console and the end of the user's session count
// as SIGTERM, and Ctrl-C as SIGINT.
//
// While it serves, os.Stdout and os.Stderr go to the host; before and after,
// they are the process's own. The variables of the handshake are removed from
// the environment, so that no child inherits them.
//
// If it cannot serve, it prints why to stderr and exits with status 1, also
// where the process was not started by a host. In test mode it logs why and
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

// ServeMuxMap is the plugins of one binary by the argument that selects them.
type ServeMuxMap map[string]*ServeConfig

// ServeMux serves one of several plugins: the one that the only argument on
// the command line names. It exits with status 1 if there is none.
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

// serve is Serve in a process of its own. An error is what to tell a person.
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

	// Signals are caught, and not ignored, because children would inherit that.
	// These two are so to the end: main should finish, also when it prints what
	// nobody reads any more.
	terminate := make(chan os.Signal, 1)
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGPIPE)
	signal.Notify(terminate, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(terminate, syscall.SIGHUP)
	}
	host := parseHostInfo(env[envHost])
	orphaned := watchHost(host, env[EnvUnixSocketDir])
	defer func() {
		// The signal that ended the host may be under way to this process, too.
		if !isClosed(orphaned) {
			signal.Stop(terminate)
		}
	}()

	s, err := newServing(config, env, logger)
	if err != nil {
		return err
	}
	direct := func() bool { return host.pid == os.Getppid() } // and not a host further up, or gone
	s.handshake.flushes = direct()
	defer func() {
		s.close()
		if isClosed(orphaned) || host.pid != 0 && !direct() && !alive(host.pid) {
			removePrivate(env[EnvUnixSocketDir]) // which the host would have done
		}
	}()
	if err := s.capture(io.Discard, io.Discard); err != nil {
		return err
	}
	if _, err := io.WriteString(stdout, s.handshake.String()+"\n"); err != nil {
		if waitFor(orphanTimeout/2, orphaned) {
			return nil // which is why
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

// takeEnvironment returns the variables of the handshake and removes them.
func takeEnvironment(cookie string) map[string]string {
	env := make(map[string]string)
	for _, name := range protocolEnv {
		env[name] = os.Getenv(name)
		_ = os.Unsetenv(name)
	}
	_ = os.Unsetenv(cookie)
	return env
}

// watchHost returns a channel that is closed when the host is gone. A little
// later the process exits, whatever it does. The goroutine that watches
// lives as long as the process, because the host may go while main finishes.
func watchHost(host hostInfo, dir string) <-chan struct{} {
	orphaned := make(chan struct{})
	var pipe *os.File
	if host.watch == watchPipe {
		// A process in between may have closed it and used its number again.
		pipe = os.NewFile(uintptr(host.fd), "lifeline")
		if info, err := pipe.Stat(); err != nil || info.Mode()&os.ModeNamedPipe == 0 {
			foreign = pipe
			return orphaned
		}
	}
	go func() {
		if waitHost(host, pipe) {
			close(orphaned)
			time.Sleep(orphanTimeout)
			removePrivate(dir)
			os.Exit(1)
		}
	}()
	return orphaned
}

// foreign is the file that watchHost found instead of a pipe. A file that
// nothing refers to would be closed.
var foreign *os.File

// waitHost waits for the end of the host. It returns false if the host is not to
// be watched, as those of go-plugin, or has detached the plugin.
func waitHost(host hostInfo, pipe *os.File) bool {
	switch host.watch {
	case watchPipe:
		_, err := pipe.Read(make([]byte, 1))
		return err == io.EOF
	case watchPid:
		process, err := os.FindProcess(host.pid)
		if err != nil { // it is gone, or runs as another user
			return !errors.Is(err, fs.ErrPermission)
		}
		_, err = process.Wait()
		return err == nil
	}
	return false
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

// serving is what a plugin has while it serves.
type serving struct {
	server    *RPCServer
	listener  net.Listener
	handshake handshake
	quit      chan struct{} // closed when a host has asked the plugin to quit
	dir       string        // of the socket, if it is to be removed

	restore func()      // gives the process its stdout and stderr back
	output  [2]*os.File // where its output is read meanwhile
}

// newServing listens, with what the host has said in the environment.
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

// answerMutualTLS makes the plugin's certificate for the host's, which is PEM.
func answerMutualTLS(host string) (*tls.Config, []byte, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(host)) {
		return nil, nil, errors.New("the host has sent no certificate that can be read")
	}
	own, err := newCertificate()
	if err != nil {
		return nil, nil, err
	}
	return mutualTLS(own, pool), own.Certificate[0], nil
}

// listen listens on a Unix socket, in the directory that the host has made or
// in one of its own; on Windows, on a port of the loopback interface.
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

// unlisten gives back what listen has taken.
func (s *serving) unlisten() {
	if s.listener != nil {
		_ = s.listener.Close()
	}
	removePrivate(s.dir)
}

// capture makes what the process prints go to the host, and to the writers.
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

// close ends the serving: what was printed is sent, and the process has its own
// stdout and stderr again. The connections are closed, too, but it does not wait
// for that: the process is about to exit.
func (s *serving) close() {
	s.unlisten()
	s.server.flush()
	s.server.endConns()
	s.restore()
	for _, r := range s.output {
		_ = r.Close()
	}
}

// TestOptions are options of TestPluginRPCConn.
type TestOptions struct {
	// ServerStdout and ServerStderr, if not nil, are what the plugin's end
	// sends as its stdout and stderr. They are not closed.
	ServerStdout io.ReadCloser
	ServerStderr io.ReadCloser
}

// TestingT is what the test helpers use of a *testing.T, a *testing.B or a
// testing.TB.
type TestingT interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// TestConn returns the two ends of a connection over the loopback interface,
// the client's first. The test closes them when it ends.
func TestConn(t TestingT) (net.Conn, net.Conn) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("plugin: listening: %v", err)
	}
	defer lis.Close()
	// The kernel completes the connection before it is accepted.
	client, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatalf("plugin: dialling: %v", err)
	}
	server, err := lis.Accept()
	if err != nil {
		t.Fatalf("plugin: accepting: %v", err)
	}
	t.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
	})
	return client, server
}

// TestRPCConn returns an RPC client and the server at its other end, with
// which services can be registered. The test closes them when it ends.
func TestRPCConn(t TestingT) (*rpc.Client, *rpc.Server) {
	t.Helper()
	clientConn, serverConn := TestConn(t)
	server := rpc.NewServer()
	go server.ServeConn(serverConn) // ends with the connection
	return rpc.NewClient(clientConn), server
}

// TestPluginRPCConn returns the two ends of a connection over which plugins
// can be dispensed and called without a process of their own. opts may be nil.
// The test closes them when it ends.
func TestPluginRPCConn(t TestingT, plugins map[string]Plugin, opts *TestOptions) (*RPCClient, *RPCServer) {
	t.Helper()
	clientConn, serverConn := TestConn(t)
	server := &RPCServer{Plugins: plugins}
	if opts != nil && opts.ServerStdout != nil {
		server.Stdout = opts.ServerStdout
	}
	if opts != nil && opts.ServerStderr != nil {
		server.Stderr = opts.ServerStderr
	}
	go server.ServeConn(serverConn) // ends with the connection
	client, err := NewRPCClient(clientConn, plugins)
	if err != nil {
		t.Fatalf("plugin: connecting: %v", err)
	}
	t.Cleanup(func() { client.session.close() })
	return client, server
}
