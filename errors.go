package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/rpc"
	"os"
	"strings"
	"sync"
)

// This file has the errors of this package, and how errors keep their identity when they
// are sent to the peer.

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
	text := fmt.Sprintf("%s did not start: %v%s", peerName(e.Path), e.Err, inBrackets(e.State))
	if e.hint != "" {
		text += ": " + e.hint
	}
	return text + indented("stdout", e.Stdout) + indented("stderr", e.Stderr)
}

// indented returns the output of a process as lines for an error, or "".
func indented(name, output string) string {
	output = strings.TrimSpace(output)
	if output == "" {
		return ""
	}
	return "\n" + name + ": " + printable(strings.ReplaceAll(output, "\n", "\n\t"))
}

// Unwrap returns Err.
func (e *StartError) Unwrap() error { return e.Err }

// ExitError describes the end of a plugin that did not end at the request of its
// host. [Client.Err] returns it, and errors.As finds it in the error of every call
// that was in flight, and of later ones through [Call] or [Invoke].
type ExitError struct {
	// Path is the path of the plugin's binary. That of a reattached plugin is not known:
	// Path is "at " and its address.
	Path string
	// State is how the process ended. It is nil for a reattached plugin, and if other
	// code of the host has reaped the process, as signal.Ignore(syscall.SIGCHLD) does.
	State *os.ProcessState
	// Stderr is the end of the plugin's stderr, at most 8 KiB, in the order in which it
	// arrived. It includes what was written to os.Stderr during Serve, except in the cases
	// that ClientConfig.SyncStdout lists.
	Stderr string
	// Panic is the message and trace of the panic or fatal error that ended the
	// plugin, or "".
	Panic string
	// Err is the error of AttachedRunner.Wait, with ReattachConfig.ReattachFunc, or
	// why State is not known.
	Err error
}

// Unwrap returns Err.
func (e *ExitError) Unwrap() error { return e.Err }

// Error returns one line, such as "plugin greeter: panic: boom (exit status 2)".
func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: %s%s", peerName(e.Path), e.reason(), inBrackets(e.State))
}

func (e *ExitError) reason() string {
	if e.Panic != "" {
		first, _, _ := strings.Cut(printable(e.Panic), "\n")
		return first
	}
	reason := "the process exited unexpectedly"
	if e.Err != nil {
		reason = e.Err.Error()
	}
	if last := lastLine(e.Stderr); last != "" {
		reason += fmt.Sprintf("; the last line of its stderr is %q", last)
	}
	return reason
}

// VersionError reports that a plugin and its host have no protocol version in common.
// errors.As finds it in the error of [Client.Start].
type VersionError struct {
	// Plugin is the version that the plugin offers.
	Plugin int
	// Host has the versions of the host.
	Host []int
}

// Error names all versions.
func (e *VersionError) Error() string {
	return fmt.Sprintf("it offers version %d of the plugin protocol, and the host has %v: "+
		"one of them is too old (see HandshakeConfig.ProtocolVersion)", e.Plugin, e.Host)
}

var (
	// ErrProcessNotFound is returned by Client.Start if the plugin described by
	// ClientConfig.Reattach does not exist any more.
	ErrProcessNotFound = errors.New("plugin: the plugin to reattach to does not exist")

	// ErrChecksumsDoNotMatch is returned by Client.Start if the binary is not
	// the one that ClientConfig.SecureConfig describes.
	ErrChecksumsDoNotMatch = errors.New("plugin: the checksum of the binary is not the expected one")

	// ErrSecureConfigNoChecksum is returned by Client.Start and
	// SecureConfig.Check if Checksum is empty.
	ErrSecureConfigNoChecksum = errors.New("plugin: SecureConfig has no Checksum")

	// ErrSecureConfigNoHash is returned by Client.Start and SecureConfig.Check
	// if Hash is nil.
	ErrSecureConfigNoHash = errors.New("plugin: SecureConfig has no Hash")

	// ErrSecureConfigAndReattach is returned by Client.Start if ClientConfig
	// has both.
	ErrSecureConfigAndReattach = errors.New("plugin: SecureConfig cannot be used with Reattach: " +
		"a running process cannot be checked")
)

// BasicError is an error that gob can encode, for a reply that has an error in it.
// The errors that methods return need no BasicError.
type BasicError struct {
	// Message is the text of the error.
	Message string
}

// NewBasicError returns an error with the text of err, or nil if err is nil.
func NewBasicError(err error) *BasicError {
	if err == nil {
		return nil
	}
	return &BasicError{Message: err.Error()}
}

// Error returns Message.
func (e *BasicError) Error() string { return e.Message }

// RegisterError makes errors keep their identity when they are sent to the peer: if
// a method returns one of them, or an error that wraps one, errors.Is finds it in the
// error that [Call] or [Invoke] returns. Host and plugin must register the same
// errors, preferably in the init function of the package that declares them. Errors are
// identified by their texts: of two with the same text, the first is registered.
//
// The types of errors do not cross: errors.As does not find a struct of yours in the
// caller. Register a sentinel that it wraps, or return its fields in the result.
//
// RegisterError panics if an error is nil.
func RegisterError(errs ...error) {
	for _, err := range errs {
		registered.LoadOrStore(err.Error(), err)
	}
}

