package plugin

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// CoreProtocolVersion is the version of the handshake and of the connection. It is
// the same in go-plugin.
const CoreProtocolVersion = 1

const (
	// EnvUnixSocketDir is the environment variable with the directory in which
	// the plugin makes its Unix socket. The host sets it.
	EnvUnixSocketDir = "PLUGIN_UNIX_SOCKET_DIR"

	// EnvUnixSocketGroup is the environment variable with the group that may
	// connect to the plugin's Unix socket. The host sets it from
	// UnixSocketConfig.Group.
	EnvUnixSocketGroup = "PLUGIN_UNIX_SOCKET_GROUP"

	envMinPort    = "PLUGIN_MIN_PORT"
	envMaxPort    = "PLUGIN_MAX_PORT"
	envVersions   = "PLUGIN_PROTOCOL_VERSIONS"
	envClientCert = "PLUGIN_CLIENT_CERT"
	envMultiplex  = "PLUGIN_MULTIPLEX_GRPC" // of go-plugin; not used here

	// envHost has a hostInfo. go-plugin does not know it.
	envHost = "PLUGIN_HOST_LIFELINE"
)

// protocolEnv has the variables of the protocol, without the cookie. A host that is
// a plugin itself does not pass on its own.
var protocolEnv = []string{
	EnvUnixSocketDir, EnvUnixSocketGroup, envMinPort, envMaxPort,
	envVersions, envClientCert, envMultiplex, envHost,
}

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

// HandshakeConfig must be the same in a host and its plugins. Programs usually
// declare it in a package that both import.
type HandshakeConfig struct {
	// ProtocolVersion is the version of the interfaces in Plugins. Raise it with
	// an incompatible change. Zero is a version like any other. It is not used
	// if Plugins is nil and VersionedPlugins is not empty.
	ProtocolVersion uint

	// MagicCookieKey and MagicCookieValue are an environment variable and its
	// value, which the host sets. A plugin that was started by hand or by another
	// program does not find it, prints that it is a plugin and exits. It is not a
	// secret and not a protection. Neither may be empty.
	MagicCookieKey   string
	MagicCookieValue string
}

// handshake is the line that a plugin writes to its stdout when it is ready.
type handshake struct {
	version  int
	addr     net.Addr
	protocol Protocol
	cert     []byte // DER; empty without AutoMTLS
	flushes  bool   // the plugin sends its output before it answers Quit; false for go-plugin

	tls *tls.Config // with which the host connects; not part of the line
}

// flushesField is the seventh field of the handshake if flushes is set. It is not sent
// to other libraries: go-plugin before 1.6 reads it as a part of the certificate.
const flushesField = "flushes"

func (h handshake) String() string {
	line := fmt.Sprintf("%d|%d|%s|%s|%s|%s", CoreProtocolVersion, h.version,
		h.addr.Network(), h.addr.String(), h.protocol, base64.RawStdEncoding.EncodeToString(h.cert))
	if h.flushes {
		line += "|" + flushesField
	}
	return line
}

// isHandshake reports whether a line is a handshake: it begins with digits and a bar.
func isHandshake(line []byte) bool {
	rest := bytes.TrimLeft(line, "0123456789")
	return len(rest) < len(line) && bytes.HasPrefix(rest, []byte{'|'})
}

// parseHandshake parses the handshake of a plugin. It ignores unknown fields at the
// end.
func parseHandshake(line string) (h handshake, err error) {
	fields := strings.Split(strings.TrimSpace(line), "|")
	if core := fields[0]; core != strconv.Itoa(CoreProtocolVersion) {
		return h, fmt.Errorf("it speaks version %q of the core protocol, and this host version %d: rebuild it with a current version of the library", core, CoreProtocolVersion)
	}
	if len(fields) < 4 {
		return h, fmt.Errorf("its handshake has %d fields, and at least 4 are needed (core version|app version|network|address)", len(fields))
	}
	if h.version, err = strconv.Atoi(fields[1]); err != nil {
		return h, fmt.Errorf("its handshake has a version that is no number: %q", fields[1])
	}
	if h.addr, err = parseAddr(fields[2], fields[3]); err != nil {
		return h, fmt.Errorf("its handshake has no usable address: %w", err)
	}
	fields = append(fields, "", "", "") // older plugins send fewer
	h.protocol = cmp.Or(Protocol(fields[4]), ProtocolNetRPC)
	if h.cert, err = base64.RawStdEncoding.DecodeString(fields[5]); err != nil {
		return h, fmt.Errorf("its handshake has a certificate that cannot be read: %w", err)
	}
	h.flushes = fields[6] == flushesField
	return h, nil
}

