package plugin

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

// handshakeEnv returns the plugin's variables. It makes the host's certificate and the
// directory for the socket.
func (p *child) handshakeEnv(config *ClientConfig, versions string) (env []string, err error) {
	env = []string{
		config.MagicCookieKey + "=" + config.MagicCookieValue,
		fmt.Sprintf("%s=%d", envMinPort, config.MinPort),
		fmt.Sprintf("%s=%d", envMaxPort, config.MaxPort),
		envVersions + "=" + versions,
	}
	if config.AutoMTLS {
		if p.cert, err = newCertificate(); err != nil {
			return nil, err
		}
		block := &pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Certificate[0]}
		env = append(env, envClientCert+"="+string(pem.EncodeToMemory(block)))
	}
	if runtime.GOOS == "windows" {
		return env, nil
	}
	sockets := cmp.Or(config.UnixSocketConfig, &UnixSocketConfig{})
	if p.dir, err = sockets.makeDir(); err != nil {
		return nil, err
	}
	env = append(env, EnvUnixSocketDir+"="+p.dir)
	if sockets.Group != "" {
		env = append(env, EnvUnixSocketGroup+"="+sockets.Group)
	}
	return env, nil
}

// environment returns the plugin's environment: the host's, Cmd.Env and the variables
// of the handshake, where later ones win. If the host is a plugin itself, its own
// handshake is left out.
func environment(config *ClientConfig, handshake []string) []string {
	var env []string
	if !config.SkipHostEnv {
		env = os.Environ()
	}
	env = slices.DeleteFunc(append(env, config.Cmd.Env...), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(protocolEnv, name)
	})
	return append(env, handshake...)
}

// startHint returns a possible cause, or "".
func startHint(e *StartError, config *ClientConfig) string {
	silent := e.Stdout == "" && e.Stderr == ""
	switch {
	case e.State != nil && strings.Contains(e.Stderr, "is a plugin"):
		return fmt.Sprintf("it did not accept the cookie %s: it is a plugin of another program, or its HandshakeConfig is another one", config.MagicCookieKey)
	case e.Stdout != "":
		return "what it printed to stdout is no handshake: does its main call plugin.Serve, and print nothing before?"
	case silent && (e.State != nil || errors.Is(e.Err, context.DeadlineExceeded)):
		return "does its main call plugin.Serve?"
	case errors.Is(e.Err, syscall.ENOEXEC), runtime.GOOS == "windows" && (errors.Is(e.Err, syscall.Errno(193)) || errors.Is(e.Err, syscall.Errno(216))):
		return fmt.Sprintf("is it built for %s/%s, as this host is?", runtime.GOOS, runtime.GOARCH)
	case errors.Is(e.Err, fs.ErrPermission):
		return "is it executable?"
	case errors.Is(e.Err, exec.ErrNotFound) && filepath.Base(e.Path) == e.Path:
		return fmt.Sprintf("it was looked up in PATH; the file in this directory is ./%s", e.Path)
	case errors.Is(e.Err, fs.ErrNotExist):
		hint := "is it there, and the interpreter that it names?"
		if path, err := filepath.Abs(executed(config.Cmd)); err == nil && !filepath.IsAbs(e.Path) {
			hint = path + ": " + hint
		}
		return hint
	}
	return ""
}

// maxHandshake is the length of the handshake line.
const maxHandshake = 64 << 10

// child is the process of a plugin that this host has started.
type child struct {
	cmd   *exec.Cmd // a copy of given
	given *exec.Cmd // of the caller

	dir      string          // private, for the socket; "" if there is none
	cert     tls.Certificate // of the host, with AutoMTLS
	lifeline *os.File        // the plugin exits when this is closed; nil if it is detached
	release  sync.Once       // closes lifeline or detaches the plugin

	lines      [2]lineWriter // of stdout and stderr
	handshakes chan string   // receives the handshake; closed if there will be none
	found      bool          // the handshake has been read; used by the reader of stdout
	noise      tail          // output to stdout before the handshake
	log        stderrLog
}

// givenMu guards Process and ProcessState of the callers' commands. Clients with the
// same ClientConfig share them.
var givenMu sync.Mutex

