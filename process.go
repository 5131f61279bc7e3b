package plugin

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// This file is about the process of a plugin that this host starts: what it gets, how it
// becomes a plugin, and how it ends.

const (
	maxHandshake = 64 << 10              // the length of the handshake line
	busyTimeout  = time.Second           // how long a start waits while the binary is open for writing
	busyPause    = 10 * time.Millisecond // between two attempts to start it
)

// child is the process of a plugin that this host has started. It is an AttachedRunner, too.
type child struct {
	config *ClientConfig
	cmd    *exec.Cmd // a copy of shared
	shared sharedCmd // of config
	path   string    // of the binary, in shared

	hint     string          // a possible cause of the error of start
	info     hostInfo        // what the plugin is told
	opened   []*os.File      // for the process; closed here when it has started
	lifeline *os.File        // the host's end; nil if the plugin is detached, and on Windows
	cert     tls.Certificate // of the host, with AutoMTLS
	dir      string          // private, for the socket; "" if there is none

	input      *inputPipe // nil if Cmd.Stdin is a file
	writers    *hostWriters
	pipes      []*outputPipe // of stdout and stderr, and of os.Stdout and os.Stderr within Serve
	lines      [2]lineWriter // of the process's stdout and stderr
	handshakes chan string   // receives the handshake; closed if there will be none
	found      bool          // the handshake has been read; used by the reader of stdout
	noise      tail          // output to stdout before the handshake
	log        stderrLog

	reapedElsewhere atomic.Bool // waiting for the process has failed
}

// launch starts a plugin, and copies its output to the writers. It returns the errors of
// Client.Start.
func launch(ctx context.Context, config *ClientConfig, writers *hostWriters) (*child, error) {
	p := newChild(config)
	p.writers = writers
	err := p.start(ctx)
	for _, f := range p.opened {
		_ = f.Close() // the process has its own
	}
	if err == nil {
		return p, nil
	}
	p.free()
	switch err {
	case ErrSecureConfigNoChecksum, ErrSecureConfigNoHash, ErrChecksumsDoNotMatch:
		return nil, err
	}
	return nil, &StartError{Path: p.path, Err: err, hint: p.hint}
}

func newChild(config *ClientConfig) *child {
	shared := sharedCmd{config.Cmd}
	return &child{
		config:     config,
		cmd:        shared.copy(),
		shared:     shared,
		path:       config.Cmd.Path,
		handshakes: make(chan string, 1),
		log:        stderrLog{logger: config.Logger},
	}
}

// start prepares the command and executes it. If it fails, free releases what is left.
func (p *child) start(ctx context.Context) error {
	binary, err := p.check()
	if err != nil {
		return err
	}
	if p.config.sendsCertificate() {
		p.cert, err = newCertificate()
		if err != nil {
			return err
		}
	}
	// The descriptors for the process are made before its environment, which names them.
	err = p.makeLifeline()
	if err != nil {
		return err
	}
	err = p.redirect()
	if err != nil {
		return err
	}
	// The directory is made late: if the host dies before the plugin has begun, it stays.
	p.dir, err = p.config.UnixSocketConfig.makeDir()
	if err != nil {
		return err
	}
	p.pin(binary)
	p.cmd.Env = p.environment()
	p.wrapCancel()
	err = p.execute(ctx)
	if err != nil {
		return err
	}
	p.shared.started(p.cmd.Process)
	if p.input != nil {
		go p.input.copy() // ends with the process, if Cmd.Stdin does not block then
	}
	for _, pipe := range p.pipes {
		go pipe.copy() // ends with the output, or with finish
	}
	return nil
}

// check opens the binary, if it has the checksum of SecureConfig. It returns nil if
// there is no SecureConfig.
func (p *child) check() (*os.File, error) {
	if p.config.SecureConfig == nil {
		return nil, nil
	}
	binary, err := p.config.SecureConfig.open(executed(p.cmd))
	if err != nil {
		p.hint = binaryHint(p.shared.Cmd, err)
		return nil, err
	}
	p.opened = append(p.opened, binary)
	return binary, nil
}

// pass passes f to the process. It may be called until the command is executed.
func (p *child) pass(f *os.File) passedFile {
	p.cmd.ExtraFiles = append(slices.Clip(p.cmd.ExtraFiles), f)
	fd := 2 + len(p.cmd.ExtraFiles) // after stdin, stdout and stderr
	return passedFile{Descriptor: fd, Identity: identity(int(f.Fd()))}
}

// makeLifeline makes the plugin exit when this process does, unless it is to be detached.
func (p *child) makeLifeline() error {
	p.info = newHostInfo(p.config.Detach)
	if p.config.Detach || runtime.GOOS == "windows" {
		return nil
	}
	end, lifeline, err := os.Pipe()
	if err != nil {
		return err
	}
	p.lifeline = lifeline
	p.opened = append(p.opened, end)
	p.info.Lifeline = p.pass(end)
	return nil
}

