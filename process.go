package plugin

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
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

const (
	pollInterval  = 50 * time.Millisecond // how often a process that is not a child is checked
	maxHandshake  = 64 << 10              // the length of the handshake line
	maxSocketPath = 103                   // the shortest limit of any system
	socketName    = len("/plugin-4194304-ffffffff")
	socketPrefix  = "plugin-" // of sockets and their directories
)

// AttachedRunner is a process that [ReattachConfig].ReattachFunc has found. Its methods
// are called concurrently.
type AttachedRunner interface {
	// Wait waits until the process has ended. Client.Err has its error. ctx ends
	// when the Client does not wait any more.
	Wait(ctx context.Context) error

	// Kill ends the process. ctx ends when the Client does not wait any more.
	Kill(ctx context.Context) error

	// ID identifies the process. It may be the pid.
	ID() string
}

// ReattachConfig describes a running plugin to a host that has not started it.
// [Client.ReattachConfig] and [ServeTestConfig] return one.
type ReattachConfig struct {
	// Protocol is the protocol of the plugin. If empty, it is ProtocolNetRPC.
	Protocol Protocol
	// ProtocolVersion is the negotiated version. If zero, it is the version of
	// the ClientConfig, if that has only one.
	ProtocolVersion int
	// Addr is the address of the plugin.
	Addr net.Addr
	// Pid is the id of the process. The process is killed only if the name of its
	// socket, Addr, shows that it is the plugin, and never on Windows.
	Pid int
	// ReattachFunc, if not nil, finds the process instead of Pid. Start and Kill
	// wait for it.
	ReattachFunc func() (AttachedRunner, error)
	// Test reports that the plugin runs in test mode, where Kill does nothing.
	Test bool
}

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
	cmd.Stdout, cmd.Stderr = &p.lines[0], io.MultiWriter(&p.log.tail, &forgiving{config.Stderr}, &p.lines[1])
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

// hold makes the plugin exit when this process does. It returns the variable for the
// plugin and, on Unix, the end of a pipe that the plugin reads. The system closes the
// other end when this process exits or crashes.
func (p *child) hold(detach bool) (life string, end *os.File, err error) {
	host := hostInfo{pid: os.Getpid(), watch: watchPid}
	switch {
	case detach:
		host.watch = watchNothing
	case runtime.GOOS != "windows":
		if end, p.lifeline, err = os.Pipe(); err != nil {
			return "", nil, err
		}
		host.watch, host.fd = watchPipe, p.pass(end)
	}
	return host.String(), end, nil
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

// detach lets the plugin outlive this process.
func (p *child) detach() {
	p.release.Do(func() {
		_, _ = p.lifeline.Write([]byte{1})
		_ = p.lifeline.Close()
	})
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
		e.Panic = strings.TrimSpace(string(p.log.crash))
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

// stranger is the process of a plugin that this host has not started.
type stranger struct {
	process *os.Process
	pid     int
	addr    net.Addr
	logger  hclog.Logger
}

// findProcess finds the process of a plugin.
func findProcess(rc *ReattachConfig, logger hclog.Logger) (*stranger, error) {
	proc, err := os.FindProcess(rc.Pid)
	if err != nil || rc.Pid <= 0 || !alive(rc.Pid) {
		return nil, ErrProcessNotFound
	}
	return &stranger{proc, rc.Pid, rc.Addr, logger}, nil
}

// alive reports whether a process exists. A zombie does not, because its parent may
// never reap it. On Windows, FindProcess fails if it does not.
func alive(pid int) bool {
	p, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	defer p.Release()
	if runtime.GOOS == "windows" {
		return true
	}
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := bytes.Cut(stat, []byte(") "))
	return p.Signal(syscall.Signal(0)) == nil && !bytes.HasPrefix(state, []byte("Z"))
}

// ID returns the pid.
func (p *stranger) ID() string { return strconv.Itoa(p.pid) }

// mine reports whether the process is certainly the plugin: plugins of this library
// have their pid in the name of the socket, and the socket accepted a connection just
// before the process was found.
func (p *stranger) mine() bool {
	return strings.HasPrefix(filepath.Base(p.addr.String()), fmt.Sprintf("%s%d-", socketPrefix, p.pid))
}

// Kill kills the process if it is certainly the plugin.
func (p *stranger) Kill(context.Context) error {
	if p.mine() {
		return p.process.Kill()
	}
	p.logger.Warn("the process may not be the plugin, so it is left alone", "pid", p.pid)
	return nil
}

// Wait waits until the process has ended and removes its socket.
func (p *stranger) Wait(ctx context.Context) error {
	if runtime.GOOS == "windows" {
		_, _ = p.process.Wait() // it cannot be interrupted
	} else {
		for alive(p.pid) && !waitFor(pollInterval, ctx.Done()) {
		}
		_ = p.process.Release()
	}
	if p.mine() && ctx.Err() == nil {
		_ = os.Remove(p.addr.String())
	}
	if dir := filepath.Dir(p.addr.String()); isPrivate(dir) {
		_ = os.Remove(dir) // unless there is something in it
	}
	return &ExitError{Path: fmt.Sprintf("with pid %d", p.pid)}
}

// SecureConfig has the checksum of a plugin's binary. On Linux with /proc, the file
// that was checked is the file that runs, even if its path gets another file. (A script
// sees another path in $0.) On other systems, the other file runs. A file that is
// changed in place after the check runs on every system. Kill waits for the check.
//
// Several clients may use one SecureConfig.
type SecureConfig struct {
	// Checksum is the expected checksum.
	Checksum []byte
	// Hash computes the checksum, such as sha256.New().
	Hash hash.Hash
}

var hashMu sync.Mutex // guards every Hash

// Check reports whether a file has the expected checksum. It returns
// [ErrSecureConfigNoChecksum], [ErrSecureConfigNoHash], or an error of reading the file.
// Another checksum is not an error.
func (s *SecureConfig) Check(filePath string) (bool, error) {
	f, err := s.open(filePath)
	if err == ErrChecksumsDoNotMatch {
		return false, nil
	}
	_ = f.Close()
	return err == nil, err
}

// open opens a file if it has the expected checksum.
func (s *SecureConfig) open(path string) (*os.File, error) {
	switch {
	case len(s.Checksum) == 0:
		return nil, ErrSecureConfigNoChecksum
	case s.Hash == nil:
		return nil, ErrSecureConfigNoHash
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	hashMu.Lock()
	defer hashMu.Unlock()
	s.Hash.Reset()
	if _, err = io.Copy(s.Hash, f); err == nil && !bytes.Equal(s.Hash.Sum(nil), s.Checksum) {
		err = ErrChecksumsDoNotMatch
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
