package plugin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"reflect"
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

	// envHost is this library's own: it tells a plugin how to notice that its
	// host is gone. See hostWaiter.
	envHost = "PLUGIN_HOST_LIFELINE"
)

// protocolEnv is every variable of the protocol but the cookie. None of them
// is passed on from one plugin to another.
var protocolEnv = []string{
	EnvUnixSocketDir, EnvUnixSocketGroup, envMinPort, envMaxPort,
	envVersions, envClientCert, envMultiplex, envHost,
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
	cert     []byte // DER; nil without AutoMTLS
}

func (h handshake) String() string {
	return fmt.Sprintf("%d|%d|%s|%s|%s|%s", CoreProtocolVersion, h.version,
		h.addr.Network(), h.addr.String(), h.protocol, base64.RawStdEncoding.EncodeToString(h.cert))
}

// isHandshake reports whether a line of a plugin's stdout is meant as its
// handshake: it begins with digits and a bar.
func isHandshake(line []byte) bool {
	digits := 0
	for digits < len(line) && '0' <= line[digits] && line[digits] <= '9' {
		digits++
	}
	return digits > 0 && digits < len(line) && line[digits] == '|'
}

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
	h.protocol = ProtocolNetRPC
	if len(fields) > 4 && fields[4] != "" {
		h.protocol = Protocol(fields[4])
	}
	if len(fields) > 5 && fields[5] != "" {
		if h.cert, err = base64.RawStdEncoding.DecodeString(fields[5]); err == nil {
			_, err = x509.ParseCertificate(h.cert)
		}
		if err != nil {
			return h, fmt.Errorf("its handshake has a certificate that cannot be read: %w", err)
		}
	}
	return h, nil
}

// parseAddr reads an address without asking anybody, a name server say.
func parseAddr(network, address string) (net.Addr, error) {
	switch network {
	case "unix":
		if address == "" {
			return nil, errors.New("the socket's path is empty")
		}
		return &net.UnixAddr{Name: address, Net: "unix"}, nil
	case "tcp":
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%q has no valid port", address)
		}
		addr := &net.TCPAddr{Port: int(n)}
		if host == "localhost" {
			host = "127.0.0.1"
		}
		if host != "" {
			ip, err := netip.ParseAddr(host)
			if err != nil {
				return nil, fmt.Errorf("%q is no IP address", host)
			}
			addr.IP, addr.Zone = ip.AsSlice(), ip.Zone()
		}
		return addr, nil
	}
	return nil, fmt.Errorf("the network is %q, and must be unix or tcp", network)
}

