package plugin

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// This file is about where a plugin listens: the Unix socket in its private directory, the
// TCP port on Windows, and the address of either in the handshake.

const (
	// EnvUnixSocketDir is the environment variable with the directory in which
	// the plugin makes its Unix socket. The host sets it.
	EnvUnixSocketDir = "PLUGIN_UNIX_SOCKET_DIR"

	// EnvUnixSocketGroup is the environment variable with the group that may
	// connect to the plugin's Unix socket. The host sets it from
	// UnixSocketConfig.Group.
	EnvUnixSocketGroup = "PLUGIN_UNIX_SOCKET_GROUP"

	envMinPort = "PLUGIN_MIN_PORT"
	envMaxPort = "PLUGIN_MAX_PORT"
)

const (
	socketPrefix = "plugin-" // of sockets and their directories

	// maxTempDir is the length of a path to which those of the directory and its socket
	// can be added. 103 is the shortest limit of any system.
	maxTempDir = 103 - len("/plugin-4294967295/plugin-4194304-ffffffff")

	// handshakeMarks end the address in a handshake.
	handshakeMarks = "|\r\n"
)

// parseAddr parses the address in a handshake. It asks no name server.
func parseAddr(network, address string) (net.Addr, error) {
	switch network {
	case "unix":
		return net.ResolveUnixAddr(network, address)
	case "tcp":
		address = strings.TrimPrefix(address, "localhost")
		if strings.HasPrefix(address, ":") {
			address = "127.0.0.1" + address
		}
		addr, err := netip.ParseAddrPort(address)
		if err != nil {
			return nil, err
		}
		return net.TCPAddrFromAddrPort(addr), nil
	}
	return nil, fmt.Errorf("the network is %q, and must be unix or tcp", network)
}

// UnixSocketConfig configures the plugin's Unix socket. It is ignored on Windows.
type UnixSocketConfig struct {
	// Group is the name or number of a group whose members may connect. The host
	// must have the right to give files to it. If empty, only the user may connect.
	Group string

	// TempDir is the directory, which must exist, for the private directory (0700)
	// of the socket. The default is os.TempDir(), or /tmp if the path of the socket
	// would be too long or have a | or a line feed in it. A host that is killed while
	// it starts a plugin may leave an empty directory there.
	TempDir string
}

// makeDir makes a private directory for a plugin's socket. On Windows, there is none.
func (u *UnixSocketConfig) makeDir() (string, error) {
	if runtime.GOOS == "windows" {
		return "", nil
	}
	base, err := filepath.Abs(u.tempDir())
	switch {
	case err != nil:
		return "", err
	case strings.ContainsAny(base, handshakeMarks):
		return "", fmt.Errorf("no socket can be made in %q: "+
			"set UnixSocketConfig.TempDir or TMPDIR to a path without | and line feeds", base)
	case len(base) > maxTempDir:
		return "", fmt.Errorf("the path of its socket would be too long, in %s: "+
			"set UnixSocketConfig.TempDir to a shorter one", base)
	}
	dir, err := os.MkdirTemp(base, socketPrefix+"*")
	if err != nil {
		return "", fmt.Errorf("no directory for its socket can be made in %s: %w: "+
			"set UnixSocketConfig.TempDir or TMPDIR to another one", base, err)
	}
	if u.Group != "" {
		// Members may connect, but not replace the socket.
		err = giveToGroup(dir, u.Group, 0o770|os.ModeSticky)
	}
	if err != nil {
		_ = os.Remove(dir) // it is empty
		return "", err
	}
	return dir, nil
}

// tempDir returns TempDir or its default.
func (u *UnixSocketConfig) tempDir() string {
	if u.TempDir != "" {
		return u.TempDir
	}
	dir := os.TempDir()
	if len(dir) > maxTempDir || strings.ContainsAny(dir, handshakeMarks) {
		return "/tmp"
	}
	return dir
}

// giveToGroup gives a file to the group with that name or number.
func giveToGroup(path, group string, mode os.FileMode) error {
	gid, err := groupID(group)
	if err == nil {
		err = os.Chown(path, -1, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		return fmt.Errorf("its socket cannot be given to UnixSocketConfig.Group: %w", err)
	}
	return nil
}

// groupID returns the number of a group that is given by name or number.
func groupID(group string) (int, error) {
	gid, err := strconv.Atoi(group)
	if err == nil {
		return gid, nil
	}
	found, err := user.LookupGroup(group)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(found.Gid)
}

// listen listens where the host wants the plugin to: on a Unix socket in the directory of
// the host, or else in a new one. On Windows, it listens on a TCP port.
func listen(env map[string]string) (net.Listener, error) {
	if runtime.GOOS == "windows" {
		return listenTCP(env[envMinPort], env[envMaxPort])
	}
	dir, ownDir := env[EnvUnixSocketDir], ""
	if dir == "" {
		var err error
		dir, err = new(UnixSocketConfig).makeDir()
		if err != nil {
			return nil, err
		}
		ownDir = dir
	}
	path := filepath.Join(dir, fmt.Sprintf("%s%d-%x", socketPrefix, os.Getpid(), rand.Uint32()))
	socket, err := net.Listen("unix", path)
	if err != nil {
		removePrivate(ownDir)
		return nil, err
	}
	listener := &unixListener{Listener: socket, ownDir: ownDir}
	if group := env[EnvUnixSocketGroup]; group != "" {
		err = giveToGroup(path, group, 0o660)
		if err != nil {
			_ = listener.Close() // the first error is the reason
			return nil, err
		}
	}
	return listener, nil
}

// unixListener listens on a Unix socket, and removes its directory when it is closed.
type unixListener struct {
	net.Listener
	ownDir string // "" if the host has made the directory, and removes it
}

func (l *unixListener) Close() error {
	err := l.Listener.Close()
	removePrivate(l.ownDir)
	return err
}

// listenTCP listens on the first free port of the loopback interface.
func listenTCP(minPort, maxPort string) (net.Listener, error) {
	// A variable that is missing or no number is zero, and the maximum if it is too large.
	low, _ := strconv.ParseUint(minPort, 10, 16)
	high, _ := strconv.ParseUint(maxPort, 10, 16)
	if high > 0 {
		low = max(low, 1) // 0 is any port
	}
	for port := low; ; port++ {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return listener, nil
		}
		if port >= high {
			return nil, fmt.Errorf("no port from %d to %d is free: %w", low, high, err)
		}
	}
}

// removePrivate removes a directory that makeDir made, on either side, with what is in it.
func removePrivate(dir string) {
	if isPrivate(dir) {
		_ = os.RemoveAll(dir)
	}
}

// isPrivate reports whether a directory has a name that makeDir makes.
func isPrivate(dir string) bool { return strings.HasPrefix(filepath.Base(dir), socketPrefix) }
