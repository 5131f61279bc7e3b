// Package plugin lets a Go program start other Go programs as plugins and call
// them through ordinary Go interfaces.
//
// The program is the host. It starts each plugin as a subprocess and connects to
// it once, over a Unix socket or, on Windows, TCP on the loopback interface. On
// that connection runs one yamux session, whose streams carry the calls, in
// net/rpc's protocol and gob, the plugin's stdout and stderr, and whatever readers,
// writers and callbacks are passed in calls. A plugin that crashes takes nothing
// with it but the calls that were in flight.
//
// The names and their meaning are those of the net/rpc half of
// github.com/hashicorp/go-plugin, and hosts and plugins made with the two libraries
// work together. What this package adds then works as far as its documentation
// says.
//
// # A host and a plugin
//
// What the two share is an interface, and a [Plugin] that makes its two ends: the
// one that the host calls, and the one that answers in the plugin.
//
//	// greeter/greeter.go
//	package greeter
//
//	import (
//		"net/rpc"
//
//		"github.com/muxplug/plugin"
//	)
//
//	// Greeter is what a plugin implements and the host uses.
//	type Greeter interface {
//		Greet(name string) (string, error)
//	}
//
//	// Handshake is what both must agree on. It is no secret.
//	var Handshake = plugin.HandshakeConfig{
//		ProtocolVersion:  1,
//		MagicCookieKey:   "GREETER_PLUGIN",
//		MagicCookieValue: "hello",
//	}
//
//	// Plugin makes the two ends of a Greeter. Only the plugin needs Impl.
//	type Plugin struct{ Impl Greeter }
//
//	func (p Plugin) Server(*plugin.MuxBroker) (any, error)                  { return server{p.Impl}, nil }
//	func (p Plugin) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return client{c}, nil }
//
//	// client is the Greeter in the host. It calls the plugin.
//	type client struct{ rpc *rpc.Client }
//
//	func (c client) Greet(name string) (reply string, err error) {
//		err = c.rpc.Call("Plugin.Greet", name, &reply)
//		return reply, err
//	}
//
//	// server answers those calls in the plugin.
//	type server struct{ impl Greeter }
//
//	func (s server) Greet(name string, reply *string) (err error) {
//		*reply, err = s.impl.Greet(name)
//		return err
//	}
//
// The plugin implements the interface and serves it:
//
//	// plugin/main.go
//	package main
//
//	import (
//		"example.com/greeter/greeter"
//		"github.com/muxplug/plugin"
//	)
//
//	type english struct{}
//
//	func (english) Greet(name string) (string, error) { return "Hello, " + name + "!", nil }
//
//	func main() {
//		plugin.Serve(&plugin.ServeConfig{
//			HandshakeConfig: greeter.Handshake,
//			Plugins:         plugin.PluginSet{"greeter": greeter.Plugin{Impl: english{}}},
//		})
//	}
//
// The host starts the plugin, as [Client.Client] does, and dispenses it:
//
//	// main.go
//	package main
//
//	import (
//		"fmt"
//		"log"
//		"os/exec"
//
//		"example.com/greeter/greeter"
//		"github.com/muxplug/plugin"
//	)
//
//	func main() {
//		client := plugin.NewClient(&plugin.ClientConfig{
//			HandshakeConfig: greeter.Handshake,
//			Plugins:         plugin.PluginSet{"greeter": greeter.Plugin{}},
//			Cmd:             exec.Command("./hello-plugin"),
//		})
//		defer client.Kill()
//
//		conn, err := client.Client() // starts the plugin
//		if err != nil {
//			log.Fatal(err)
//		}
//		g, err := plugin.Dispense[greeter.Greeter](conn, "greeter")
//		if err != nil {
//			log.Fatal(err)
//		}
//		fmt.Println(g.Greet("Gopher"))
//	}
//
// # Calls and contexts
//
// Each dispensed plugin has an [rpc.Client] of its own, which [Plugin].Client is
// given; closing it ends what [Plugin].Server returned. Methods are those that
// package net/rpc describes, exported, with an argument, a pointer to a reply and
// an error, on a type that need not be exported; they are called as "Plugin.Name".
// They may take a [context.Context] first:
//
//	func (s *Server) Work(ctx context.Context, args Args, reply *Reply) error
//
// [Call] calls with a context. When it ends, Call returns at once, and so should
// the method, whose context ends with the caller's, when the caller is gone, and
// when the plugin is asked to quit. Methods run in goroutines of their own, as many
// as there are calls.
//
// Call also returns errors that keep their identity: errors.Is finds in them what
// the method returned, for the errors of the standard library that Call lists and
// for those given to [RegisterError] on both sides.
//
// Arguments and replies are what package gob can encode. A value that it cannot
// encode, or an argument that does not fit the method, fails that call alone; so
// does a reply that does not fit, with Call. (Without Call, net/rpc gives up on
// the whole client.) A message holds at most 1 GiB; what is larger should be a stream. A
// receiver without any method that can be called cannot be dispensed, and the
// error says what is wrong with each.
//
// # Streams and callbacks
//
// Readers, writers and callbacks are passed by number, in the arguments or the
// reply of any call, in either direction. The [MuxBroker] hands the numbers out:
//
//   - [MuxBroker.ServeReader] lets the other side read, with [MuxBroker.DialReader];
//   - [MuxBroker.ServeWriter] lets the other side write, with [MuxBroker.DialWriter];
//   - [MuxBroker.ServeRPC] lets the other side call methods, with [MuxBroker.DialRPC].
//
// Readers and writers behave on the far side as they do on the near one: errors
// keep their identity, a slow reader slows its writer, nothing is lost. They need
// this package on both sides. Where the other is go-plugin there are
// [MuxBroker.Accept] and [MuxBroker.Dial], which give a [net.Conn], and
// [MuxBroker.AcceptAndServe].
//
// # Logging
//
// What a plugin's process writes to its stderr comes out of [ClientConfig].Logger,
// under the name of its binary. Records of hclog and slog in JSON keep their level,
// their time and their attributes; lines with [TRACE] to [ERROR] at the front, or
// behind package log's date and time, have that level; a panic and its trace are
// logged at Error, and everything else at Debug. A plugin logs like this:
//
//	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, JSONFormat: true})
//
// It should be made before [Serve] is called, because of what the next section
// says. The default loggers of package log and slog are.
//
// # Stdout and stderr
//
// While a plugin serves, os.Stdout and os.Stderr are the host's: what is written
// there arrives at [ClientConfig].SyncStdout and SyncStderr, byte for byte, and all
// that was written before [Client.Kill] began has arrived when it returns. Where
// one of them is nil, the lines are logged at Debug, as they are; [io.Discard]
// drops them. Before and after, they are the process's own. A plugin should not
// print to stdout before it serves: its host looks there for the handshake, and
// logs anything else as a warning.
//
// The plugin's stdin is the host's, unless [ClientConfig].Cmd has one.
//
// # Versions
//
// [HandshakeConfig].ProtocolVersion is the version of the interfaces. To go on
// serving hosts of an older version, or using older plugins, put the versions into
// VersionedPlugins of [ServeConfig] or [ClientConfig]: the highest that both sides
// have is used, and [Client.NegotiatedVersion] tells which. Without a common one
// the plugin does not start, and the error has a [*VersionError].
//
// Not every change needs a new version, because gob compares structs by the names
// of their fields. A field that only the receiver has keeps its zero value, and one
// that only the sender has is dropped, so fields may be added, and removed, as long
// as zero does no harm; so may methods, if nobody calls a new one on an old plugin,
// which is an error that names those there are. A renamed field is one that was
// removed and another that was added: its value is lost without an error. A field
// of another type is an error of each call that carries it, unless both types are
// signed integers, both unsigned or both floats, when only a value that does not
// fit is, or one is a pointer to the other. Two structs with fields but none in
// common are an error. Raise the version when a field changes its type or its
// meaning, or when an absent value must not be taken for zero.
//
// # Security
//
// [ClientConfig].SecureConfig starts only the binary that has the right checksum;
// on Linux with /proc, the file that was summed is the very file that is executed,
// also if another has taken its place since. On other systems it is not, and
// nowhere does it help if the file itself is written to.
//
// Only the user that the host runs as, or a group set by [UnixSocketConfig], can
// reach the plugin's socket: it is in a directory of its own, made for one start,
// into which nobody else can look, or in which the group can replace nothing. On Windows there is no such directory, and any local user can
// connect to the port. [ClientConfig].AutoMTLS closes that there, and elsewhere to
// members of the group: each side makes a certificate for this start and trusts
// only the other's. With TLSConfig and [ServeConfig].TLSProvider, certificates are
// yours.
//
// # Life and death
//
// [Client.Kill] asks the plugin to quit: contexts of methods end, [Serve] returns,
// and main runs to its end, which ends methods that still run. A process that is
// still there after [ClientConfig].KillTimeout is killed. Use [CleanupClients] to
// kill all plugins that are Managed. SIGTERM ends a plugin in the same gentle way,
// and so does what Windows has for it: a console that is closed, a user who logs
// off. SIGINT, which a terminal sends to the host, too, is left to the host.
//
// A plugin whose host is gone, killed or crashed or exited, ends by itself: Serve
// returns, and a second and a half later the process exits in any case. It notices
// as soon as it has entered Serve. With [ClientConfig].Detach, and after
// [Client.ReattachConfig], it lives on instead, and another host can use it, with
// [ClientConfig].Reattach. Programs that a plugin has started are its own business.
// Windows is different in three things: only Detach lets a plugin live on; one that
// was reattached to is asked to quit and never killed; and one that runs as another
// user, who must not look at the host's process, does not notice its end.
// A plugin of ours survives a go-plugin host, and a go-plugin plugin may survive a
// host of ours.
//
// When a plugin dies, [Client.Done] is closed and [Client.Err] returns an
// [*ExitError] with its exit status, its panic and the last that it wrote to
// stderr. Calls that were in flight fail with an error in which errors.As finds it,
// and errors.Is finds [io.ErrUnexpectedEOF]; later ones fail with
// [rpc.ErrShutdown]. A plugin that does not start is a [*StartError].
//
// A plugin that is stopped, by a debugger say, is not dead: nothing here ends its
// connection while the process lives. [RPCClient.Ping] finds out, within four
// seconds, whether it answers.
//
// # Testing and debugging a plugin
//
// [TestPluginRPCConn] gives the two ends of a connection within one process: the
// quickest way to test that a [Plugin] and its types go over the wire. It, and
// [TestConn] and [TestRPCConn], take a *testing.T, *testing.B or testing.TB.
//
// [ServeTestConfig] makes [Serve] serve within a test, or any process of yours, and
// sends a [ReattachConfig] with which a host, in another process if need be,
// connects: so a plugin can be started by hand in a debugger. Killing that host's
// [Client] then leaves the process alone.
//
// A debugger can also be attached to a plugin that its host has started;
// [Client.ID] is its pid, and the host waits as long as that takes, but for
// [ClientConfig].StartTimeout before the handshake and the contexts of its own
// calls. With a Logger at Debug the host logs when the plugin starts and ends, and
// why connections and streams did; with one at Trace, under the name "wire", it
// logs the direction, type, flags, stream and length of every frame, too.
//
// # Concurrency
//
// Everything exported may be used concurrently where its documentation does not
// say otherwise. In turn:
//
//   - A plugin's Server and Client methods, and the methods that are served, are
//     called concurrently. Of calls that are made one after the other, each begins
//     when the one before has returned; other calls have no order.
//   - SyncStdout, SyncStderr and Stderr of a [ClientConfig] are written to by one
//     goroutine each. If two of them are one writer, it must allow that.
//   - What a [ClientConfig] or [ServeConfig] points to must not be changed while it
//     is in use; nothing in it is changed by this package but Cmd.Process and
//     Cmd.ProcessState.
//   - Goroutines of this package end with the client, session or stream that they
//     belong to, except one that is inside a method, reader, writer or logger of
//     yours: that ends when your code returns.
//
// # What a plugin can do to its host
//
// A plugin is not confined: it is a program with the rights of its user, and the
// host trusts what it executes. What this package sees to is that no plugin hurts
// its host by accident, and that its connection is no way to do so on purpose:
//
//   - Nothing that it prints or sends, or leaves out, crashes the host, blocks
//     [Client.Kill], or is written to the host's log with control characters in it.
//   - What is not gob, not net/rpc or not yamux, and lengths that are forged, end
//     the stream or the session with an error. Messages are limited to 1 GiB.
//   - A panic in a method that the host serves to a plugin is caught: the plugin
//     gets an error, and the host logs the trace. A panic in a plugin's method ends
//     the plugin, because nobody knows what it left half done; the process is there
//     to be ended, and every caller gets the [*ExitError].
//
// What it can do: answer late or wrongly; use as much memory and time as the system
// lets it; and exhaust the memory of its host or, where a type can hold itself, its
// stack with forged values, since package gob does not limit what a value may claim
// to hold, nor how deep. Do not run plugins that you do not trust, or else confine
// them, and keep them away from hosts that must not fail.
//
// The cookie of a [HandshakeConfig] is no secret. It is there so that a plugin that
// is started by hand can say what it is, and a host does not use the plugin of
// another program. What keeps others from the connection is the directory of the
// socket, and AutoMTLS.
package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/rpc"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
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