// pin makes the command execute the open file, even if its path changes: the child has it
// in /proc/self/fd, at the number of pass. The link keeps the name of the binary.
func (p *child) pin(binary *os.File) {
	if binary == nil || runtime.GOOS != "linux" {
		return
	}
	_, err := os.Stat("/proc/self/fd")
	if err != nil {
		return
	}
	link := filepath.Join(p.dir, filepath.Base(p.cmd.Path))
	p.info.Binary = p.pass(binary)
	err = os.Symlink(fmt.Sprintf("/proc/self/fd/%d", p.info.Binary.Descriptor), link)
	if err == nil {
		p.cmd.Path = link
	}
}

// environment returns the plugin's environment: the host's, Cmd.Env and the variables
// of the handshake, where later ones win. If the host is a plugin itself, its own
// handshake is left out.
func (p *child) environment() []string {
	config := p.config
	var env []string
	if !config.SkipHostEnv {
		env = os.Environ()
	}
	env = append(env, p.cmd.Env...)
	env = slices.DeleteFunc(env, isProtocolVariable)
	env = append(env,
		config.MagicCookieKey+"="+config.MagicCookieValue,
		fmt.Sprintf("%s=%d", envMinPort, config.MinPort),
		fmt.Sprintf("%s=%d", envMaxPort, config.MaxPort),
		envVersions+"="+versionList(config.VersionedPlugins),
		envHost+"="+p.info.String(),
	)
	if p.cert.Certificate != nil {
		block := &pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Certificate[0]}
		env = append(env, envClientCert+"="+string(pem.EncodeToMemory(block)))
	}
	if p.dir != "" {
		env = append(env, EnvUnixSocketDir+"="+p.dir)
	}
	if group := config.UnixSocketConfig.Group; group != "" {
		env = append(env, EnvUnixSocketGroup+"="+group)
	}
	return env
}

// passInput sets where the input of the process comes from. os/exec would wait for a Read of
// a Stdin that is not a file, even after the end of the process.
func (p *child) passInput() (err error) {
	if p.cmd.Stdin == nil {
		p.cmd.Stdin = os.Stdin
	}
	if _, isFile := p.cmd.Stdin.(*os.File); isFile {
		return nil
	}
	p.input, err = newInputPipe(p.cmd.Stdin)
	if err != nil {
		return err
	}
	p.opened = append(p.opened, p.input.reader)
	p.cmd.Stdin = p.input.reader
	return nil
}

// redirect sets where the input of the process comes from and where its output goes.
func (p *child) redirect() error {
	err := p.passInput()
	if err != nil {
		return err
	}
	size := p.config.PluginLogBufferSize
	p.lines[0] = lineWriter{max: max(size, maxHandshake), emit: p.stdoutLine}
	p.lines[1] = lineWriter{max: size, emit: p.log.line}
	p.pipes = []*outputPipe{
		newOutputPipe(newHostWriter(nil), &p.lines[0]), // no Writer gets the stdout of the process
		newOutputPipe(p.writers.processStderr, &p.lines[1], &p.log.tail),
		newOutputPipe(p.writers.stdout),
		newOutputPipe(p.writers.stderr, &p.log.tail),
	}
	if p.lifeline == nil {
		p.pipes = p.pipes[:2] // It is detached, or on Windows, and sends the rest.
	}
	var writers []*os.File
	for _, pipe := range p.pipes {
		writer, err := pipe.open()
		if err != nil {
			return err
		}
		writers = append(writers, writer)
		p.opened = append(p.opened, writer)
	}
	p.cmd.Stdout, p.cmd.Stderr = writers[0], writers[1]
	if len(writers) > 2 {
		p.info.Stdout = p.pass(writers[2])
		p.info.Stderr = p.pass(writers[3])
	}
	return nil
}

// wrapCancel makes the Cancel of the caller's command find this process there.
func (p *child) wrapCancel() {
	cancel := p.cmd.Cancel
	if cancel == nil {
		return
	}
	p.cmd.Cancel = func() error { return p.shared.cancel(p.cmd.Process, cancel) }
}

// execute starts the process. While the binary is open for writing, it tries again: a
// binary that was just written stays open for a moment in a process that another thread
// has forked.
func (p *child) execute(ctx context.Context) error {
	prepared := *p.cmd
	end := time.Now().Add(busyTimeout)
	for {
		err := p.cmd.Start()
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.ETXTBSY) || time.Now().After(end) || ctx.Err() != nil {
			p.hint = binaryHint(p.shared.Cmd, err)
			return err
		}
		waitFor(busyPause, ctx.Done())
		again := prepared // because a Cmd can be started only once
		p.cmd = &again
	}
}