// allVersions returns every version with its plugins. Where both arguments
// have the same version, versioned wins.
func allVersions(version uint, plugins PluginSet, versioned map[int]PluginSet) map[int]PluginSet {
	all := make(map[int]PluginSet, len(versioned)+1)
	maps.Copy(all, versioned)
	if _, known := all[int(version)]; plugins != nil && !known {
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
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
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
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// mutualTLS is the configuration of either side: it shows own, and trusts
// other, a certificate in DER, and nobody else.
func mutualTLS(own tls.Certificate, other []byte) (*tls.Config, error) {
	cert, err := x509.ParseCertificate(other)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{
		Certificates: []tls.Certificate{own},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		RootCAs:      pool,
		ServerName:   "localhost",
		MinVersion:   tls.VersionTLS12,
	}, nil
}

// certPEM is a certificate as the host sends it to the plugin.
func certPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// parseCertPEM returns the first certificate in text, in DER.
func parseCertPEM(text string) ([]byte, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("there is no certificate in PEM in it")
	}
	return block.Bytes, nil
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

// makeDir makes a directory for the socket of the plugin that cmd runs.
func (u *UnixSocketConfig) makeDir(cmd *exec.Cmd) (dir string, err error) {
	bases := []string{u.TempDir}
	if u.TempDir == "" {
		bases = []string{os.TempDir(), "/tmp"}
	}
	for _, base := range bases {
		if base, err = filepath.Abs(base); err != nil {
			return "", err
		}
		if dir, err = os.MkdirTemp(base, socketPrefix+"*"); err != nil {
			return "", fmt.Errorf("no directory for its socket can be made in %s: %w: set UnixSocketConfig.TempDir or TMPDIR to another one", base, err)
		}
		if len(dir)+socketName <= maxSocketPath {
			break
		}
		_ = os.Remove(dir)
		err = fmt.Errorf("the path of its socket would be too long, in %s: set UnixSocketConfig.TempDir to a shorter one", base)
	}
	if err != nil {
		return "", err
	}
	if uid, ok := runsAs(cmd); ok {
		err = os.Chown(dir, uid, -1)
	}
	if u.Group != "" && err == nil {
		// A member may connect, but not put another file in a file's place.
		err = giveToGroup(dir, u.Group, 0o770|os.ModeSticky)
	}
	if err != nil {
		_ = os.Remove(dir)
		return "", err
	}
	return dir, nil
}

// runsAs returns the user that a command runs as, if it is told. The field is
// not there on every system.
func runsAs(cmd *exec.Cmd) (uid int, ok bool) {
	if cmd == nil || cmd.SysProcAttr == nil {
		return 0, false
	}
	cred := reflect.ValueOf(cmd.SysProcAttr).Elem().FieldByName("Credential")
	if !cred.IsValid() || cred.IsNil() {
		return 0, false
	}
	return int(cred.Elem().FieldByName("Uid").Uint()), true
}

// giveToGroup gives a file to a group, by name or number.
func giveToGroup(path, group string, mode os.FileMode) error {
	gid, err := strconv.Atoi(group)
	if err != nil {
		g, err := user.LookupGroup(group)
		if err != nil {
			return err
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return err
		}
	}
	if err := os.Chown(path, -1, gid); err != nil {
		return err
	}
	return os.Chmod(path, mode)
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
func (p *process) handshakeEnv(config *ClientConfig, versions string) (env []string, err error) {
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
		env = append(env, envClientCert+"="+certPEM(p.cert.Certificate[0]))
	}
	if runtime.GOOS == "windows" {
		return env, nil
	}
	sockets := config.UnixSocketConfig
	if sockets == nil {
		sockets = &UnixSocketConfig{}
	}
	if p.dir, err = sockets.makeDir(p.cmd); err != nil {
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
	return fmt.Sprintf("it offers version %d of the plugin protocol, and the host has %v: one of them is too old", e.Plugin, e.Host)
}

// startHint says what may be the cause, where that can be known.
func startHint(e *StartError, h *HandshakeConfig) string {
	switch {
	case errors.As(e.Err, new(*VersionError)):
		return ""
	case e.State != nil && strings.Contains(e.Stderr, "is a plugin"):
		return fmt.Sprintf("it did not accept the cookie %s: it is a plugin of another program, or its HandshakeConfig is another one", h.MagicCookieKey)
	case e.Stdout != "":
		return "what it printed to stdout is no handshake: does its main call plugin.Serve, and print nothing before?"
	}
	switch {
	case shortage(e.Err) != "":
		return shortage(e.Err)
	case errors.Is(e.Err, syscall.EAGAIN):
		return "there may be no more processes, of this user or at all: see ulimit -u"
	case errors.Is(e.Err, syscall.E2BIG):
		return "its arguments and environment together are longer than the system takes"
	case errors.Is(e.Err, syscall.ETXTBSY):
		return "the file is open for writing: is it still being built or copied?"
	}
	// What fails before the binary is executed does not tell about it.
	var failed *fs.PathError
	if errors.As(e.Err, &failed) && failed.Op != "fork/exec" && failed.Path != e.Path {
		return ""
	}
	info, err := os.Stat(e.Path)
	switch {
	case errors.Is(e.Err, exec.ErrNotFound), err != nil && errors.Is(e.Err, fs.ErrNotExist):
		return "there is no such file"
	case err != nil:
		return ""
	case info.IsDir():
		return "it is a directory"
	case errors.Is(e.Err, fs.ErrPermission) && !executable(info):
		return "it is not executable: chmod +x"
	case errors.Is(e.Err, fs.ErrNotExist):
		return fmt.Sprintf("the file is there, but its interpreter is not%s", interpreter(e.Path))
	case noProgram(e.Err):
		if kind := binaryKind(e.Path); kind != "" {
			return fmt.Sprintf("it is built for %s, and this host runs on %s/%s", kind, runtime.GOOS, runtime.GOARCH)
		}
		if runtime.GOOS == "windows" {
			return "it is no program for windows/" + runtime.GOARCH
		}
		return fmt.Sprintf("it is no program for %s/%s, nor a script that names its interpreter in a first line like #!/bin/sh", runtime.GOOS, runtime.GOARCH)
	}
	return ""
}

// shortage says what to do when there are no more descriptors.
func shortage(err error) string {
	switch {
	case errors.Is(err, syscall.EMFILE):
		return "raise the limit of the process (ulimit -n), or look for what it does not close"
	case errors.Is(err, syscall.ENFILE):
		return "raise the system's limit, or look for the process that does not close its files"
	}
	return ""
}

// hinted returns err, with what to do about it if that is known.
func hinted(err error) error {
	if hint := shortage(err); hint != "" {
		return fmt.Errorf("%w: %s", err, hint)
	}
	return err
}

// noProgram reports whether the system does not know how to run a file.
func noProgram(err error) bool {
	if runtime.GOOS == "windows" {
		const badFormat, otherMachine = syscall.Errno(193), syscall.Errno(216)
		return errors.Is(err, badFormat) || errors.Is(err, otherMachine)
	}
	return errors.Is(err, syscall.ENOEXEC)
}

// fileHead reads the beginning of a file.
func fileHead(path string) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	head := make([]byte, 1024)
	n, _ := io.ReadFull(f, head)
	return head[:n]
}

// interpreter names a script's interpreter.
func interpreter(path string) string {
	line, _, _ := bytes.Cut(fileHead(path), []byte{'\n'})
	if name, script := bytes.CutPrefix(line, []byte("#!")); script {
		return ": " + printable(strings.TrimSpace(string(name)))
	}
	return ""
}

// binaryKind says which system and processor a binary is built for, as far as
// it tells: see the ELF, Mach-O and PE specifications for the numbers.
func binaryKind(path string) string {
	head := fileHead(path)
	if len(head) < 64 {
		return ""
	}
	le := binary.LittleEndian
	switch {
	case bytes.HasPrefix(head, []byte("\x7fELF")):
		machine := le.Uint16(head[18:])
		if head[5] == 2 { // big-endian
			machine = binary.BigEndian.Uint16(head[18:])
		}
		arch := map[uint16]string{3: "386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390x", 40: "arm", 62: "amd64", 183: "arm64", 243: "riscv64", 258: "loong64"}[machine]
		return "Linux or another Unix on " + archName(arch, int(machine))
	case bytes.HasPrefix(head, []byte("\xcf\xfa\xed\xfe")):
		cpu := le.Uint32(head[4:])
		return "macOS on " + archName(map[uint32]string{0x01000007: "amd64", 0x0100000c: "arm64"}[cpu], int(cpu))
	case bytes.HasPrefix(head, []byte("MZ")):
		at := int(le.Uint32(head[60:]))
		if at < 0 || at > len(head)-6 {
			return "Windows"
		}
		machine := le.Uint16(head[at+4:])
		return "Windows on " + archName(map[uint16]string{0x14c: "386", 0x8664: "amd64", 0xaa64: "arm64"}[machine], int(machine))
	}
	return ""
}

func archName(arch string, number int) string {
	if arch == "" {
		return fmt.Sprintf("processor %#x", number)
	}
	return arch
}
