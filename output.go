package plugin

// This file is about what a plugin prints, on its way to the host.

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
)

// output copies one output of the plugin, its stdout or stderr, to the host that connected
// last. Output before the first connection waits for it. Output after the last connection
// is dropped, so that it does not block the plugin.
type output struct {
	src  io.Reader
	done chan struct{} // closed when all of src has been sent, or none will be

	mu    sync.Mutex // guards the fields below
	begun bool       // src is being sent, or will not be
	host  *stream    // of the host that connected last
}

func newOutput(src io.Reader) *output { return &output{src: src, done: make(chan struct{})} }

// attach makes st the stream that gets the output.
func (o *output) attach(st *stream) {
	o.mu.Lock()
	before := o.host
	o.host = st
	first := !o.begun
	o.begun = true
	o.mu.Unlock()
	if before != nil {
		_ = before.Close() // it never fails
	}
	if first {
		go o.send() // ends with src, which Serve or the owner of another reader closes
	}
}

// send sends src until its end.
func (o *output) send() {
	defer close(o.done)
	_, _ = io.Copy(o, o.src) // an error of src is the end of it
}

// Write sends p. It never fails.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	host := o.host
	o.mu.Unlock()
	_, _ = host.Write(p) // fails at once if the session has ended
	return len(p), nil
}

// finish closes the stream when all output has been sent, or ctx ends.
func (o *output) finish(ctx context.Context) {
	o.mu.Lock()
	if !o.begun { // no host has connected
		o.begun = true
		close(o.done)
	}
	o.mu.Unlock()
	select {
	case <-o.done:
	case <-ctx.Done():
	}
	o.mu.Lock()
	host := o.host
	o.mu.Unlock()
	if host != nil {
		_ = host.Close() // it never fails
	}
}

// hostWriter writes to a writer of the host, one Write at a time, until that fails or the
// hostWriter is closed. A failed writer must not stop the plugin.
type hostWriter struct {
	w       io.Writer
	writing lock        // serialises Write of w
	closed  atomic.Bool // there is no Write of w any more
}

func newHostWriter(w io.Writer) *hostWriter { return &hostWriter{w: w, writing: newLock()} }

// Write never fails.
func (h *hostWriter) Write(p []byte) (int, error) {
	_ = h.writing.lock(context.Background()) // fails only if the context ends
	defer h.writing.unlock()
	if h.closed.Load() {
		return len(p), nil
	}
	_, err := h.w.Write(p)
	if err != nil {
		h.closed.Store(true)
	}
	return len(p), nil
}

// close makes later output be dropped. It waits for a Write that is running, or until ctx
// ends.
func (h *hostWriter) close(ctx context.Context) {
	h.closed.Store(true)
	err := h.writing.lock(ctx)
	if err == nil {
		h.writing.unlock()
	}
}
