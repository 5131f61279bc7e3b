package plugin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file is about how a plugin exits with its host, both ends of it. On Unix, the plugin
// reads from a pipe, the lifeline, and the host holds the other end: the system closes it
// when the host exits or crashes, even if there is a process between the two. A byte in the
// pipe detaches the plugin. Where a process in between has closed the pipe, the plugin
// watches the process of the host, if it can be sure which one that is. On Windows, it
// waits for that process.

const (
	orphanTimeout = 1500 * time.Millisecond // how long a plugin may run when its host is gone
	pollInterval  = 50 * time.Millisecond   // how often a process that is not a child is checked
)

// hostInfo tells a plugin about its host, as JSON. Its variable is inherited: if the host
// uses go-plugin, it may be about the host of that host.
type hostInfo struct {
	Pid      int
	Started  uint64 // when the process began, as processStat has it
	Detached bool   // the plugin may outlive its host

	Lifeline, Stdout, Stderr, Binary passedFile
}

func newHostInfo(detached bool) hostInfo {
	pid := os.Getpid()
	_, started := processStat(pid)
	return hostInfo{Pid: pid, Started: started, Detached: detached}
}

func (h hostInfo) String() string {
	text, _ := json.Marshal(h) // it has only what can be encoded
	return string(text)
}

// parseHostInfo is the inverse of String. It returns the zero hostInfo for other text.
func parseHostInfo(s string) (h hostInfo) {
	err := json.Unmarshal([]byte(s), &h)
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
	if h.Pid == 0 || h.Pid != os.Getppid() {
		return false
	}
	_, started := processStat(h.Pid)
	return h.Started == 0 || started == 0 || started == h.Started
}

// isCertainlyAlive reports whether the process of the host runs, and that is sure: its
// number may be that of another process, above all in another namespace of processes.
func (h hostInfo) isCertainlyAlive() bool {
	if h.isParent() {
		return true
	}
	state, started := processStat(h.Pid)
	return h.Started != 0 && started == h.Started && state != "Z"
}

// passedFile is an open file that the host has passed to the plugin. A process in between
// may close it and use its number for another, so it has an identity. The zero passedFile
// is none.
type passedFile struct {
	Descriptor int    // in the plugin
	Identity   string // as identity has it
}

// take returns the file, or nil if the descriptor is not that of the file. Child processes
// of the plugin do not inherit it.
func (f passedFile) take() *os.File {
	if f.Identity == "" || identity(f.Descriptor) != f.Identity {
		return nil
	}
	keepToItself(f.Descriptor)
	return os.NewFile(uintptr(f.Descriptor), "from the host")
}

// hostWatch is the plugin's view of its host.
type hostWatch struct {
	info     hostInfo
	lifeline *os.File      // nil if the host has passed none, or it has not arrived
	gone     chan struct{} // closed when the host is gone
	detached chan struct{} // closed when the host has detached the plugin
	logger   hclog.Logger
}

// watchHost watches the host. When it is gone, the process exits after orphanTimeout and
// removes dir.
func watchHost(info hostInfo, dir string, logger hclog.Logger) *hostWatch {
	w := &hostWatch{
		info:     info,
		lifeline: info.Lifeline.take(),
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
	// A nil *os.File can be closed.
	_ = w.info.Binary.take().Close() // the process needs it no more
	stdout, stderr := w.info.Stdout.take(), w.info.Stderr.take()
	if hostIsParent && w.lifeline != nil && stdout != nil && stderr != nil {
		return [2]*os.File{stdout, stderr}
	}
	_ = stdout.Close()
	_ = stderr.Close()
	return pipes
}

// shouldRemoveDir reports whether Serve removes the directory of the socket. It does unless
// a host that lives may still own it.
func (w *hostWatch) shouldRemoveDir(hostIsParent bool) bool {
	switch {
	case hostIsParent:
		return true // it has made the directory for this process, and may be gone soon
	case isClosed(w.gone):
		return true
	case w.info.Pid == 0:
		return false // it uses go-plugin and removes the directory itself
	}
	return !alive(w.info.Pid)
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
	case w.info.Pid == 0 || w.info.Detached:
		return false
	case runtime.GOOS == "windows":
		return waitProcess(w.info.Pid)
	case !w.info.isCertainlyAlive():
		w.logger.Warn("the plugin cannot detect the end of its host: " +
			"a process between the two has closed a pipe")
		return false
	}
	for w.info.isCertainlyAlive() {
		time.Sleep(pollInterval)
	}
	return true
}

// waitProcess waits until a process has exited. It returns false if it cannot.
func waitProcess(pid int) bool {
	process, err := os.FindProcess(pid)
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
	err = p.Signal(syscall.Signal(0))
	if err != nil && !errors.Is(err, fs.ErrPermission) { // it may run as another user
		return false
	}
	state, _ := processStat(pid)
	return state != "Z"
}

// processStat returns what Linux says about a process: its state, which is Z for a zombie,
// and when it began, in a unit of the system. Other systems say nothing.
func processStat(pid int) (state string, started uint64) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0
	}
	name := bytes.LastIndexByte(stat, ')') // it may have anything before
	fields := strings.Fields(string(stat[name+1:]))
	if len(fields) < 20 {
		return "", 0
	}
	started, _ = strconv.ParseUint(fields[19], 10, 64) // it is a number
	return fields[0], started
}
