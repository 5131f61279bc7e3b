package plugin

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file is about what a host can set, and which plugins it accepts with that.

const (
	defaultStartTimeout  = time.Minute
	defaultKillTimeout   = 2 * time.Second
	maxKillTimeout       = math.MaxInt64 / 2 // so that other times can be added
	defaultLogBufferSize = 64 << 10
)

// ClientConfig describes a plugin to its host. NewClient copies it, and it can be used
// again to start the plugin again. Only Cmd.Process and Cmd.ProcessState are changed.
// Exactly one of Cmd and Reattach must be set.
type ClientConfig struct {
	// HandshakeConfig must be that of the plugin.
	HandshakeConfig

	// Plugins are the plugins of version HandshakeConfig.ProtocolVersion.
	Plugins PluginSet

	// VersionedPlugins are the plugins of each protocol version. The highest
	// version that both sides have is used. If it has
	// HandshakeConfig.ProtocolVersion, Plugins is ignored.
	VersionedPlugins map[int]PluginSet

	// Cmd is the command that starts the plugin. A copy of it is started. If
	// Cmd.Stdin is nil, it is os.Stdin. If it is not an *os.File, nothing waits for a
	// Read of it when the plugin ends. Cmd.Stdout and Cmd.Stderr must be nil: see
	// SyncStdout, SyncStderr and Stderr. Cmd.Env is added to the host's
	// environment and wins over it.
	//
	// The end of the context of [exec.CommandContext] kills the plugin, and every
	// other that was started with the same Cmd. Cmd.Cancel is then called once
	// for each process, one call at a time, with Cmd.Process set to that process.
	//
	// The plugin is in the process group of the host: a signal that is sent to the
	// group, such as SIGTERM, reaches both. Cmd.SysProcAttr can change that.
	Cmd *exec.Cmd

	// Reattach describes a plugin that is running.
	Reattach *ReattachConfig

	// SecureConfig, if not nil, has the checksum of the binary.
	SecureConfig *SecureConfig

	// TLSConfig, if not nil, is used for the connection. The plugin needs a
	// matching ServeConfig.TLSProvider.
	TLSConfig *tls.Config

	// Managed makes CleanupClients kill the plugin.
	Managed bool

	// MinPort and MaxPort limit the TCP port of the plugin on Windows. If both are
	// zero, it is any free port. It is an error of Start if MinPort is above
	// MaxPort. Other systems use Unix sockets.
	MinPort, MaxPort uint

	// StartTimeout limits the time until the handshake and, separately, the time to
	// connect. The default is one minute.
	StartTimeout time.Duration

	// KillTimeout is how long Kill waits for the plugin to exit before it kills
	// the process. If it cannot ask the plugin to quit, as when the connection is
	// lost, Kill waits a quarter of a second instead. The default is two seconds.
	KillTimeout time.Duration

	// Stderr, if not nil, gets what the process writes to stderr, byte for byte.
	// Logger gets it line by line. A Write that blocks stops the plugin's output when
	// about 1 MiB waits for it. It delays Done by a quarter of a second
	// at most, and Kill not beyond its bound. A Writer that fails is not written to
	// again. Writers that are the same get one Write at a time.
	Stderr io.Writer

	// SyncStdout and SyncStderr get what the plugin writes to os.Stdout and
	// os.Stderr while it serves. If nil, output is logged line by line at Debug
	// level; io.Discard drops it. For a Write that blocks, see Stderr.
	//
	// What the plugin prints just before it exits or crashes arrives, too. It may be
	// lost on Windows, with Detach, after ReattachConfig or in test mode, if the
	// plugin is served with go-plugin, or if it is not a child of the host, but of a
	// shell, for example.
	SyncStdout io.Writer
	SyncStderr io.Writer

	// AllowedProtocols are the protocols that the plugin may use. The default is
	// ProtocolNetRPC, the only one that works.
	AllowedProtocols []Protocol

	// Logger logs for this library and, under the name of its binary, for the
	// plugin. The default is hclog.Default() named "plugin".
	Logger hclog.Logger

	// PluginLogBufferSize is the length in bytes at which lines of the plugin are
	// cut before they are logged. The default is 64 KiB.
	PluginLogBufferSize int

	// AutoMTLS encrypts the connection with certificates that are made for this
	// start, so that only this host can connect and only the plugin can answer.
	// The plugin needs no setting. TLSConfig is ignored. AutoMTLS cannot be used
	// with Reattach.
	//
	// On Windows the default is true, unless TLSConfig, Reattach or Detach is set.
	// If AutoMTLS is not set and the plugin answers without a certificate, as
	// plugins with a TLSProvider do, the host logs a warning and connects without.
	AutoMTLS bool

	// SkipHostEnv starts the plugin without the host's environment. It gets
	// Cmd.Env and the variables of the handshake.
	SkipHostEnv bool

	// UnixSocketConfig configures the plugin's Unix socket. If nil, it is the
	// zero UnixSocketConfig.
	UnixSocketConfig *UnixSocketConfig

	// Detach lets the plugin run on when the host exits without Kill, so that
	// another host can reattach. Otherwise the plugin exits; if it is stopped, as
	// by SIGSTOP, it exits when it is continued. On systems other than Windows, a
	// call of ReattachConfig does the same as Detach. Do not set AutoMTLS then: only
	// the host that started the plugin has the certificates.
	Detach bool
}

