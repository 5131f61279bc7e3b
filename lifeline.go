package plugin

// This file is about how a plugin exits with its host, both ends of it. On Unix, the plugin
// reads from a pipe, the lifeline, and the host holds the other end: the system closes it
// when the host exits or crashes, also if there is a process between the two. A byte in the
// pipe detaches the plugin. Where a process in between has closed the pipe, the plugin
// watches the process of the host, if it can be sure which one that is. On Windows, it
// waits for that process.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	orphanTimeout = 1500 * time.Millisecond // how long a plugin may run when its host is gone
	pollInterval  = 50 * time.Millisecond   // how often a process that is not a child is checked
)

// hostInfo tells a plugin about its host. Its variable is inherited: if the host
// uses go-plugin, it may be about the host of that host.
type hostInfo struct {
	pid     int
	started uint64 // when the process began, as startTime has it
	watch   string // how the plugin detects the end of the host

	lifeline, stdout, stderr, binary passedFile
}

const (
	watchPipe    = "pipe" // by reading from a pipe that the host holds open
	watchPid     = "pid"  // by waiting for the process, on Windows
	watchNothing = "nothing"
)

func newHostInfo(detached bool) hostInfo {
	h := hostInfo{pid: os.Getpid(), started: startTime(os.Getpid()), watch: watchPipe}
	switch {
	case detached:
		h.watch = watchNothing
	case runtime.GOOS == "windows":
		h.watch = watchPid
	}
	return h
}

func (h hostInfo) String() string {
	return fmt.Sprintf("%d %d %s %v %v %v %v",
		h.pid, h.started, h.watch, h.lifeline, h.stdout, h.stderr, h.binary)
}

// parseHostInfo returns the zero hostInfo for anything but what String returns.
func parseHostInfo(s string) (h hostInfo) {
	var files [4]string
	_, err := fmt.Sscanf(s, "%d %d %s %s %s %s %s",
		&h.pid, &h.started, &h.watch, &files[0], &files[1], &files[2], &files[3])
	for i, file := range []*passedFile{&h.lifeline, &h.stdout, &h.stderr, &h.binary} {
		if err == nil {
			*file, err = parsePassedFile(files[i])
		}
	}
	if err != nil {
		return hostInfo{}
	}
	return h
}

// isParent reports whether the host is the parent of this process. A host further up, whose
// variable was inherited, is not; nor is a host that is gone, or one that has started this
// process through another, such as a shell. In another namespace of processes, the number
// may be that of another process.
func (h hostInfo) isParent() bool {
	if h.pid == 0 || h.pid != os.Getppid() {
		return false
	}
	started := startTime(h.pid)
	return h.started == 0 || started == 0 || started == h.started
}

// hasExited reports whether there is a host, and its process has exited.
func (h hostInfo) hasExited() bool { return h.pid != 0 && !alive(h.pid) }

// passedFile is an open file that the host has passed to the plugin. A process in between
// may close it and use its number for another, so it has an identity. The zero passedFile
// is none.
type passedFile struct {
	fd int    // in the plugin
	id string // as identity has it
}

func (f passedFile) String() string { return fmt.Sprintf("%d=%s", f.fd, f.id) }

func parsePassedFile(s string) (f passedFile, err error) {
	fd, id, _ := strings.Cut(s, "=")
	f.id = id
	f.fd, err = strconv.Atoi(fd)
	return f, err
}

// take returns the file, or nil if the descriptor is not that of the file. Child processes
// of the plugin do not inherit it.
func (f passedFile) take() *os.File {
	if f.id == "" || identity(f.fd) != f.id {
		return nil
	}
	keepToItself(f.fd)
	return os.NewFile(uintptr(f.fd), "from the host")
}

// lifeline is the host's end of the pipe. A nil lifeline has no effect.
type lifeline struct {
	end  *os.File
	once sync.Once // closes end
}

// newLifeline also returns the plugin's end.
func newLifeline() (*lifeline, *os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	return &lifeline{end: w}, r, nil
}

// cut makes the plugin exit, unless it has been detached.
func (l *lifeline) cut() {
	if l != nil {
		l.once.Do(func() { _ = l.end.Close() }) // nothing was written that could be lost
	}
}

// detach lets the plugin outlive this process.
func (l *lifeline) detach() {
	if l != nil {
		l.once.Do(func() {
			_, _ = l.end.Write([]byte{1}) // fails if the plugin has exited
			_ = l.end.Close()             // a pipe has no errors of writing later
		})
	}
}

