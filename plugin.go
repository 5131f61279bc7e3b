package plugin

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// Plugin is implemented once for each interface that plugins can implement; a
// program shares that implementation with its plugins. The two methods are
// called on opposite sides.
type Plugin interface {
	// Server is called in the plugin each time the host dispenses it. It
	// returns a value whose methods serve the host's calls, as described for
	// net/rpc's Register; a method may take a context.Context first. See
	// [Call].
	Server(*MuxBroker) (any, error)

	// Client is called in the host. It returns an implementation of the
	// interface that calls those methods, as "Plugin.Name", through the
	// client that it is given. Closing that client ends what Server returned.
	Client(*MuxBroker, *rpc.Client) (any, error)
}

// PluginSet is plugins by the names under which they are dispensed.
type PluginSet map[string]Plugin

// Protocol is what is spoken on the connection.
type Protocol string

const (
	// ProtocolInvalid is the protocol of a plugin that could not be started.
	ProtocolInvalid Protocol = ""
	// ProtocolNetRPC is what this library speaks.
	ProtocolNetRPC Protocol = "netrpc"
	// ProtocolGRPC is spoken by plugins made with go-plugin's gRPC half. They
	// are refused with an error that says so, also where it is allowed.
	ProtocolGRPC Protocol = "grpc"
)

// ClientProtocol is the host's end of a connection, an [*RPCClient].
type ClientProtocol interface {
	io.Closer

	// Dispense returns an instance of the plugin with that name.
	Dispense(string) (any, error)

	// Ping checks that the plugin answers.
	Ping() error
}

// ServerProtocol is the plugin's end of connections, an [*RPCServer].
type ServerProtocol interface {
	// Init is called once, before everything else.
	Init() error

	// Config returns what the host needs to know beforehand, if anything.
	Config() string

	// Serve serves connections until the listener is closed.
	Serve(net.Listener)
}

// Dispense asks a connection for an instance of a plugin, and returns it with
// its type. If it is of another type, the error names both.
//
//	greeter, err := plugin.Dispense[Greeter](client, "greeter")
func Dispense[T any](c ClientProtocol, name string) (T, error) {
	var none T
	v, err := c.Dispense(name)
	if err != nil {
		return none, err
	}
	t, ok := v.(T)
	if !ok {
		return none, fmt.Errorf("plugin %q is a %T and not a %v", name, v, reflect.TypeFor[T]())
	}
	return t, nil
}

// Discover returns the files in dir that match the pattern glob, as
// [path.Match] has it, and can be executed: absolute paths, sorted. On Windows
// a file can be executed if it ends in .exe, .com, .bat or .cmd. A dir that
// does not exist has none; a malformed pattern is an error.
func Discover(glob, dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("plugin: discovering plugins: %w", err)
	}
	names, err := fs.Glob(os.DirFS(dir), filepath.ToSlash(glob))
	if err != nil {
		return nil, fmt.Errorf("plugin: discovering plugins like %q: %w", glob, err)
	}
	var found []string
	for _, name := range names {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if info, err := os.Stat(path); err == nil && executable(info) {
			found = append(found, path)
		}
	}
	slices.Sort(found)
	return found, nil
}