// withDefaults returns a copy in which VersionedPlugins has all versions, Logger has the
// name of the plugin, and the fields that are not set have their defaults. SyncStdout and
// SyncStderr get theirs in hostWriters. The fields of UnixSocketConfig and Reattach stay as
// they are: methods of the two return what is meant.
func (c *ClientConfig) withDefaults() ClientConfig {
	config := *c
	config.VersionedPlugins = allVersions(c.ProtocolVersion, c.Plugins, c.VersionedPlugins)
	config.StartTimeout = cmp.Or(c.StartTimeout, defaultStartTimeout)
	config.KillTimeout = min(cmp.Or(c.KillTimeout, defaultKillTimeout), maxKillTimeout)
	if config.PluginLogBufferSize <= 0 {
		config.PluginLogBufferSize = defaultLogBufferSize
	}
	if config.Logger == nil {
		config.Logger = hclog.Default().Named("plugin")
	}
	if config.AllowedProtocols == nil {
		config.AllowedProtocols = []Protocol{ProtocolNetRPC}
	}
	if config.UnixSocketConfig == nil {
		config.UnixSocketConfig = &UnixSocketConfig{}
	}
	if c.Cmd != nil {
		config.Logger = config.Logger.Named(c.name())
	}
	return config
}

// hostWriters returns the writers for the output of a plugin. Output without a writer is
// logged.
func (c *ClientConfig) hostWriters() *hostWriters {
	stdout, stderr := c.SyncStdout, c.SyncStderr
	if stdout == nil {
		stdout = &lineWriter{max: c.PluginLogBufferSize, emit: c.logLine}
	}
	if stderr == nil {
		stderr = &lineWriter{max: c.PluginLogBufferSize, emit: c.logLine}
	}
	return newHostWriters(stdout, stderr, c.Stderr)
}

func (c *ClientConfig) logLine(line []byte, cut int) {
	c.Logger.Debug(printable(string(line)) + cutMark(cut))
}

// name returns the name of the plugin for errors.
func (c *ClientConfig) name() string {
	switch {
	case c.Cmd != nil:
		return pluginName(c.Cmd.Path)
	case c.Reattach != nil:
		return c.Reattach.name()
	}
	return ""
}

// testMode reports whether the plugin runs in test mode.
func (c *ClientConfig) testMode() bool { return c.Reattach != nil && c.Reattach.Test }

// sendsCertificate reports whether the host sends a certificate: with AutoMTLS and, on
// Windows, where any local user can connect, also by itself.
func (c *ClientConfig) sendsCertificate() bool {
	if c.AutoMTLS {
		return true
	}
	return runtime.GOOS == "windows" && c.TLSConfig == nil && c.Reattach == nil && !c.Detach
}

