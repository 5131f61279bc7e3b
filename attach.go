package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/hashicorp/go-hclog"
)

// This file is about a plugin that another host has started, or none: how to find its
// process, and how much may be done to it.

// AttachedRunner is a process that [ReattachConfig].ReattachFunc has found. Its methods
// are called concurrently.
type AttachedRunner interface {
	// Wait waits until the process has ended. Client.Err returns its error. ctx ends
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

// name returns the name of the plugin for errors.
func (rc *ReattachConfig) name() string { return fmt.Sprint(reattachedName, rc.Addr) }

// handshake returns what the handshake of the plugin was, as far as it is known.
func (rc *ReattachConfig) handshake(sets map[int]PluginSet) handshake {
	h := handshake{version: rc.ProtocolVersion, addr: rc.Addr, protocol: cmp.Or(rc.Protocol, ProtocolNetRPC)}
	_, known := sets[h.version]
	if h.version == 0 && !known && len(sets) == 1 {
		h.version = sortedKeys(sets)[0] // go-plugin's configs do not tell
	}
	return h
}

// find finds the process of the plugin, if the plugin listens. In test mode, it returns
// nil.
func (rc *ReattachConfig) find(ctx context.Context, logger hclog.Logger) (AttachedRunner, error) {
	err := rc.probe(ctx)
	if err != nil || rc.Test {
		return nil, err
	}
	if rc.ReattachFunc == nil {
		return findProcess(rc, logger)
	}
	p, err := rc.ReattachFunc()
	if err == nil && p == nil {
		err = ErrProcessNotFound
	}
	return p, err
}

// probe connects to the plugin. It returns ErrProcessNotFound if nothing listens there.
func (rc *ReattachConfig) probe(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, rc.Addr.Network(), rc.Addr.String())
	switch {
	case err == nil:
		return conn.Close()
	case ctx.Err() != nil:
		return contextError(ctx)
	case isRefused(err):
		return ErrProcessNotFound
	}
	return err // says nothing about the plugin
}

// isRefused reports whether err says that nothing listens at an address.
func isRefused(err error) bool {
	const refusedOnWindows = syscall.Errno(10061)
	refused := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, refusedOnWindows)
	return refused || errors.Is(err, fs.ErrNotExist)
}

// reattachError describes an error of reattaching. ErrProcessNotFound stays as it is.
func reattachError(err error) error {
	if err == ErrProcessNotFound {
		return err
	}
	return fmt.Errorf("plugin: reattaching: %w", err)
}

// attachedProcess is the process of a plugin that this host has not started.
type attachedProcess struct {
	process *os.Process
	pid     int // process loses it when it is released
	name    string
	addr    net.Addr
	logger  hclog.Logger
}

// findProcess finds the process of a plugin.
func findProcess(rc *ReattachConfig, logger hclog.Logger) (AttachedRunner, error) {
	process, err := os.FindProcess(rc.Pid)
	if err != nil || rc.Pid <= 0 || !alive(rc.Pid) {
		return nil, ErrProcessNotFound
	}
	return &attachedProcess{
		process: process,
		pid:     rc.Pid,
		name:    rc.name(),
		addr:    rc.Addr,
		logger:  logger,
	}, nil
}

// ID returns the pid.
func (p *attachedProcess) ID() string { return strconv.Itoa(p.pid) }

// isCertainlyPlugin reports whether the process is certainly the plugin: plugins of this
// library have their pid in the name of the socket, and the socket accepted a connection
// just before the process was found.
func (p *attachedProcess) isCertainlyPlugin() bool {
	prefix := fmt.Sprintf("%s%d-", socketPrefix, p.pid)
	return strings.HasPrefix(filepath.Base(p.addr.String()), prefix)
}

// Kill kills the process if it is certainly the plugin.
func (p *attachedProcess) Kill(context.Context) error {
	if p.isCertainlyPlugin() {
		return p.process.Kill()
	}
	p.logger.Warn("the process may not be the plugin, so it is left alone", "pid", p.pid)
	return nil
}

// Wait waits until the process has ended and removes its socket. On Windows it does not
// end with ctx: the goroutine of Client.watch waits as long as the process lives.
func (p *attachedProcess) Wait(ctx context.Context) error {
	if runtime.GOOS == "windows" {
		// It cannot be interrupted, and polling would not see the end: while the handle of
		// the process is open, the system still finds its pid.
		_, _ = p.process.Wait()
	} else {
		for alive(p.pid) && ctx.Err() == nil {
			waitFor(pollInterval, ctx.Done())
		}
		_ = p.process.Release() // never fails
	}
	if p.isCertainlyPlugin() && ctx.Err() == nil {
		_ = os.Remove(p.addr.String())
	}
	dir := filepath.Dir(p.addr.String())
	if isPrivate(dir) {
		_ = os.Remove(dir) // unless there is something in it
	}
	return &ExitError{Path: p.name}
}