// hostWatch is the plugin's view of its host.
type hostWatch struct {
	host     hostInfo
	lifeline *os.File      // nil if the host has passed none, or it has not arrived
	gone     chan struct{} // closed when the host is gone
	detached chan struct{} // closed when the host has detached the plugin
	logger   hclog.Logger
}

// watchHost watches the host. When it is gone, the process exits after orphanTimeout and
// removes dir.
func watchHost(host hostInfo, dir string, logger hclog.Logger) *hostWatch {
	w := &hostWatch{
		host:     host,
		lifeline: host.lifeline.take(),
		gone:     make(chan struct{}),
		detached: make(chan struct{}),
		logger:   logger,
	}
	// Ends with the process, because the host may exit while main finishes.
	go w.exitAfterHost(dir)
	return w
}

// takePipes returns the pipes for os.Stdout and os.Stderr that the host reads, or nil for
// both. They are for the plugin of that host, and not for one further down. Without a
// lifeline, the plugin could not be told to leave them.
func (w *hostWatch) takePipes(hostIsParent bool) (pipes [2]*os.File) {
	_ = w.host.binary.take().Close() // the process needs it no more
	stdout, stderr := w.host.stdout.take(), w.host.stderr.take()
	if hostIsParent && w.lifeline != nil && stdout != nil && stderr != nil {
		return [2]*os.File{stdout, stderr}
	}
	_ = stdout.Close() // a nil *os.File can be closed
	_ = stderr.Close()
	return pipes
}

// exitAfterHost waits until the host is gone, gives main orphanTimeout to finish, and exits.
func (w *hostWatch) exitAfterHost(dir string) {
	if !w.awaitEnd() {
		return
	}
	close(w.gone)
	time.Sleep(orphanTimeout)
	removePrivate(dir)
	os.Exit(1)
}

// awaitEnd waits until the host is gone. It returns false if there is nothing to wait for:
// the host has detached the plugin, or uses go-plugin, or cannot be watched.
func (w *hostWatch) awaitEnd() bool {
	switch {
	case w.lifeline != nil:
		_, err := w.lifeline.Read(make([]byte, 1))
		if err != io.EOF {
			close(w.detached)
		}
		return err == io.EOF
	case w.host.watch == watchPipe:
		return w.host.pollEnd(w.logger)
	case w.host.watch == watchPid:
		return w.host.waitEnd()
	}
	return false
}

// pollEnd waits until the process of the host has exited. It returns false if it cannot be
// sure which one that is: the number may be that of another process, above all in another
// namespace of processes.
func (h hostInfo) pollEnd(logger hclog.Logger) bool {
	isParent := h.isParent()
	if !isParent && (h.started == 0 || startTime(h.pid) != h.started) {
		logger.Warn("the plugin cannot detect the end of its host: " +
			"a process between the two has closed a pipe")
		return false
	}
	for exists := true; exists; {
		time.Sleep(pollInterval)
		if isParent {
			exists = os.Getppid() == h.pid
		} else {
			exists = startTime(h.pid) == h.started
		}
	}
	return true
}

// waitEnd is pollEnd on Windows.
func (h hostInfo) waitEnd() bool {
	process, err := os.FindProcess(h.pid)
	if err != nil { // it is gone, or runs as another user
		return !errors.Is(err, fs.ErrPermission)
	}
	_, err = process.Wait()
	return err == nil
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
	stat := processStat(pid)
	isZombie := len(stat) > 0 && string(stat[0]) == "Z"
	return p.Signal(syscall.Signal(0)) == nil && !isZombie
}

// startTime returns when a process began, in a unit of the system. It returns 0 if the
// system does not tell, or the process has ended.
func startTime(pid int) uint64 {
	stat := processStat(pid)
	if len(stat) < 20 || string(stat[0]) == "Z" {
		return 0
	}
	ticks, err := strconv.ParseUint(string(stat[19]), 10, 64)
	if err != nil {
		return 0
	}
	return ticks
}

// processStat returns what Linux says about a process, from its state on.
func processStat(pid int) [][]byte {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	name := bytes.LastIndex(stat, []byte(") ")) // which may have anything in it
	if name < 0 {
		return nil
	}
	return bytes.Fields(stat[name+2:])
}
