package plugin

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// These bound the end of a plugin. After KillTimeout, Client.Kill takes the first three at
// most, which are the two seconds that it promises: it waits for the end of the process and
// of its output, and closes the writers. The session has been disconnected by then, so closing
// it waits for nothing, unless the host's own code runs in it.
const (
	reapTimeout  = 1400 * time.Millisecond // from killing a process, or ending a session, to its end
	drainTimeout = 500 * time.Millisecond  // between the end of a process and that of its output
	closeTimeout = 100 * time.Millisecond  // between the last output and the end of its Write

	graceTimeout = 250 * time.Millisecond // for what ends soon, and may not
	lostTimeout  = 3 * time.Second        // between the end of a connection and that of its process
)

// contextError returns ctx.Err(), with the cause if that is another error.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if cause == err {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// event happens once, and has a reason. The first reason wins.
type event struct {
	// ctx ends with the event, for waits that need a context.
	ctx context.Context
	end context.CancelCauseFunc
}

func newEvent() *event {
	ctx, end := context.WithCancelCause(context.Background())
	return &event{ctx: ctx, end: end}
}

// set makes the event happen. The reason must not be nil.
func (e *event) set(reason error) { e.end(reason) }

// done returns a channel that is closed when the event has happened.
func (e *event) done() <-chan struct{} { return e.ctx.Done() }

// isSet reports whether the event has happened.
func (e *event) isSet() bool { return e.ctx.Err() != nil }

// reason returns the reason, or nil if the event has not happened.
func (e *event) reason() error { return context.Cause(e.ctx) }

// lock is a mutex that a waiter can leave. While it is free, it holds a token: receiving
// that locks it, in a select if need be. One goroutine may lock it and another unlock it.
type lock chan struct{}

func newLock() lock {
	l := make(lock, 1)
	l.unlock()
	return l
}

func (l lock) unlock() { l <- struct{}{} }

// waitContext waits until ch is closed or holds something, or for the end of ctx.
func waitContext(ctx context.Context, ch <-chan struct{}) error {
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}

// group is a sync.WaitGroup that can be closed.
type group struct {
	mu     sync.Mutex // guards closed, and calls of Add and Go
	closed bool
	sync.WaitGroup
}

// enter adds one, which must call Done. It returns false if the group is closed.
func (g *group) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.Add(1)
	}
	return !g.closed
}

// spawn runs f in a goroutine, as one that has entered. It returns false if the group is
// closed.
func (g *group) spawn(f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.Go(f)
	}
	return !g.closed
}

func (g *group) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// allDone returns a channel that is closed when all have called Done.
func (g *group) allDone() <-chan struct{} {
	done := make(chan struct{})
	go func() { // ends with the group
		g.Wait()
		close(done)
	}()
	return done
}

// result is the result of work that is done once. The caller for which begin returns
// true does the work and calls set. All others wait.
type result[T any] struct {
	begun atomic.Bool
	ready chan struct{} // closed when value and err are set
	value T             // the zero value if err is not nil
	err   error
}

func newResult[T any]() *result[T] { return &result[T]{ready: make(chan struct{})} }

// begin returns true for its first caller.
func (r *result[T]) begin() bool { return r.begun.CompareAndSwap(false, true) }

// set sets the result.
func (r *result[T]) set(value T, err error) {
	r.value, r.err = value, err
	close(r.ready)
}

// wait waits for the result, or for the end of ctx.
func (r *result[T]) wait(ctx context.Context) (value T, err error) {
	select {
	case <-r.ready:
	case <-ctx.Done():
		if !isClosed(r.ready) {
			return value, fmt.Errorf("plugin: waiting for another call: %w", contextError(ctx))
		}
	}
	return r.value, r.err
}

// get returns the value. It is the zero value if there is an error, or nothing yet.
func (r *result[T]) get() (value T) {
	if isClosed(r.ready) {
		value = r.value
	}
	return value
}

// waitFor waits until all channels are closed. It returns false after the timeout.
func waitFor(timeout time.Duration, chans ...<-chan struct{}) bool {
	late := time.NewTimer(timeout)
	defer late.Stop()
	for _, ch := range chans {
		select {
		case <-ch:
		case <-late.C:
			return false
		}
	}
	return true
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
