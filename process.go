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
	pollInterval  = 50 * time.Millisecond // how often a process that is not a child is looked at
	maxHandshake  = 64 << 10              // how long the handshake line may be
	maxSocketPath = 103                   // what every system takes
	socketName    = len("/plugin-4194304-ffffffff")
	socketPrefix  = "plugin-" // of sockets and their directories
)

// AttachedRunner is the process of a plugin that a [Client] has reattached to
// with [ReattachConfig].ReattachFunc. Its methods are called concurrently.
type AttachedRunner interface {
	// Wait waits for the end of the process. Its error is in the Client's Err.
	// ctx ends when the Client no longer waits.
	Wait(ctx context.Context) error

	// Kill ends the process. ctx ends when the Client no longer waits.
	Kill(ctx context.Context) error

	// ID returns what identifies the process, such as its pid.
	ID() string
}

// ReattachConfig describes a plugin that runs, for a host that has not started
// it. Get one from [Client.ReattachConfig] or [ServeTestConfig].
type ReattachConfig struct {
	// Protocol is ProtocolNetRPC, also if empty.
	Protocol Protocol
	// ProtocolVersion is the version that was negotiated. Zero means the only
	// one that the ClientConfig has.
	ProtocolVersion int
	// Addr is where the plugin listens.
	Addr net.Addr
	// Pid is its process. If that process is not the plugin at Addr, it is
	// never signalled; nor is it on Windows, where that cannot be known.
	Pid int
	// ReattachFunc, if not nil, finds the process, and Pid is not used.
	ReattachFunc func() (AttachedRunner, error)
	// Test says that the plugin runs in test mode: Kill does nothing.
	Test bool
}

// child is a plugin's process that this host has started.
type child struct {
	cmd    *exec.Cmd // a copy of given
	given  *exec.Cmd // the caller's
	logger hclog.Logger

	dir      string          // private, for the socket; "" for none
	cert     tls.Certificate // the host's, under AutoMTLS
	lifeline *os.File        // the plugin exits when this is closed; nil if it is detached
	release  sync.Once       // closes lifeline, or detaches the plugin

	lines      [2]lineWriter // stdout's and stderr's
	handshakes chan string   // receives the handshake line; closed when there will be none
	found      bool          // it has come; used by the reader of stdout alone
	noise      tail          // what came before it
	log        stderrLog
}

// givenMu guards Process and ProcessState of the callers' commands, which
// clients with one ClientConfig share.
var givenMu sync.Mutex

// launch starts a plugin. What it has opened is freed when the process ends.
func launch(config *ClientConfig, logger hclog.Logger, versions string) (_ *child, err error) {
	cmd := *config.Cmd
	cmd.Process, cmd.ProcessState = nil, nil
	p := &child{cmd: &cmd, given: config.Cmd, logger: logger, handshakes: make(chan string, 1), log: stderrLog{logger: logger}}
	var passed []*os.File // to the process, and closed here
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
	if binary != nil {
		p.pin(binary)
	}
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
		// It uses the caller's command, which must have its Process.
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

// executed is the file that a command executes.
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

// pin makes the command execute the open file f, whatever becomes of its path.
// The process finds it under a name like the binary's, among its descriptors.
func (p *child) pin(f *os.File) {
	if _, err := os.Stat("/proc/self/fd"); err != nil || runtime.GOOS != "linux" {
		return
	}
	link := filepath.Join(p.dir, filepath.Base(p.cmd.Path))
	if os.Symlink(fmt.Sprintf("/proc/self/fd/%d", p.pass(f)), link) == nil {
		p.cmd.Path = link
	}
}

// hold makes the plugin's life depend on this process, and returns what tells
// the plugin so. On Unix that is a pipe of which it reads the returned end: it
// comes to an end with this process, however that ends.
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

// stdoutLine takes a line of the process's own stdout. That is the handshake,
// once; what is printed before is a mistake of the plugin's, but no fatal one.
func (p *child) stdoutLine(line []byte, left int) {
	text := printable(string(line)) + cutMark(left)
	switch {
	case p.found:
		p.logger.Debug(text)
	case handshakeStart.Match(line):
		p.found = true
		p.handshakes <- string(line)
	case text != "":
		p.logger.Warn("the plugin printed to stdout before its handshake", "line", text)
		_, _ = p.noise.Write(append(line, '\n'))
	}
}

var errNoHandshake = errors.New("it exited without a handshake")

// awaitHandshake waits until the plugin says that it is ready.
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

// Wait waits for the end of the process and its output, frees all it had, and
// returns an *ExitError. Its context is not needed: the system ends the wait.
func (p *child) Wait(context.Context) error {
	_ = p.cmd.Wait() // the state says it all
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

// free gives back what the host holds for the process.
func (p *child) free() {
	p.release.Do(func() { _ = p.lifeline.Close() })
	if p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}

// stranger is a plugin's process that this host has not started.
type stranger struct {
	process *os.Process
	pid     int
	addr    net.Addr
	logger  hclog.Logger
}

// findProcess finds the process of a plugin that listens.
func findProcess(rc *ReattachConfig, logger hclog.Logger) (*stranger, error) {
	proc, err := os.FindProcess(rc.Pid)
	if err != nil || rc.Pid <= 0 || !alive(rc.Pid) {
		return nil, ErrProcessNotFound
	}
	return &stranger{proc, rc.Pid, rc.Addr, logger}, nil
}

// alive reports whether there is such a process. On Windows, where FindProcess
// tells, it is true. A zombie is dead, though its parent may never reap it.
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

// mine reports whether the process is surely the plugin: the socket, which was
// alive when the process was looked up, has its pid in its name, as those of
// this library's plugins do.
func (p *stranger) mine() bool {
	return strings.HasPrefix(filepath.Base(p.addr.String()), fmt.Sprintf("%s%d-", socketPrefix, p.pid))
}

// Kill kills the process, unless it may not be the plugin.
func (p *stranger) Kill(context.Context) error {
	if p.mine() {
		return p.process.Kill()
	}
	p.logger.Warn("the process may not be the plugin, so it is left alone", "pid", p.pid)
	return nil
}

// Wait waits for the end of the process, and removes what that leaves behind.
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

// SecureConfig describes a binary by its checksum. On Linux with /proc the file
// that is summed is the file that is executed, even if another is put in its
// place meanwhile; a script then finds another path than its own in $0.
// Elsewhere that other file would be executed, and nothing helps if the file
// itself is rewritten. Kill waits while a binary is summed.
type SecureConfig struct {
	// Checksum is what Hash must sum the binary up to.
	Checksum []byte
	// Hash is the algorithm, as from sha256.New(). Several clients may share it.
	Hash hash.Hash
}

var hashMu sync.Mutex // guards every Hash

// Check reports whether the file's checksum is the right one; that it is not is
// no error. [ErrSecureConfigNoChecksum] and [ErrSecureConfigNoHash] are. It may
// be called again and again.
func (s *SecureConfig) Check(filePath string) (bool, error) {
	f, err := s.open(filePath)
	if err == ErrChecksumsDoNotMatch {
		return false, nil
	}
	_ = f.Close()
	return err == nil, err
}

// open opens a file whose checksum is the right one.
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
