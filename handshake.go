package plugin

import (
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
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// CoreProtocolVersion is the version of the handshake and of what runs on the
// connection after it. go-plugin has the same.
const CoreProtocolVersion = 1

const (
	// EnvUnixSocketDir names the environment variable with the directory in
	// which the plugin makes its Unix socket. The host sets it.
	EnvUnixSocketDir = "PLUGIN_UNIX_SOCKET_DIR"

	// EnvUnixSocketGroup names the environment variable with the group, by
	// name or number, that may connect to the plugin's Unix socket. The host
	// sets it from UnixSocketConfig.Group.
	EnvUnixSocketGroup = "PLUGIN_UNIX_SOCKET_GROUP"

	envMinPort    = "PLUGIN_MIN_PORT"
	envMaxPort    = "PLUGIN_MAX_PORT"
	envVersions   = "PLUGIN_PROTOCOL_VERSIONS"
	envClientCert = "PLUGIN_CLIENT_CERT"
	envMultiplex  = "PLUGIN_MULTIPLEX_GRPC" // go-plugin's, of no use here

	// envHost is this library's own: a hostInfo.
	envHost = "PLUGIN_HOST_LIFELINE"
)

// protocolEnv is every variable of the protocol but the cookie. None of them
// is passed on from one plugin to another.
var protocolEnv = []string{
	EnvUnixSocketDir, EnvUnixSocketGroup, envMinPort, envMaxPort,
	envVersions, envClientCert, envMultiplex, envHost,
}

// hostInfo tells a plugin about its host. The variable that it is sent in is
// inherited: with a go-plugin host in between, it is about a host further up.
type hostInfo struct {
	pid   int    // the host's
	fd    int    // of watchPipe
	watch string // by which the plugin notices that the host is gone
}

const (
	watchPipe    = "pipe" // the read end of a pipe that the host holds, passed as fd
	watchPid     = "pid"  // the process, on Windows
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

// HandshakeConfig is what a host and its plugins must agree on. Both embed it;
// programs usually share one in a package that both import.
type HandshakeConfig struct {
	// ProtocolVersion is the version of the interfaces in Plugins: raise it
	// when a change to them is not compatible. It is not needed where all
	// plugins are in VersionedPlugins. Zero is a version like any other.
	ProtocolVersion uint

	// MagicCookieKey and MagicCookieValue are an environment variable and its
	// value. The host sets it, and a plugin that does not find it says that it
	// is a plugin and exits. This is a courtesy to whoever starts a plugin by
	// hand and keeps a host from using the plugin of another program; it is no
	// secret and protects nothing. Neither may be empty.
	MagicCookieKey   string
	MagicCookieValue string
}

// handshake is what a plugin says on its stdout when it is ready.
type handshake struct {
	version  int
	addr     net.Addr
	protocol Protocol
	cert     []byte // DER; empty without AutoMTLS
	flushes  bool   // the plugin sends its output before it answers Quit, as this library's do
}

// flushesField is the seventh field of the handshake if flushes is set.
// go-plugin before 1.6 takes it for a part of the certificate.
const flushesField = "flushes"

func (h handshake) String() string {
	line := fmt.Sprintf("%d|%d|%s|%s|%s|%s", CoreProtocolVersion, h.version,
		h.addr.Network(), h.addr.String(), h.protocol, base64.RawStdEncoding.EncodeToString(h.cert))
	if h.flushes {
		line += "|" + flushesField
	}
	return line
}

// handshakeStart is how a line of a plugin's stdout begins that is meant as its
// handshake.
var handshakeStart = regexp.MustCompile(`^\d+\|`)

// parseHandshake reads the handshake line of a plugin, ours or go-plugin's.
// Fields behind those known are ignored.
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

// allVersions returns every version with its plugins. Where both arguments
// have the same version, versioned wins.
func allVersions(version uint, plugins PluginSet, versioned map[int]PluginSet) map[int]PluginSet {
	all := make(map[int]PluginSet, len(versioned)+1)
	maps.Copy(all, versioned)
	if _, known := all[int(version)]; !known && (plugins != nil || len(versioned) == 0) {
		all[int(version)] = plugins
	}
	return all
}

// negotiate picks the version that a plugin serves: the highest that the host
// lists, too; else its own lowest, which an old host without a list may know,
// and by which any other host can say what does not match.
func negotiate(own map[int]PluginSet, hostList string) int {
	versions := sortedKeys(own)
	for _, v := range slices.Backward(versions) {
		if slices.Contains(strings.Split(hostList, ","), strconv.Itoa(v)) {
			return v
		}
	}
	return versions[0]
}

// versionList is the host's list of versions as it is sent to the plugin.
func versionList(sets map[int]PluginSet) string {
	var list []string
	for _, v := range sortedKeys(sets) {
		list = append(list, strconv.Itoa(v))
	}
	return strings.Join(list, ",")
}

// newCertificate makes a certificate for AutoMTLS, used by one process for one
// run. P-256 is used because it is the fastest to make that go-plugin takes.
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

// mutualTLS is the configuration of either side: it shows own, and trusts
// only the peer's.
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

// UnixSocketConfig is about the plugin's Unix socket.
type UnixSocketConfig struct {
	// Group, a name or number, is a group whose members may connect, too. The
	// host must be allowed to give files to it. Empty means no group.
	Group string

	// TempDir is where the private directory for the socket is made. It must
	// exist. Empty means os.TempDir(), or /tmp where that is too long for the
	// path of a socket.
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
		// A member may connect, but not put another file in a file's place.
		err = giveToGroup(dir, u.Group, 0o770|os.ModeSticky)
	}
	if err != nil {
		_ = os.Remove(dir)
		return "", err
	}
	return dir, nil
}

// giveToGroup gives a file to UnixSocketConfig.Group, a name or number.
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
	err := fmt.Errorf("no port from %d to %d is free", low, high)
	if high > 0 {
		low = max(low, 1) // 0 is any port
	}
	for port := low; port <= max(low, high); port++ {
		listener, listenErr := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if listenErr == nil {
			return listener, nil
		}
		err = fmt.Errorf("no port from %d to %d is free: %w", low, high, listenErr)
	}
	return nil, err
}

