package plugin

import (
	"context"
	"io"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// This file is about what a plugin prints, on its way to the writers of the host. Between a
// host and a plugin of this library, on Unix, the plugin writes to pipes that the host
// reads: what it has printed arrives, whatever ends it. Otherwise the plugin reads its own
// output and sends it on two streams of the connection. The host reads both.

// output copies one output of the plugin, its stdout or stderr, to the host that connected
// last. Output before the first connection waits for it. Output after the last connection
// is dropped, so that it does not block the plugin.
type output struct {
	src    io.Reader
	done   chan struct{}          // closed when all of src has been sent
	stream atomic.Pointer[stream] // to the host that connected last; nil before the first
}

func newOutput(src io.Reader) *output { return &output{src: src, done: make(chan struct{})} }

// attach makes st the stream that gets the output.
func (o *output) attach(st *stream) {
	before := o.stream.Swap(st)
	if before == nil {
		go o.send() // ends with src, which Serve or the owner of another reader closes
	} else {
		_ = before.Close() // it never fails
	}
}

// send sends src until its end.
func (o *output) send() {
	defer close(o.done)
	_, _ = io.Copy(o, o.src) // an error of src is the end of it
}

// Write sends p. It never fails.
func (o *output) Write(p []byte) (int, error) {
	_, _ = o.stream.Load().Write(p) // fails at once if the session has ended
	return len(p), nil
}

// finish closes the stream when all output has been sent, or after the timeout.
func (o *output) finish(timeout time.Duration) {
	if o.stream.Load() == nil {
		return // no host has connected
	}
	waitFor(timeout, o.done)
	_ = o.stream.Load().Close() // it never fails
}

// maxPending is how many bytes of output wait for a writer of the host before the plugin
// has to.
const maxPending = 1 << 20

// hostWriter brings output to a writer of the host, one Write at a time, until one fails:
// that must not stop the plugin. What the writer has not taken waits here, so that only
// the output waits for a slow writer, and not the end of the plugin.
type hostWriter struct {
	w io.Writer

	mu         sync.Mutex // guards the fields below
	changed    *sync.Cond // one of them has been changed
	pending    []byte
	delivering bool // deliver runs
	writing    bool // deliver has taken what was pending, and Write has not returned
	sources    int  // that have output
	inLine     bool // the output ends without a line feed
	hurried    bool // no source waits for room
	closed     bool // no Write of w begins any more
}

// newHostWriter returns a hostWriter for w, which may be nil.
func newHostWriter(w io.Writer) *hostWriter {
	h := &hostWriter{w: w, closed: w == nil}
	h.changed = sync.NewCond(&h.mu)
	return h
}

// begin adds a source of output. end must be called when it has no more.
func (h *hostWriter) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sources++
}

// end removes a source of output. The last one ends the last line, if w logs lines.
func (h *hostWriter) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sources--
	_, logs := h.w.(*lineWriter)
	if h.sources == 0 && h.inLine && logs && !h.closed {
		h.addLocked([]byte{'\n'})
	}
	h.changed.Broadcast()
}

// Write waits until there is room for p. It never fails.
func (h *hostWriter) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.pending) >= maxPending && !h.hurried {
		h.changed.Wait()
	}
	if len(p) > 0 && !h.closed {
		h.addLocked(p)
	}
	return len(p), nil
}

func (h *hostWriter) addLocked(p []byte) {
	h.pending = append(h.pending, p...)
	h.inLine = p[len(p)-1] != '\n'
	if !h.delivering {
		h.delivering = true
		go h.deliver() // ends when nothing is pending and the caller's Write returns
	}
}

// deliver writes what is pending.
func (h *hostWriter) deliver() {
	for p := h.next(); p != nil; p = h.next() {
		_, err := h.w.Write(p)
		if err != nil {
			h.drop()
		}
	}
}

// next takes what is pending, or returns nil if that is nothing. With what it takes, a
// Write has begun: it is marked under the lock, because drop may be called before deliver
// gets to the call.
func (h *hostWriter) next() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.pending
	h.pending = nil
	h.writing = p != nil
	h.delivering = h.writing
	h.changed.Broadcast()
	return p
}

// hurry makes no source wait for room any more: the plugin has ended, and what is left of
// its output is not much.
func (h *hostWriter) hurry() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hurried = true
	h.changed.Broadcast()
}

// drop drops what is pending and all later output, and returns how many bytes are pending.
func (h *hostWriter) drop() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := len(h.pending)
	h.pending = nil
	h.closed = true
	h.changed.Broadcast()
	return n
}

// await waits until there are no sources and nothing is pending, but not past ctx.
func (h *hostWriter) await(ctx context.Context) {
	h.waitWhile(ctx, func() bool { return h.sources > 0 || h.delivering })
}

// awaitWrite waits until the Write that has begun has returned, but not past ctx.
func (h *hostWriter) awaitWrite(ctx context.Context) {
	h.waitWhile(ctx, func() bool { return h.writing })
}

// waitWhile waits while isBusy returns true, but not past ctx. The lock is held in isBusy.
func (h *hostWriter) waitWhile(ctx context.Context, isBusy func() bool) {
	stop := context.AfterFunc(ctx, h.wake)
	defer stop()
	h.mu.Lock()
	defer h.mu.Unlock()
	for isBusy() && ctx.Err() == nil {
		h.changed.Wait()
	}
}

// wake wakes what waits. The lock is held, so that nothing is about to wait.
func (h *hostWriter) wake() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.changed.Broadcast()
}

// hostWriters are the writers of a ClientConfig.
type hostWriters struct {
	stdout, stderr *hostWriter // SyncStdout and SyncStderr
	processStderr  *hostWriter // Stderr
}

// newHostWriters returns the writers. Where two are the same, it gets one Write at a time.
func newHostWriters(stdout, stderr, processStderr io.Writer) *hostWriters {
	h := &hostWriters{
		stdout:        newHostWriter(stdout),
		stderr:        newHostWriter(stderr),
		processStderr: newHostWriter(processStderr),
	}
	if sameWriter(stderr, stdout) {
		h.stderr = h.stdout
	}
	switch {
	case sameWriter(processStderr, stdout):
		h.processStderr = h.stdout
	case sameWriter(processStderr, stderr):
		h.processStderr = h.stderr
	}
	return h
}

func sameWriter(a, b io.Writer) bool { return a != nil && reflect.ValueOf(a).Comparable() && a == b }

func (h *hostWriters) all() []*hostWriter { return []*hostWriter{h.stdout, h.stderr, h.processStderr} }

// await waits until the output has ended and been written, but not longer than timeout.
func (h *hostWriters) await(timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	for _, w := range h.all() {
		w.await(ctx)
	}
}

// close drops what is pending, and returns how many bytes that are. No Write begins any
// more when it has returned: what is dropped cannot be taken. It waits for a Write whose
// data was taken before, but not for long, because that may be one that blocks.
func (h *hostWriters) close() (dropped int) {
	for _, w := range h.all() {
		dropped += w.drop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	for _, w := range h.all() {
		w.awaitWrite(ctx)
	}
	return dropped
}
