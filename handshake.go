package plugin

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// This file has the first line that a plugin prints, the versions that both sides agree on,
// and the variables by which the host tells its plugin what it needs.

// CoreProtocolVersion is the version of the handshake and of the connection. It is
// the same in go-plugin.
const CoreProtocolVersion = 1

const (
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

// isProtocolVariable reports whether v, as name=value, is a variable of the protocol.
func isProtocolVariable(v string) bool {
	name, _, _ := strings.Cut(v, "=")
	return slices.Contains(protocolEnv, name)
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
	version     int
	addr        net.Addr
	protocol    Protocol
	cert        []byte // DER; empty without AutoMTLS
	sameLibrary bool   // both sides use this library; see sameLibraryField

	tls *tls.Config // with which the host connects; not part of the line
}

// sameLibraryField is the seventh field of the handshake if sameLibrary is set. The plugin then
// sends all of its output before it answers Quit, and may use the pipes of the host. The field
// is not sent to other libraries: go-plugin before 1.6 reads it as a part of the certificate.
const sameLibraryField = "flushes"

func (h handshake) String() string {
	cert := base64.RawStdEncoding.EncodeToString(h.cert)
	line := fmt.Sprintf("%d|%d|%s|%s|%s|%s",
		CoreProtocolVersion, h.version, h.addr.Network(), h.addr.String(), h.protocol, cert)
	if h.sameLibrary {
		line += "|" + sameLibraryField
	}
	return line
}

// handshakeStart matches the beginning of a handshake. Its group is what stands before it
// in the line. Its second half takes other lines that begin with a number and a bar for
// handshakes as well, for the error. It is compiled when it is needed, because plugins do
// not need it.
var handshakeStart = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(.*?)\d\|\d+\|(?:unix|tcp)\||^\d+\|`)
})

// cutHandshake finds the handshake in a line of stdout. Before it may be what the plugin
// has printed without a line end.
func cutHandshake(line []byte) (before, handshake []byte, found bool) {
	match := handshakeStart().FindSubmatch(line)
	if match == nil {
		return line, nil, false
	}
	before = match[1]
	return before, line[len(before):], true
}

// maxShown is how many bytes of a handshake are shown in an error.
const maxShown = 300

// parseHandshake parses the handshake of a plugin.
func parseHandshake(line string) (handshake, error) {
	h, err := parseFields(strings.Split(strings.TrimSpace(line), "|"))
	if err != nil {
		return handshake{}, fmt.Errorf("%w; the handshake is %q", err, line[:min(len(line), maxShown)])
	}
	return h, nil
}

// parseFields parses the fields of a handshake. It ignores unknown fields at the end.
func parseFields(fields []string) (h handshake, err error) {
	if fields[0] != strconv.Itoa(CoreProtocolVersion) {
		return h, fmt.Errorf("it speaks version %q of the core protocol, and this host version %d: "+
			"rebuild it with a current version of the library", fields[0], CoreProtocolVersion)
	}
	if len(fields) < 4 {
		return h, fmt.Errorf("its handshake has %d fields, and at least 4 are needed "+
			"(core version|app version|network|address)", len(fields))
	}
	h.version, err = strconv.Atoi(fields[1])
	if err != nil {
		return h, fmt.Errorf("its handshake has a version that is no number: %q", fields[1])
	}
	h.addr, err = parseAddr(fields[2], fields[3])
	if err != nil {
		return h, fmt.Errorf("its handshake has no usable address: %w", err)
	}
	// Older plugins do not send the other fields.
	h.protocol = ProtocolNetRPC
	if len(fields) > 4 && fields[4] != "" {
		h.protocol = Protocol(fields[4])
	}
	if len(fields) > 5 {
		h.cert, err = base64.RawStdEncoding.DecodeString(fields[5])
		if err != nil {
			return h, fmt.Errorf("its handshake has a certificate that cannot be read: %w", err)
		}
	}
	h.sameLibrary = len(fields) > 6 && fields[6] == sameLibraryField
	return h, nil
}

var errNotAnswered = errors.New("the connection was closed during its handshake: " +
	"does one side use TLS and the other not?")

// dial connects to the plugin.
func (h handshake) dial(ctx context.Context) (net.Conn, error) {
	if h.tls == nil {
		return new(net.Dialer).DialContext(ctx, h.addr.Network(), h.addr.String())
	}
	secure := &tls.Dialer{Config: h.tls}
	conn, err := secure.DialContext(ctx, h.addr.Network(), h.addr.String())
	if err == io.EOF {
		err = errNotAnswered
	}
	return conn, err
}

// allVersions returns the plugins of every version. If both arguments have the same
// version, versioned wins.
func allVersions(version uint, plugins PluginSet, versioned map[int]PluginSet) map[int]PluginSet {
	all := make(map[int]PluginSet)
	if plugins != nil || len(versioned) == 0 {
		all[int(version)] = plugins
	}
	maps.Copy(all, versioned)
	return all
}

// negotiate returns the version that a plugin serves: its highest that is in the list
// of the host. If there is none, it is the plugin's lowest, which an old host without a
// list may have, and which other hosts can name in their error.
func negotiate(sets map[int]PluginSet, hostList string) int {
	accepted := strings.Split(hostList, ",")
	versions := sortedKeys(sets)
	for _, version := range slices.Backward(versions) {
		if slices.Contains(accepted, strconv.Itoa(version)) {
			return version
		}
	}
	return versions[0]
}

// versionList is the host's list of versions, as 1,2,3.
func versionList(sets map[int]PluginSet) string {
	var texts []string
	for _, version := range sortedKeys(sets) {
		texts = append(texts, strconv.Itoa(version))
	}
	return strings.Join(texts, ",")
}

// takeEnvironment returns the variables of the handshake and removes them.
func takeEnvironment(cookie string) map[string]string {
	env := make(map[string]string)
	for _, name := range protocolEnv {
		env[name] = os.Getenv(name)
		_ = os.Unsetenv(name)
	}
	_ = os.Unsetenv(cookie)
	return env
}