// registered has the registered errors by their texts, which are their names.
var registered sync.Map

func init() {
	RegisterError(io.EOF, io.ErrUnexpectedEOF, fs.ErrNotExist, fs.ErrExist, fs.ErrPermission, fs.ErrInvalid,
		fs.ErrClosed, os.ErrDeadlineExceeded, context.Canceled, context.DeadlineExceeded, errStopped)
}

// sendable returns the text of err and the names of the errors that err is, as they are
// sent. The text is not empty, because net/rpc takes that for success. The methods of err
// may panic, as those of a nil pointer.
func sendable(err error) (text string, names []string) {
	defer func() {
		if p := recover(); p != nil {
			text = fmt.Sprintf("plugin: an error of type %T, whose methods panic: %v", err, p)
		}
	}()
	text = err.Error()
	if text == "" {
		text = fmt.Sprintf("plugin: an error of type %T, without a text", err)
	}
	return text, errorNames(err)
}

// errorNames returns the names of the registered errors that err is, and the names that
// came from the peer with errors that err wraps and that are not known here.
func errorNames(err error) []string {
	names := foreignNames(err)
	for name, known := range registered.Range {
		if errors.Is(err, known.(error)) {
			names = append(names, name.(string))
		}
	}
	return names
}

// foreignNames returns the names that came from the peer and are not known here. They go
// back to it with an error that wraps the one that they came with.
func foreignNames(err error) (names []string) {
	switch err := err.(type) {
	case *remoteError:
		return err.foreign
	case interface{ Unwrap() error }:
		return foreignNames(err.Unwrap())
	case interface{ Unwrap() []error }:
		for _, wrapped := range err.Unwrap() {
			names = append(names, foreignNames(wrapped)...)
		}
	}
	return names
}

// nameSeparator joins the names of an error when they are sent.
const nameSeparator = "\x00"

// remoteError is an error that a method of the peer returned.
type remoteError struct {
	rpc.ServerError
	is      []error  // what it is, as far as it is known here
	foreign []string // the names of what else it is
}

// newRemoteError returns the error that arrived with these names, which are joined. own
// are the errors of the call; it may be nil.
func newRemoteError(text rpc.ServerError, names string, own *callErrors) error {
	if names == "" {
		return text
	}
	e := &remoteError{ServerError: text}
	for name := range strings.SplitSeq(names, nameSeparator) {
		if err := own.find(name); err != nil {
			e.is = append(e.is, err)
		} else if known, ok := registered.Load(name); ok {
			e.is = append(e.is, known.(error))
		} else {
			e.foreign = append(e.foreign, name)
		}
	}
	return e
}

func (e *remoteError) Unwrap() []error { return append([]error{e.ServerError}, e.is...) }

// maxCallErrors is how many errors callErrors keeps. Then it begins anew.
const maxCallErrors = 1000

// callErrors has the errors that the arguments of one call have returned: its readers,
// writers and callbacks. When a reader fails with err, err is sent with a random name, which
// only this call knows. If the method returns an error that wraps what it has received, the
// name comes back, and the error of the call wraps err itself.
type callErrors struct {
	mu     sync.Mutex // guards byName
	byName map[string]error
}

// add keeps err and returns its name.
func (c *callErrors) add(err error) (name string) {
	name = fmt.Sprintf("%x", rand.Uint64())
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byName == nil || len(c.byName) == maxCallErrors {
		c.byName = make(map[string]error)
	}
	c.byName[name] = err
	return name
}

// find returns the error with a name, or nil. A nil *callErrors has none.
func (c *callErrors) find(name string) error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byName[name]
}

// anyPeer stands for a peer that has no name, on either side: it begins most errors here.
const anyPeer = "plugin"

// unanswered is the error of a call that was not answered, because its context has ended
// or the connection was lost.
type unanswered struct {
	peer   string // as in session.peer: what peerName returns, or anyPeer
	method string // as it was called
	err    error
}

// Error returns the text of err with the names of the peer and the method.
func (e *unanswered) Error() string {
	text := strings.TrimPrefix(e.err.Error(), e.peer+": ") // as peerName has it
	text = strings.TrimPrefix(text, "plugin: ")
	return fmt.Sprintf("%s: %s: %s", e.peer, strings.TrimPrefix(e.method, "Plugin."), text)
}

func (e *unanswered) Unwrap() error { return e.err }

// lostError is the error of calls and streams when the connection has ended. errors.Is finds the field kind in it, too:
// io.ErrUnexpectedEOF of what was in use then, and rpc.ErrShutdown of calls that begin later.
type lostError struct {
	cause error
	kind  error
}

func (e *lostError) Error() string   { return e.cause.Error() }
func (e *lostError) Unwrap() []error { return []error{e.cause, e.kind} }

// errWireFailed is the error of a message that cannot be sent because the stream has ended.
var errWireFailed = errors.New("plugin: the stream has ended")

// errStopped is the error of calls, Reads and Writes of what the peer has stopped serving.
var errStopped = errors.New("plugin: the peer has stopped serving this")

// recoverTo, if deferred, turns a panic into an error.
func recoverTo(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("panic: %v", p)
	}
}