// removePrivate removes the directory that the host has made for the socket.
func removePrivate(dir string) {
	if isPrivate(dir) {
		_ = os.RemoveAll(dir)
	}
}

// isPrivate reports whether a directory is named as those that makeDir makes.
func isPrivate(dir string) bool { return strings.HasPrefix(filepath.Base(dir), socketPrefix) }

// handshakeEnv makes what the plugin finds in its environment: a certificate,
// and a directory for its socket.
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
	sockets := config.UnixSocketConfig
	if sockets == nil {
		sockets = &UnixSocketConfig{}
	}
	if p.dir, err = sockets.makeDir(); err != nil {
		return nil, err
	}
	env = append(env, EnvUnixSocketDir+"="+p.dir)
	if sockets.Group != "" {
		env = append(env, EnvUnixSocketGroup+"="+sockets.Group)
	}
	return env, nil
}

// environment is the plugin's: the host's, then the command's, then the
// handshake's. A handshake that the host was itself started with stays here.
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

// StartError says why a plugin could not be started.
type StartError struct {
	// Path is the plugin's binary.
	Path string
	// State is how the process ended, if it ended by itself.
	State *os.ProcessState
	// Stdout is the first that the plugin wrote there instead of a handshake.
	Stdout string
	// Stderr is the last that the plugin wrote there, 8 KiB at most.
	Stderr string
	// Err is what went wrong, or was being waited for.
	Err error

	hint string
}

// Error has all that is known, and what may be the cause.
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

// VersionError says that a plugin and its host have no protocol version in
// common. Start returns it in a [*StartError].
type VersionError struct {
	// Plugin is the version that the plugin offers.
	Plugin int
	// Host is the versions that the host has.
	Host []int
}

// Error names all versions.
func (e *VersionError) Error() string {
	return fmt.Sprintf("it offers version %d of the plugin protocol, and the host has %v: one of them is too old (see HandshakeConfig.ProtocolVersion)", e.Plugin, e.Host)
}

// startHint says what may be the cause, where that can be known.
func startHint(e *StartError, config *ClientConfig) string {
	silent := e.Stdout == "" && e.Stderr == ""
	switch {
	case e.State != nil && strings.Contains(e.Stderr, "is a plugin"):
		return fmt.Sprintf("it did not accept the cookie %s: it is a plugin of another program, or its HandshakeConfig is another one", config.MagicCookieKey)
	case e.Stdout != "":
		return "what it printed to stdout is no handshake: does its main call plugin.Serve, and print nothing before?"
	case silent && (e.State != nil || errors.Is(e.Err, context.DeadlineExceeded)):
		return "does its main call plugin.Serve?"
	case errors.Is(e.Err, syscall.ENOEXEC), runtime.GOOS == "windows" && errors.Is(e.Err, syscall.Errno(216)):
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