// tlsFor checks whether the host can use a plugin with that handshake, and returns the
// TLS configuration for it. cert is the certificate of the host, with AutoMTLS.
func (c *ClientConfig) tlsFor(h handshake, cert tls.Certificate) (*tls.Config, error) {
	if h.protocol == ProtocolGRPC {
		return nil, errors.New("it uses gRPC, and this library only net/rpc: " +
			"the plugin must be served with this library, or with the net/rpc half of go-plugin")
	}
	allowed := slices.Contains(c.AllowedProtocols, h.protocol)
	if h.protocol != ProtocolNetRPC || !allowed {
		return nil, fmt.Errorf("it uses the protocol %q, and ClientConfig.AllowedProtocols is %q",
			h.protocol, c.AllowedProtocols)
	}
	_, known := c.VersionedPlugins[h.version]
	if !known {
		return nil, &VersionError{Plugin: h.version, Host: sortedKeys(c.VersionedPlugins)}
	}
	if !c.sendsCertificate() {
		return c.TLSConfig, nil
	}
	if len(h.cert) == 0 && !c.AutoMTLS {
		c.Logger.Warn("the plugin has not answered with a certificate, so any local user can connect to it")
		return nil, nil
	}
	if len(h.cert) == 0 {
		return nil, errors.New("it has not answered with a certificate, as AutoMTLS needs: " +
			"was it served with a ServeConfig.TLSProvider?")
	}
	pluginCert, err := x509.ParseCertificate(h.cert)
	if err != nil {
		return nil, fmt.Errorf("its certificate cannot be read: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(pluginCert)
	return mutualTLS(cert, pool), nil
}

// validate returns what is wrong with a configuration.
func (c *ClientConfig) validate() error {
	switch {
	case c.SecureConfig != nil && c.Reattach != nil:
		return ErrSecureConfigAndReattach
	case (c.Cmd == nil) == (c.Reattach == nil):
		return errors.New("plugin: exactly one of ClientConfig.Cmd and ClientConfig.Reattach must be set")
	case c.MinPort > c.MaxPort:
		return fmt.Errorf("plugin: ClientConfig.MinPort, %d, is above MaxPort, %d", c.MinPort, c.MaxPort)
	case c.Reattach != nil && c.AutoMTLS:
		return errors.New("plugin: ClientConfig.AutoMTLS cannot be used with Reattach: " +
			"only the host that started the plugin has the certificates")
	case c.Reattach != nil && c.Reattach.Addr == nil:
		return errors.New("plugin: ReattachConfig has no Addr")
	case c.Reattach != nil:
		return nil
	case c.MagicCookieKey == "" || c.MagicCookieValue == "":
		return errors.New("plugin: ClientConfig has no magic cookie: " +
			"set HandshakeConfig.MagicCookieKey and MagicCookieValue")
	case c.Cmd.Stdout != nil || c.Cmd.Stderr != nil:
		return errors.New("plugin: ClientConfig.Cmd has Stdout or Stderr set: " +
			"the plugin needs them to report to its host; see SyncStdout and Stderr")
	}
	return nil
}

// SecureConfig has the checksum of a plugin's binary. On Linux with /proc, the file
// that was checked is the file that runs, even if its path gets another file. (A script
// sees another path in $0.) On other systems, the replacement runs. A file that is
// changed in place after the check runs on every system. Kill waits for the check.
//
// Several clients may use one SecureConfig.
type SecureConfig struct {
	// Checksum is the expected checksum.
	Checksum []byte
	// Hash computes the checksum, such as sha256.New().
	Hash hash.Hash
}

var hashMu sync.Mutex // guards every Hash

// Check reports whether a file has the expected checksum. It returns
// [ErrSecureConfigNoChecksum], [ErrSecureConfigNoHash], or an error of reading the file.
// Another checksum is not an error.
func (s *SecureConfig) Check(filePath string) (bool, error) {
	f, err := s.open(filePath)
	switch err {
	case nil:
		return true, f.Close()
	case ErrChecksumsDoNotMatch:
		return false, nil
	}
	return false, err
}

// open opens a file if it has the expected checksum.
func (s *SecureConfig) open(path string) (*os.File, error) {
	switch {
	case len(s.Checksum) == 0:
		return nil, ErrSecureConfigNoChecksum
	case s.Hash == nil:
		return nil, ErrSecureConfigNoHash
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	err = s.verify(f)
	if err != nil {
		_ = f.Close() // it was only read
		return nil, err
	}
	return f, nil
}

// verify compares the checksum of a file with the expected one.
func (s *SecureConfig) verify(f io.Reader) error {
	hashMu.Lock()
	defer hashMu.Unlock()
	s.Hash.Reset()
	_, err := io.Copy(s.Hash, f)
	if err != nil {
		return err
	}
	if !bytes.Equal(s.Hash.Sum(nil), s.Checksum) {
		return ErrChecksumsDoNotMatch
	}
	return nil
}
