package plugin

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

// pollInterval is how often a process that is not a child is checked.
const pollInterval = 50 * time.Millisecond

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