// stdoutLine handles a line of the process's stdout. Lines before the handshake are a
// mistake in the plugin, but not a fatal one.
func (p *child) stdoutLine(line []byte, cut int) {
	if p.found {
		p.log.logger.Debug(printable(string(line)) + cutMark(cut))
		return
	}
	before, text, found := cutHandshake(line)
	if len(before) > 0 {
		noise := printable(string(before)) + cutMark(cut)
		p.log.logger.Warn("the plugin printed to stdout before its handshake", "line", noise)
		_, _ = fmt.Fprintf(&p.noise, "%s\n", before) // never fails
	}
	if found {
		p.found = true
		p.handshakes <- string(text) // there is room for it
	}
}

var errNoHandshake = errors.New("it exited without a handshake")

// awaitHandshake waits for the handshake, and checks whether the host can use the plugin.
func (p *child) awaitHandshake(ctx context.Context) (h handshake, err error) {
	timeout := p.config.StartTimeout
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case line, ok := <-p.handshakes:
		if !ok {
			return h, errNoHandshake
		}
		if ctx.Err() != nil { // select chooses at random
			return h, contextError(ctx)
		}
		h, err = parseHandshake(line)
		if err == nil {
			h.tls, err = p.config.tlsFor(h, p.cert)
		}
		return h, err
	case <-ctx.Done():
		return h, contextError(ctx)
	case <-timer.C:
		return h, fmt.Errorf("it has not sent its handshake within %v (ClientConfig.StartTimeout): %w",
			timeout, context.DeadlineExceeded)
	}
}

// ID returns the pid.
func (p *child) ID() string { return strconv.Itoa(p.cmd.Process.Pid) }

// Kill kills the process.
func (p *child) Kill(context.Context) error {
	if p.reapedElsewhere.Load() {
		return os.ErrProcessDone // another process may have the pid by now
	}
	return p.cmd.Process.Kill()
}

// Wait waits until the process and its output have ended, and returns an *ExitError.
// It does not use its context: a client kills a process rather than stop waiting.
func (p *child) Wait(context.Context) error {
	err := p.cmd.Wait()
	p.reapedElsewhere.Store(p.cmd.ProcessState == nil)
	for _, pipe := range p.pipes {
		pipe.finish()
	}
	for i := range p.lines {
		_ = p.lines[i].Close() // never fails
	}
	close(p.handshakes)
	p.shared.ended(p.cmd.Process, p.cmd.ProcessState)
	p.free()
	return p.exitError(err)
}

// exitError returns how the process has ended. Waiting for it has returned err, which
// matters only if there is no ProcessState.
func (p *child) exitError(err error) *ExitError {
	e := &ExitError{Path: p.path, State: p.cmd.ProcessState, Stderr: p.log.tail.String()}
	if e.State == nil {
		e.Err = fmt.Errorf("the process has ended, and its exit status is unknown: %w", err)
	}
	if e.State == nil || !e.State.Success() {
		e.Panic = p.log.crash.ofExit(e.State.ExitCode()) // -1 without a State
	}
	return e
}

// free releases what the host holds for the process.
func (p *child) free() {
	_ = p.lifeline.Close() // a nil *os.File can be closed
	if p.input != nil {
		_ = p.input.writer.Close() // what has not been written, nobody reads
	}
	for _, pipe := range p.pipes {
		_ = pipe.reader.Close() // everything has been read
	}
	if p.dir != "" {
		_ = os.RemoveAll(p.dir) // what is left there is the plugin's
	}
}

// detach lets the plugin outlive this process, and returns how another host reattaches. It
// waits until the plugin has stopped using the pipes, or for graceTimeout each: nothing reads
// the pipes when this process has exited.
func (p *child) detach(h handshake) *ReattachConfig {
	if p.lifeline != nil {
		_, _ = p.lifeline.Write([]byte{1}) // fails if the plugin has exited, or is detached
		_ = p.lifeline.Close()             // a pipe has no errors of writing later
	}
	if h.sameLibrary { // so it may have taken the pipes
		for _, pipe := range p.pipes[2:] {
			waitFor(graceTimeout, pipe.done) // a child of the plugin may hold it
		}
	}
	return &ReattachConfig{
		Protocol:        h.protocol,
		ProtocolVersion: h.version,
		Addr:            h.addr,
		Pid:             p.cmd.Process.Pid,
	}
}

// giveUp ends a process that has not become a plugin because of err, and describes it.
// exited is closed when the process has ended.
func (p *child) giveUp(err error, exited <-chan struct{}) *StartError {
	byItself := err == errNoHandshake
	if !byItself {
		_ = p.Kill(context.Background()) // fails only if it has exited
	}
	ended := waitFor(reapTimeout, exited)
	e := &StartError{Path: p.path, Err: err, Stdout: p.noise.String(), Stderr: p.log.tail.String()}
	if byItself && ended {
		e.State = p.cmd.ProcessState
	}
	e.hint = behaviourHint(e, p.config.MagicCookieKey)
	return e
}