func parseAddr(network, address string) (net.Addr, error) {
	switch network {
	case "unix":
		return net.ResolveUnixAddr(network, address)
	case "tcp":
		addr, err := netip.ParseAddrPort(address) // asks no name server
		return net.TCPAddrFromAddrPort(addr), err
	}
	return nil, fmt.Errorf("the network is %q, and must be unix or tcp", network)
}

// allVersions returns the plugins of every version. If both arguments have the same
// version, versioned wins.
func allVersions(version uint, plugins PluginSet, versioned map[int]PluginSet) map[int]PluginSet {
	all := make(map[int]PluginSet, len(versioned)+1)
	maps.Copy(all, versioned)
	if _, known := all[int(version)]; !known && (plugins != nil || len(versioned) == 0) {
		all[int(version)] = plugins
	}
	return all
}

// negotiate returns the version that a plugin serves: its highest that is in the list
// of the host. If there is none, it is the plugin's lowest, which an old host without a
// list may have, and which other hosts can name in their error.
func negotiate(own map[int]PluginSet, hostList string) int {
	versions := sortedKeys(own)
	for _, v := range slices.Backward(versions) {
		if slices.Contains(strings.Split(hostList, ","), strconv.Itoa(v)) {
			return v
		}
	}
	return versions[0]
}

// versionList is the host's list of versions, as 1,2,3.
func versionList(sets map[int]PluginSet) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(sortedKeys(sets)), " ", ","), "[]")
}

// newCertificate makes a certificate for AutoMTLS, for one start. P-256 is the fastest
// kind of key that go-plugin accepts.
func newCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "localhost"},
		DNSNames:              []string{"localhost"},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.AddDate(30, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// mutualTLS returns the configuration of one side. It trusts only the certificate of
// the peer.
func mutualTLS(own tls.Certificate, peer *x509.CertPool) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{own},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    peer,
		RootCAs:      peer,
		ServerName:   "localhost",
		MinVersion:   tls.VersionTLS12,
	}
}

// UnixSocketConfig configures the plugin's Unix socket. It is ignored on Windows.
type UnixSocketConfig struct {
	// Group is the name or number of a group whose members may connect. The host
	// must have the right to give files to it. If empty, only the user may connect.
	Group string

	// TempDir is the directory, which must exist, for the private directory (0700)
	// of the socket. The default is os.TempDir(), or /tmp if the path of the socket
	// would be too long.
	TempDir string
}

// makeDir makes a private directory for a plugin's socket.
func (u *UnixSocketConfig) makeDir() (dir string, err error) {
	base := u.TempDir
	if base == "" {
		base = os.TempDir()
		if len(base) > maxSocketPath-len("/plugin-4294967295")-socketName {
			base = "/tmp"
		}
	}
	if base, err = filepath.Abs(base); err != nil {
		return "", err
	}
	if dir, err = os.MkdirTemp(base, socketPrefix+"*"); err != nil {
		return "", fmt.Errorf("no directory for its socket can be made in %s: %w: set UnixSocketConfig.TempDir or TMPDIR to another one", base, err)
	}
	if len(dir)+socketName > maxSocketPath {
		err = fmt.Errorf("the path of its socket would be too long, in %s: set UnixSocketConfig.TempDir to a shorter one", base)
	} else if u.Group != "" {
		// Members may connect, but not replace the socket.
		err = giveToGroup(dir, u.Group, 0o770|os.ModeSticky)
	}
	if err != nil {
		_ = os.Remove(dir)
		return "", err
	}
	return dir, nil
}