// launch starts a plugin. free releases what it opens.
func launch(config *ClientConfig, logger hclog.Logger, versions string) (_ *child, err error) {
	givenMu.Lock()
	cmd := *config.Cmd
	givenMu.Unlock()
	cmd.Process, cmd.ProcessState = nil, nil
	p := &child{cmd: &cmd, given: config.Cmd, handshakes: make(chan string, 1), log: stderrLog{logger: logger}}
	var passed []*os.File // to the process; closed here
	defer func() {
		for _, f := range passed {
			_ = f.Close()
		}
		if err != nil {
			p.free()
		}
	}()
	var binary *os.File
	if config.SecureConfig != nil {
		if binary, err = config.SecureConfig.open(executed(&cmd)); err != nil {
			return nil, err
		}
		passed = append(passed, binary)
	}
	env, err := p.handshakeEnv(config, versions)
	if err != nil {
		return nil, err
	}
	p.pin(binary)
	life, end, err := p.hold(config.Detach)
	if err != nil {
		return nil, err
	}
	passed = append(passed, end) // a nil *os.File can be closed
	cmd.Env = environment(config, append(env, envHost+"="+life))
	if cmd.Stdin == nil {
		cmd.Stdin = os.Stdin
	}
	size := config.PluginLogBufferSize
	p.lines[0] = lineWriter{max: max(size, maxHandshake), emit: p.stdoutLine}
	p.lines[1] = lineWriter{max: size, emit: p.log.line}
	cmd.Stdout, cmd.Stderr = &p.lines[0], io.MultiWriter(&p.log.tail, &bestEffortWriter{config.Stderr}, &p.lines[1])
	cmd.WaitDelay = cmp.Or(cmd.WaitDelay, 2*drainTimeout)
	started := make(chan struct{})
	defer close(started)
	if cancel := cmd.Cancel; cancel != nil {
		// It may use the Process of the caller's command.
		cmd.Cancel = func() error { <-started; return cancel() }
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	givenMu.Lock()
	defer givenMu.Unlock()
	p.given.Process, p.given.ProcessState = cmd.Process, nil
	return p, nil
}

// executed returns the path of the file that a command executes.
func executed(cmd *exec.Cmd) string {
	if filepath.IsAbs(cmd.Path) {
		return cmd.Path
	}
	return filepath.Join(cmd.Dir, cmd.Path)
}

// pass passes f to the process and returns its descriptor there.
func (p *child) pass(f *os.File) int {
	p.cmd.ExtraFiles = append(slices.Clip(p.cmd.ExtraFiles), f)
	return 2 + len(p.cmd.ExtraFiles)
}

// pin makes the command execute the open file f, even if its path changes. The link
// keeps the name of the binary.
func (p *child) pin(f *os.File) {
	if _, err := os.Stat("/proc/self/fd"); err != nil || f == nil || runtime.GOOS != "linux" {
		return
	}
	link := filepath.Join(p.dir, filepath.Base(p.cmd.Path))
	if os.Symlink(fmt.Sprintf("/proc/self/fd/%d", p.pass(f)), link) == nil {
		p.cmd.Path = link
	}
}

// stdoutLine handles a line of the process's stdout. Lines before the handshake are a
// mistake in the plugin, but not a fatal one.
func (p *child) stdoutLine(line []byte, left int) {
	text := printable(string(line)) + cutMark(left)
	switch {
	case p.found:
		p.log.logger.Debug(text)
	case isHandshake(line):
		p.found = true
		p.handshakes <- string(line)
	case text != "":
		p.log.logger.Warn("the plugin printed to stdout before its handshake", "line", text)
		_, _ = p.noise.Write(append(line, '\n'))
	}
}

var errNoHandshake = errors.New("it exited without a handshake")

// awaitHandshake waits for the handshake.
func (p *child) awaitHandshake(ctx context.Context, timeout time.Duration) (h handshake, err error) {
	late := time.NewTimer(timeout)
	defer late.Stop()
	select {
	case line, ok := <-p.handshakes:
		if !ok {
			return h, errNoHandshake
		}
		return parseHandshake(line)
	case <-ctx.Done():
		return h, contextError(ctx)
	case <-late.C:
		return h, fmt.Errorf("it has not sent its handshake within %v: %w", timeout, context.DeadlineExceeded)
	}
}

// ID returns the pid.
func (p *child) ID() string { return strconv.Itoa(p.cmd.Process.Pid) }

// Kill kills the process.
func (p *child) Kill(context.Context) error { return p.cmd.Process.Kill() }

// Wait waits until the process and its output have ended, and returns an *ExitError.
// It does not use its context: a client kills a process rather than stop waiting.
func (p *child) Wait(context.Context) error {
	_ = p.cmd.Wait() // ProcessState has the error
	for i := range p.lines {
		_ = p.lines[i].Close()
	}
	close(p.handshakes)
	givenMu.Lock()
	if p.given.Process == p.cmd.Process {
		p.given.ProcessState = p.cmd.ProcessState
	}
	givenMu.Unlock()
	p.free()
	e := &ExitError{Path: p.given.Path, State: p.cmd.ProcessState, Stderr: p.log.tail.String()}
	if !e.State.Success() {
		e.Panic = p.log.crash.String()
	}
	return e
}

// free releases what the host holds for the process.
func (p *child) free() {
	p.release.Do(func() { _ = p.lifeline.Close() })
	if p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}