func executable(info fs.FileInfo) bool {
	if runtime.GOOS == "windows" {
		ext := strings.ToLower(filepath.Ext(info.Name()))
		return info.Mode().IsRegular() && slices.Contains([]string{".exe", ".com", ".bat", ".cmd"}, ext)
	}
	return info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// BasicError is an error that gob can encode, for a reply that holds one. An
// error that a method returns needs no such thing.
type BasicError struct {
	Message string
}

// NewBasicError returns err with its text alone, or nil if err is nil.
func NewBasicError(err error) *BasicError {
	if err == nil {
		return nil
	}
	return &BasicError{err.Error()}
}

// Error returns the text.
func (e *BasicError) Error() string { return e.Message }

var (
	// ErrProcessNotFound is returned by Start where [ClientConfig].Reattach
	// names a plugin that is not there any more.
	ErrProcessNotFound = errors.New("plugin: there is no such plugin to reattach to")

	// ErrChecksumsDoNotMatch is returned by Start where the binary is not the
	// one that [SecureConfig] describes.
	ErrChecksumsDoNotMatch = errors.New("plugin: the checksum of the binary is not the expected one")

	// ErrSecureConfigNoChecksum is returned for a [SecureConfig] without Checksum.
	ErrSecureConfigNoChecksum = errors.New("plugin: SecureConfig has no Checksum")

	// ErrSecureConfigNoHash is returned for a [SecureConfig] without Hash.
	ErrSecureConfigNoHash = errors.New("plugin: SecureConfig has no Hash")

	// ErrSecureConfigAndReattach is returned by Start where both are set.
	ErrSecureConfigAndReattach = errors.New("plugin: SecureConfig cannot be used with Reattach: what runs already cannot be checked")
)

// ExitError says how a plugin ended that its host did not end. It is returned
// by [Client.Err], and found by errors.As in the error of every call that was
// in flight.
type ExitError struct {
	// Path is the plugin's binary.
	Path string
	// State is how the process ended; nil for a plugin that was reattached to.
	State *os.ProcessState
	// Stderr is the last that the plugin wrote there, 8 KiB at most.
	Stderr string
	// Panic is the message and the trace of the panic or fatal error that the
	// plugin died of, if it did.
	Panic string
}

// Error says what happened in one line, as in
// "plugin greeter: panic: boom (exit status 2)".
func (e *ExitError) Error() string {
	what, _, _ := strings.Cut(e.Panic, "\n")
	if what == "" {
		what = "the process ended unasked"
		if last := lastLine(e.Stderr); last != "" {
			what += fmt.Sprintf(", its last words being %q", last)
		}
	}
	return fmt.Sprintf("plugin %s: %s%s", pluginName(e.Path), what, inBrackets(e.State))
}

func inBrackets(state *os.ProcessState) string {
	if state == nil {
		return ""
	}
	return " (" + state.String() + ")"
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// pluginName is what a plugin is called in logs and errors.
func pluginName(path string) string {
	return strings.TrimSuffix(filepath.Base(path), ".exe")
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

// sentError is an error as it is sent: its text, and the names of those errors
// it is that both sides know.
type sentError struct {
	Text string
	Is   []string
}

// sendable returns err as it is sent. An empty text would mean success to
// net/rpc. An error may panic when it is asked what it is: a nil pointer, say.
func sendable(err error) (e *sentError) {
	defer func() {
		if p := recover(); p != nil {
			e = &sentError{Text: fmt.Sprintf("plugin: an error of type %T, whose methods panic: %v", err, p)}
		}
	}()
	text := err.Error()
	if text == "" {
		text = fmt.Sprintf("plugin: an error of type %T, without a text", err)
	}
	return &sentError{text, errorNames(err)}
}

// remoteError is an error that the other side returned.
type remoteError struct {
	rpc.ServerError
	is []error // what it is there, as known here
}

func (e *remoteError) Unwrap() []error { return append([]error{e.ServerError}, e.is...) }

// The errors that keep their identity on the way, by name.
var (
	namedMu sync.RWMutex // guards named
	named   = map[string]error{
		"io.EOF":                   io.EOF,
		"io.ErrUnexpectedEOF":      io.ErrUnexpectedEOF,
		"fs.ErrNotExist":           fs.ErrNotExist,
		"fs.ErrExist":              fs.ErrExist,
		"fs.ErrPermission":         fs.ErrPermission,
		"fs.ErrInvalid":            fs.ErrInvalid,
		"fs.ErrClosed":             fs.ErrClosed,
		"os.ErrDeadlineExceeded":   os.ErrDeadlineExceeded,
		"context.Canceled":         context.Canceled,
		"context.DeadlineExceeded": context.DeadlineExceeded,
	}
)

// RegisterError makes errors keep their identity on the way from one side to
// the other: where a method returns one of them, or an error that wraps it,
// errors.Is finds it in what [Call] returns. The host and the plugin must
// register the same errors; they are told apart by their texts, so of two with
// one text the first stays. Register what your plugins' shared package
// declares in that package's init function; an error stays registered.
//
// RegisterError may be called concurrently. It panics if an error is nil.
func RegisterError(errs ...error) {
	namedMu.Lock()
	defer namedMu.Unlock()
	for _, err := range errs {
		name := "registered: " + err.Error()
		if named[name] == nil {
			named[name] = err
		}
	}
}

// errorNames returns the names of those errors that err is.
func errorNames(err error) (names []string) {
	namedMu.RLock()
	defer namedMu.RUnlock()
	for name, known := range named {
		if errors.Is(err, known) {
			names = append(names, name)
		}
	}
	return names
}

// knownErrors returns the errors with those names that are known here.
func knownErrors(names []string) (errs []error) {
	namedMu.RLock()
	defer namedMu.RUnlock()
	for _, name := range names {
		if err := named[name]; err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// startHint says what may be the cause, where that can be known.
func startHint(e *StartError, h *HandshakeConfig) string {
	var coreText = errors.As(e.Err, new(*VersionError))
	switch {
	case coreText:
		return ""
	case e.State != nil && strings.Contains(e.Stderr, "is a plugin"):
		return fmt.Sprintf("it did not accept the cookie %s: it is a plugin of another program, or its HandshakeConfig is another one", h.MagicCookieKey)
	case e.Stdout != "":
		return "what it printed to stdout is no handshake: does its main call plugin.Serve, and print nothing before?"
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
	case errors.Is(e.Err, syscall.ENOEXEC):
		if kind := binaryKind(e.Path); kind != "" {
			return fmt.Sprintf("it is built for %s, and this host runs on %s/%s", kind, runtime.GOOS, runtime.GOARCH)
		}
		return fmt.Sprintf("it is no program for %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	return ""
}

// head reads the beginning of a file.
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
		return "Linux or another Unix on " + known(arch, int(machine))
	case bytes.HasPrefix(head, []byte("\xcf\xfa\xed\xfe")):
		cpu := le.Uint32(head[4:])
		return "macOS on " + known(map[uint32]string{0x01000007: "amd64", 0x0100000c: "arm64"}[cpu], int(cpu))
	case bytes.HasPrefix(head, []byte("MZ")):
		at := int(le.Uint32(head[60:]))
		if at+6 > len(head) || at < 0 {
			return "Windows"
		}
		machine := le.Uint16(head[at+4:])
		return "Windows on " + known(map[uint16]string{0x14c: "386", 0x8664: "amd64", 0xaa64: "arm64"}[machine], int(machine))
	}
	return ""
}

func known(arch string, number int) string {
	if arch == "" {
		return fmt.Sprintf("processor %#x", number)
	}
	return arch
}
