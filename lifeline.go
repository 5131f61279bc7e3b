package plugin

// This file is about how a plugin exits with its host, both ends of it. On Unix, the plugin
// reads from a pipe, the lifeline, and the host holds the other end: the system closes it
// when the host exits or crashes, also if there is a process between the two. A byte in the
// pipe detaches the plugin. On Windows, the plugin waits for the process of the host.

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"time"
)

// hostInfo tells a plugin about its host. Its variable is inherited: if the host
// uses go-plugin, it may be about the host of that host.
type hostInfo struct {
	pid   int    // of the host
	fd    int    // of the pipe, for watchPipe
	watch string // how the plugin detects the end of the host
}

const (
	watchPipe    = "pipe" // by reading from a pipe that the host holds open
	watchPid     = "pid"  // by waiting for the process, on Windows
	watchNothing = "nothing"
)

func (h hostInfo) String() string { return fmt.Sprintf("%d %d %s", h.pid, h.fd, h.watch) }

// parseHostInfo returns the zero hostInfo for anything but what String returns.
func parseHostInfo(s string) (h hostInfo) {
	if _, err := fmt.Sscanf(s, "%d %d %s", &h.pid, &h.fd, &h.watch); err != nil {
		return hostInfo{}
	}
	return h
}

// hold makes the plugin exit when this process does. It returns the variable for the
// plugin. On Unix, the plugin reads from a pipe, whose other end the system closes when
// this process exits or crashes.
func (p *child) hold() (string, error) {
	host := hostInfo{pid: os.Getpid(), watch: watchPid}
	switch {
	case p.config.Detach:
		host.watch = watchNothing
	case runtime.GOOS != "windows":
		end, lifeline, err := os.Pipe()
		if err != nil {
			return "", err
		}
		p.lifeline = lifeline
		p.opened = append(p.opened, end)
		host.watch, host.fd = watchPipe, p.pass(end)
	}
	return host.String(), nil
}

// detach lets the plugin outlive this process.
func (p *child) detach() {
	if p.lifeline == nil {
		return // it is detached, or watches the host's pid
	}
	p.release.Do(func() {
		_, _ = p.lifeline.Write([]byte{1})
		_ = p.lifeline.Close()
	})
}

// orphanTimeout is how long a plugin may run when its host is gone.
const orphanTimeout = 1500 * time.Millisecond

// isParent reports whether the host is the parent of this process. A host further up, whose
// variable was inherited, is not; nor is a host that is gone, or one that has started this
// process through another, such as a shell.
func (h hostInfo) isParent() bool { return h.pid != 0 && h.pid == os.Getppid() }

// hasExited reports whether there is a host, and its process has exited.
func (h hostInfo) hasExited() bool { return h.pid != 0 && !alive(h.pid) }

// watchHost returns a channel that is closed when the host is gone. After orphanTimeout,
// the process exits and removes dir. The goroutine runs as long as the process, because the
// host may exit while main finishes.
func watchHost(host hostInfo, dir string) <-chan struct{} {
	gone := make(chan struct{})
	var pipe *os.File
	if host.watch == watchPipe {
		// A process in between may have closed it and reused the descriptor.
		pipe = os.NewFile(uintptr(host.fd), "lifeline")
		info, err := pipe.Stat()
		if err != nil || info.Mode()&os.ModeNamedPipe == 0 {
			foreign = append(foreign, pipe)
			return gone
		}
	}
	go exitAfterHost(host, pipe, dir, gone) // ends with the process
	return gone
}

// exitAfterHost waits until the host is gone, closes gone, and exits after orphanTimeout.
func exitAfterHost(host hostInfo, pipe *os.File, dir string, gone chan<- struct{}) {
	if !host.awaitEnd(pipe) {
		return
	}
	close(gone)
	time.Sleep(orphanTimeout)
	removePrivate(dir)
	os.Exit(1)
}

// foreign has the files that watchHost found instead of a pipe. References keep them
// open.
var foreign []*os.File

// awaitEnd waits until the host is gone. It returns false if the host has detached the
// plugin or uses go-plugin.
func (h hostInfo) awaitEnd(pipe *os.File) bool {
	switch h.watch {
	case watchPipe:
		_, err := pipe.Read(make([]byte, 1))
		return err == io.EOF
	case watchPid:
		process, err := os.FindProcess(h.pid)
		if err != nil { // it is gone, or runs as another user
			return !errors.Is(err, fs.ErrPermission)
		}
		_, err = process.Wait()
		return err == nil
	}
	return false
}