// PluginSet maps the names under which plugins are dispensed to the plugins.
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
// [filepath.Match] has it, and can be executed: absolute paths, sorted. On
// Windows a file can be executed if it ends in .exe, .com, .bat or .cmd. A dir
// that does not exist has none; a malformed pattern is an error.
func Discover(glob, dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("plugin: discovering plugins: %w", err)
	}
	literally := strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`)
	if runtime.GOOS == "windows" { // where \ escapes nothing, and no name has * or ?
		literally = strings.NewReplacer("[", "[[]")
	}
	paths, err := filepath.Glob(filepath.Join(literally.Replace(dir), glob))
	if err != nil {
		return nil, fmt.Errorf("plugin: discovering plugins like %q: %w", glob, err)
	}
	var found []string
	for _, path := range paths {
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

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	return slices.Sorted(maps.Keys(m))
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

// ExitError describes the end of a plugin that its host had not asked to end.
// It is returned by [Client.Err], and found by errors.As in the error of every
// call that was in flight.
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
	what, _, _ := strings.Cut(printable(e.Panic), "\n")
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
	namedMu sync.RWMutex // guards named, a map that is replaced and never changed
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
	more := make(map[string]error)
	for _, err := range errs {
		name := "registered: " + err.Error()
		if more[name] == nil {
			more[name] = err
		}
	}
	namedMu.Lock()
	defer namedMu.Unlock()
	maps.Copy(more, named) // the first stays
	named = more
}

func namedErrors() map[string]error {
	namedMu.RLock()
	defer namedMu.RUnlock()
	return named
}

// errorNames returns the names of those errors that err is.
func errorNames(err error) (names []string) {
	for name, known := range namedErrors() {
		if errors.Is(err, known) {
			names = append(names, name)
		}
	}
	return names
}

// knownErrors returns the errors with those names that are known here.
func knownErrors(names []string) (errs []error) {
	known := namedErrors()
	for _, name := range names {
		if err := known[name]; err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}
