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
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	// drainTimeout is how long the output of a process that has ended is waited
	// for, and waited for again, up to drainRounds times, while lines come: a
	// process that it has started may hold it open.
	drainTimeout = 500 * time.Millisecond
	drainRounds  = 4
	// pollInterval is how often a process that is nobody's child is looked at.
	pollInterval = 50 * time.Millisecond
	// headSize is how much of what is printed instead of a handshake is kept.
	headSize = 4 << 10
	// maxHandshake is how long the handshake line may be.
	maxHandshake = 64 << 10
	// maxSocketPath is the longest path that every system takes for a socket,
	// and socketName what a plugin's socket adds to its directory's.
	maxSocketPath = 103
	socketName    = len("/plugin-4194304-ffffffff")
	// socketPrefix begins the names of plugins' sockets and their directories.
	socketPrefix = "plugin-"
)

// process is a plugin's process. Of one that is not this host's child there is
// no more than the first fields, logger and gone.
type process struct {
	*os.Process
	pid       int
	name      string
	addr      net.Addr      // of a plugin that was reattached to
	abandoned chan struct{} // closed when its end is not waited for any more
	ended     chan struct{} // on Windows, closed when it has ended; see hasEnded

	cmd      *exec.Cmd // a copy of given
	given    *exec.Cmd // the caller's
	logger   hclog.Logger
	dir      string          // private, for the socket; "" for none
	cert     tls.Certificate // the host's, under AutoMTLS
	lifeline *os.File        // the plugin ends when this is closed; nil if it is detached
	letGo    sync.Once       // closes lifeline, detaches the plugin, or closes abandoned

	output     [2]*os.File      // where stdout and stderr are read
	copied     [2]chan struct{} // closed when that has ended
	lines      atomic.Int64     // how many lines have come
	shaken     chan string      // gets the handshake line
	handshaken bool             // it has come; for stdout's reader alone, as is blank
	blank      bool             // the line before was empty
	head       bytes.Buffer     // what came before it; to be read when copied[0] is closed
	log        stderrLog        // to be read when copied[1] is closed

	exited atomic.Bool      // the process has ended
	gone   chan struct{}    // closed when the process has ended and its output is here
	state  *os.ProcessState // to be read when gone is closed
}

// givenMu guards Process and ProcessState of the callers' commands, which
// clients with one ClientConfig share.
var givenMu sync.Mutex

// launch starts a plugin. What it has opened is freed when the process ends.
func launch(ctx context.Context, config *ClientConfig, logger hclog.Logger, versions string) (_ *process, err error) {
	cmd := *config.Cmd
	cmd.Process, cmd.ProcessState = nil, nil
	p := &process{
		name: cmd.Path, cmd: &cmd, given: config.Cmd, logger: logger,
		shaken: make(chan string, 1), gone: make(chan struct{}),
		log: stderrLog{logger: logger},
	}
	var passed []*os.File // to the process, and closed here
	defer func() {
		for _, f := range passed {
			_ = f.Close()
		}
		if err != nil {
			p.free()
			err = notLaunched(p.name, err, config)
		}
	}()

	var checked *os.File
	if config.SecureConfig != nil {
		if checked, err = config.SecureConfig.open(ctx, executed(&cmd)); checked != nil {
			passed = append(passed, checked)
		}
		if err != nil {
			return nil, err
		}
	}
	env, err := p.handshakeEnv(config, versions)
	if err != nil {
		return nil, err
	}
	life, end, err := p.hold(config.Detach)
	if err != nil {
		return nil, err
	}
	if end != nil {
		passed = append(passed, end)
	}
	if checked != nil {
		p.pin(checked)
	}
	cmd.Env = environment(config, append(env, envHost+"="+life))
	if cmd.Stdin == nil {
		cmd.Stdin = os.Stdin
	}
	for i, to := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		p.output[i], *to = r, w
		passed = append(passed, w)
	}
	if cmd.WaitDelay == 0 {
		cmd.WaitDelay = drainTimeout // for a Stdin that is copied
	}
	started := make(chan struct{})
	defer close(started)
	if cancel := cmd.Cancel; cancel != nil {
		// It uses the caller's command, which has to have its Process.
		cmd.Cancel = func() error { <-started; return cancel() }
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p.Process, p.pid = cmd.Process, cmd.Process.Pid
	givenMu.Lock()
	p.given.Process, p.given.ProcessState = cmd.Process, nil
	givenMu.Unlock()
	p.copyOutput(config)
	return p, nil
}