// giveToGroup gives a file to the group with that name or number.
func giveToGroup(path, group string, mode os.FileMode) error {
	gid, err := strconv.Atoi(group)
	if err != nil {
		var g *user.Group
		if g, err = user.LookupGroup(group); err == nil {
			gid, err = strconv.Atoi(g.Gid)
		}
	}
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

// listenTCP listens on the first free port of the loopback interface.
func listenTCP(minPort, maxPort string) (net.Listener, error) {
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

// removePrivate removes the directory that the host made for the socket.
func removePrivate(dir string) {
	if isPrivate(dir) {
		_ = os.RemoveAll(dir)
	}
}

// isPrivate reports whether a directory has a name that makeDir makes.
func isPrivate(dir string) bool { return strings.HasPrefix(filepath.Base(dir), socketPrefix) }

// handshakeEnv returns the plugin's variables. It makes the host's certificate and the
// directory for the socket.
func (p *child) handshakeEnv(config *ClientConfig, versions string) (env []string, err error) {
	env = []string{
		config.MagicCookieKey + "=" + config.MagicCookieValue,
		fmt.Sprintf("%s=%d", envMinPort, config.MinPort),
		fmt.Sprintf("%s=%d", envMaxPort, config.MaxPort),
		envVersions + "=" + versions,
	}
	if config.AutoMTLS {
		if p.cert, err = newCertificate(); err != nil {
			return nil, err
		}
		block := &pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Certificate[0]}
		env = append(env, envClientCert+"="+string(pem.EncodeToMemory(block)))
	}
	if runtime.GOOS == "windows" {
		return env, nil
	}
	sockets := cmp.Or(config.UnixSocketConfig, &UnixSocketConfig{})
	if p.dir, err = sockets.makeDir(); err != nil {
		return nil, err
	}
	env = append(env, EnvUnixSocketDir+"="+p.dir)
	if sockets.Group != "" {
		env = append(env, EnvUnixSocketGroup+"="+sockets.Group)
	}
	return env, nil
}

// environment returns the plugin's environment: the host's, Cmd.Env and the variables
// of the handshake, where later ones win. If the host is a plugin itself, its own
// handshake is left out.
func environment(config *ClientConfig, handshake []string) []string {
	var env []string
	if !config.SkipHostEnv {
		env = os.Environ()
	}
	env = slices.DeleteFunc(append(env, config.Cmd.Env...), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(protocolEnv, name)
	})
	return append(env, handshake...)
}

// StartError describes why a plugin did not start.
type StartError struct {
	// Path is the path of the plugin's binary.
	Path string
	// State is how the process ended, or nil if it did not end by itself.
	State *os.ProcessState
	// Stdout is the end of the output to stdout before a handshake, at most 8 KiB.
	Stdout string
	// Stderr is the end of the output to stderr, at most 8 KiB.
	Stderr string
	// Err is the cause.
	Err error

	hint string
}

// Error returns the cause, a hint if there is one, and the output.
func (e *StartError) Error() string {
	text := fmt.Sprintf("plugin %s did not start: %v%s", pluginName(e.Path), e.Err, inBrackets(e.State))
	if e.hint != "" {
		text += ": " + e.hint
	}
	for _, out := range []struct{ name, text string }{{"stdout", e.Stdout}, {"stderr", e.Stderr}} {
		if s := strings.TrimSpace(out.text); s != "" {
			text += "\n" + out.name + ": " + printable(strings.ReplaceAll(s, "\n", "\n\t"))
		}
	}
	return text
}

// Unwrap returns Err.
func (e *StartError) Unwrap() error { return e.Err }

// VersionError reports that a plugin and its host have no protocol version in common.
// [Client.Start] returns it in a [*StartError].
type VersionError struct {
	// Plugin is the version that the plugin offers.
	Plugin int
	// Host has the versions of the host.
	Host []int
}

// Error names all versions.
func (e *VersionError) Error() string {
	return fmt.Sprintf("it offers version %d of the plugin protocol, and the host has %v: one of them is too old (see HandshakeConfig.ProtocolVersion)", e.Plugin, e.Host)
}

// startHint returns a possible cause, or "".
func startHint(e *StartError, config *ClientConfig) string {
	silent := e.Stdout == "" && e.Stderr == ""
	switch {
	case e.State != nil && strings.Contains(e.Stderr, "is a plugin"):
		return fmt.Sprintf("it did not accept the cookie %s: it is a plugin of another program, or its HandshakeConfig is another one", config.MagicCookieKey)
	case e.Stdout != "":
		return "what it printed to stdout is no handshake: does its main call plugin.Serve, and print nothing before?"
	case silent && (e.State != nil || errors.Is(e.Err, context.DeadlineExceeded)):
		return "does its main call plugin.Serve?"
	case errors.Is(e.Err, syscall.ENOEXEC), runtime.GOOS == "windows" && (errors.Is(e.Err, syscall.Errno(193)) || errors.Is(e.Err, syscall.Errno(216))):
		return fmt.Sprintf("is it built for %s/%s, as this host is?", runtime.GOOS, runtime.GOARCH)
	case errors.Is(e.Err, fs.ErrPermission):
		return "is it executable?"
	case errors.Is(e.Err, exec.ErrNotFound) && filepath.Base(e.Path) == e.Path:
		return fmt.Sprintf("it was looked up in PATH; the file in this directory is ./%s", e.Path)
	case errors.Is(e.Err, fs.ErrNotExist):
		hint := "is it there, and the interpreter that it names?"
		if path, err := filepath.Abs(executed(config.Cmd)); err == nil && !filepath.IsAbs(e.Path) {
			hint = path + ": " + hint
		}
		return hint
	}
	return ""
}