// notLaunched says why a plugin was not even started.
func notLaunched(name string, err error, config *ClientConfig) error {
	switch err {
	case ErrSecureConfigNoChecksum, ErrSecureConfigNoHash, ErrChecksumsDoNotMatch:
		return err
	}
	e := &StartError{Path: name, Err: err}
	e.hint = startHint(e, &config.HandshakeConfig)
	return e
}

// executed is the file that a command executes.
func executed(cmd *exec.Cmd) string {
	if filepath.IsAbs(cmd.Path) {
		return cmd.Path
	}
	return filepath.Join(cmd.Dir, cmd.Path)
}

// SecureConfig describes a binary by its checksum. On Linux with /proc the file
// that is summed is the file that is executed, even if another is put in its
// place meanwhile; a script then finds another path than its own in $0.
// Elsewhere that other file would be executed, and nothing helps where the file
// itself is rewritten.
type SecureConfig struct {
	// Checksum is what Hash must sum the binary up to.
	Checksum []byte
	// Hash is the algorithm, as from sha256.New(). If it is a hash.Cloner, as
	// those of the standard library are, it is not changed, and several
	// goroutines may use one SecureConfig.
	Hash hash.Hash
}

// Check reports whether the file's checksum is the right one; that it is not is
// no error. [ErrSecureConfigNoChecksum] and [ErrSecureConfigNoHash] are. It may
// be called again and again.
func (s *SecureConfig) Check(filePath string) (bool, error) {
	f, err := s.open(context.Background(), filePath)
	if f != nil {
		_ = f.Close()
	}
	if err == ErrChecksumsDoNotMatch {
		return false, nil
	}
	return err == nil, err
}

func (s *SecureConfig) check(ctx context.Context, r io.Reader) (bool, error) {
	h := s.Hash
	if c, ok := h.(hash.Cloner); ok {
		clone, err := c.Clone()
		if err != nil {
			return false, err
		}
		h = clone.(hash.Hash)
	}
	h.Reset()
	if _, err := io.Copy(h, interruptible{ctx, r}); err != nil {
		return false, err
	}
	return bytes.Equal(h.Sum(nil), s.Checksum), nil
}

// interruptible reads until its context ends: a large binary may take longer
// to be summed up than Kill may take.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i interruptible) Read(p []byte) (int, error) {
	if i.ctx.Err() != nil {
		return 0, contextError(i.ctx)
	}
	return i.r.Read(p)
}

// open opens a file whose checksum is the right one. If it returns a file,
// that has to be closed, also with an error.
func (s *SecureConfig) open(ctx context.Context, path string) (*os.File, error) {
	switch {
	case len(s.Checksum) == 0:
		return nil, ErrSecureConfigNoChecksum
	case s.Hash == nil:
		return nil, ErrSecureConfigNoHash
	}
	// Opening anything else may block.
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil, cmp.Or(err, fmt.Errorf("%s is not a regular file", path))
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	same, err := s.check(ctx, f)
	if err == nil && !same {
		err = ErrChecksumsDoNotMatch
	}
	return f, err
}

// pin makes the command run the open file f, whatever becomes of its path.
// The process finds it under a name like the binary's, among its descriptors.
func (p *process) pin(f *os.File) {
	if runtime.GOOS != "linux" {
		return
	}
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		return
	}
	link := filepath.Join(p.dir, filepath.Base(p.cmd.Path))
	fd := p.addFile(f)
	if os.Symlink(fmt.Sprintf("/proc/self/fd/%d", fd), link) == nil {
		p.cmd.Path = link
	}
}

// addFile hands f to the process and returns its descriptor there.
func (p *process) addFile(f *os.File) int {
	p.cmd.ExtraFiles = append(slices.Clip(p.cmd.ExtraFiles), f)
	return 2 + len(p.cmd.ExtraFiles)
}

// hold makes the plugin's life depend on this process, and returns what tells
// the plugin so. On Unix that is a pipe of which it reads the returned end: it
// comes to an end with this process, however that ends.
func (p *process) hold(detach bool) (life string, end *os.File, err error) {
	if detach {
		return lifeDetached, nil, nil
	}
	if runtime.GOOS == "windows" {
		return lifePid + strconv.Itoa(os.Getpid()), nil, nil
	}
	end, p.lifeline, err = os.Pipe()
	if err != nil {
		return "", nil, err
	}
	return lifePipe + strconv.Itoa(p.addFile(end)), end, nil
}

// detach lets the plugin outlive this process.
func (p *process) detach() {
	p.letGo.Do(func() {
		if p.lifeline != nil {
			_, _ = p.lifeline.Write([]byte{1})
			_ = p.lifeline.Close()
		}
	})
}

// copyOutput starts reading what the process prints, until it ends or is
// closed by free. It goes into the host's own logger and writer, so nothing
// waits for it without a bound.
func (p *process) copyOutput(config *ClientConfig) {
	size := config.PluginLogBufferSize
	lines := []*lineWriter{{max: max(size, maxHandshake), emit: p.counted(p.stdoutLine)}, {max: size, emit: p.counted(p.log.line)}}
	raw := io.Discard
	if config.Stderr != nil {
		raw = &heedless{w: config.Stderr, logger: p.logger}
	}
	writers := []io.Writer{lines[0], io.MultiWriter(&p.log.tail, lines[1], raw)}
	for i := range p.output {
		p.copied[i] = make(chan struct{})
		go func() {
			defer close(p.copied[i])
			_, _ = io.Copy(writers[i], p.output[i])
			_ = lines[i].Close()
		}()
	}
}

// counted counts the lines that are emitted.
func (p *process) counted(emit func([]byte, int)) func([]byte, int) {
	return func(line []byte, left int) {
		p.lines.Add(1)
		emit(line, left)
	}
}

// stdoutLine takes a line of the process's own stdout. That is the handshake,
// once; what is printed before is a mistake of the plugin's, but no fatal one.
// The handshake may have an empty line ahead of it.
func (p *process) stdoutLine(line []byte, left int) {
	text := printable(string(line)) + cutMark(left)
	if p.handshaken {
		p.logger.Log(hclog.Debug, text)
		return
	}
	p.handshaken = isHandshake(line)
	if p.blank && !p.handshaken {
		p.noise("")
	}
	p.blank = text == ""
	switch {
	case p.handshaken && left > 0:
		p.shaken <- "" // too long
	case p.handshaken:
		p.shaken <- string(line)
	case !p.blank:
		p.noise(text)
	}
}

func (p *process) noise(text string) {
	p.logger.Warn("the plugin printed to stdout before its handshake", "line", text)
	if room := headSize - p.head.Len(); room > 0 {
		p.head.WriteString(text[:min(room, len(text))])
		p.head.WriteByte('\n')
	}
}

// awaitHandshake waits until the plugin says that it is ready.
func (p *process) awaitHandshake(ctx context.Context, timeout time.Duration) (h handshake, err error) {
	late := time.NewTimer(timeout)
	defer late.Stop()
	var line string
	select {
	case line = <-p.shaken:
	case <-ctx.Done():
		return h, contextError(ctx)
	case <-late.C:
		return h, fmt.Errorf("it has not sent its handshake within %v: %w", timeout, context.DeadlineExceeded)
	case <-p.copied[0]:
		select {
		case line = <-p.shaken:
		default:
			if waitFor(drainTimeout, p.gone) {
				return h, errors.New("it exited without a handshake")
			}
			return h, errors.New("it closed its stdout without a handshake")
		}
	}
	if line == "" {
		return h, fmt.Errorf("its handshake is longer than %d bytes", maxHandshake)
	}
	return parseHandshake(line)
}

// AttachedRunner is a running plugin that a host has found by its own means.
type AttachedRunner interface {
	// Wait waits for the plugin to exit.
	Wait(context.Context) error
	// Kill ends the plugin.
	Kill(context.Context) error
	// ID identifies the plugin.
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
	// ReattachFunc, if not nil, finds the process instead of Pid.
	ReattachFunc func() (AttachedRunner, error)
	// Test says that the plugin runs in test mode: Kill only disconnects.
	Test bool
}

// findProcess finds a process to reattach to.
func findProcess(rc *ReattachConfig, logger hclog.Logger) (*process, error) {
	proc, err := os.FindProcess(rc.Pid)
	if err != nil || rc.Pid <= 0 {
		return nil, ErrProcessNotFound
	}
	p := &process{
		Process: proc, pid: rc.Pid, addr: rc.Addr, logger: logger,
		gone: make(chan struct{}), abandoned: make(chan struct{}),
	}
	if p.name, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", rc.Pid)); err != nil {
		p.name = fmt.Sprintf("with pid %d", rc.Pid)
	}
	if !p.alive() {
		_ = proc.Release()
		return nil, ErrProcessNotFound
	}
	return p, nil
}

// alive reports whether a process that need not be our child still runs.
func (p *process) alive() bool {
	if runtime.GOOS == "windows" {
		return true // it was found; see hasEnded
	}
	if p.Signal(syscall.Signal(0)) != nil {
		return false
	}
	// What nobody has waited for is still there for signals. Where there is no
	// /proc, it counts as running.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	if err != nil {
		return true
	}
	_, after, _ := bytes.Cut(stat, []byte(") "))
	return !bytes.HasPrefix(after, []byte("Z"))
}

// hasEnded reports whether a process that is not our child had ended when it
// was found. Windows finds it as long as anybody holds it, and only waiting
// tells. It is called once, before wait.
func (p *process) hasEnded() bool {
	if runtime.GOOS != "windows" {
		return !p.alive()
	}
	p.ended = make(chan struct{})
	go func() { // ends with the process; nothing could end it sooner
		defer close(p.ended)
		_, _ = p.Wait()
	}()
	return waitFor(pollInterval, p.ended)
}

// mine reports whether the process is surely the plugin. Our child is. Another
// one is if the socket, which was alive when the process was looked up, has
// its pid in its name, as this library's plugins give it.
func (p *process) mine() bool {
	if p.cmd != nil {
		return true
	}
	_, name := filepath.Split(p.addr.String())
	return strings.HasPrefix(name, socketPrefix+strconv.Itoa(p.pid)+"-")
}

// kill ends the process, unless it may be somebody else's.
func (p *process) kill() {
	if p.mine() {
		_ = p.Kill()
	} else {
		p.logger.Warn("it is not known whether the process is the plugin, so it is left alone", "pid", p.pid)
	}
}

// wait waits for the end of the process and its output, and frees all it had.
// When hurry is closed, output that is late is waited for once and not again.
func (p *process) wait(hurry <-chan struct{}) {
	defer close(p.gone)
	if p.cmd == nil {
		p.waitStranger()
		p.exited.Store(true)
		p.removeSocket()
		return
	}
	// The error is about the exit, which state tells, and about copying stdin.
	_ = p.cmd.Wait()
	p.exited.Store(true)
	for range drainRounds {
		before := p.lines.Load()
		if waitFor(drainTimeout, p.copied[:]...) || p.lines.Load() == before || isClosed(hurry) {
			break
		}
	}
	p.free()
	waitFor(drainTimeout/5, p.copied[:]...)
	p.state = p.cmd.ProcessState
	givenMu.Lock()
	defer givenMu.Unlock()
	if p.given.Process == p.Process {
		p.given.ProcessState = p.state
	}
}

// waitStranger waits for the end of a process that is not our child.
func (p *process) waitStranger() {
	if runtime.GOOS != "windows" {
		for p.alive() && !waitFor(pollInterval, p.abandoned) {
		}
		_ = p.Release()
		return
	}
	select {
	case <-p.ended:
	case <-p.abandoned:
	}
}

// abandon ends the waiting for a process that is not our child.
func (p *process) abandon() {
	if p.cmd == nil {
		p.letGo.Do(func() { close(p.abandoned) })
	}
}

// free gives back what the host holds for the process.
func (p *process) free() {
	p.letGo.Do(func() {
		if p.lifeline != nil {
			_ = p.lifeline.Close()
		}
	})
	for _, r := range p.output {
		if r != nil {
			_ = r.Close()
		}
	}
	if p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}

// removeSocket removes what a plugin that was reattached to may have left. The
// directory is removed also where the plugin is one of go-plugin's: it is this
// library's, and it is empty once the plugin has removed its socket.
func (p *process) removeSocket() {
	if _, unix := p.addr.(*net.UnixAddr); !unix {
		return
	}
	if p.mine() {
		_ = os.Remove(p.addr.String())
	}
	if dir := filepath.Dir(p.addr.String()); isPrivate(dir) {
		_ = os.Remove(dir)
	}
}

// printed returns the first that the process printed to its stdout instead of
// a handshake, and the last that it printed to its stderr.
func (p *process) printed() (stdout, stderr string) {
	if p.cmd != nil && isClosed(p.copied[0]) {
		stdout = p.head.String()
	}
	return stdout, p.log.tail.String()
}

// exitError says how the process ended. It is called when gone is closed.
func (p *process) exitError() *ExitError {
	e := &ExitError{Path: p.name, State: p.state, Stderr: p.log.tail.String()}
	if p.state != nil && !p.state.Success() && isClosed(p.copied[1]) {
		e.Panic = strings.TrimSpace(string(p.log.crash))
	}
	return e
}

// waitFor waits until all channels are closed, but not longer than that.
func waitFor(timeout time.Duration, chans ...chan struct{}) bool {
	late := time.NewTimer(timeout)
	defer late.Stop()
	for _, ch := range chans {
		select {
		case <-ch:
		case <-late.C:
			return false
		}
	}
	return true
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
