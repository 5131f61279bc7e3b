package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// This file has Supervisor, which starts a plugin when it is needed.

const (
	firstPause  = 100 * time.Millisecond // before the start that follows a failure
	maxPause    = 10 * time.Second       // before a start that follows many
	healthyLife = 10 * time.Second       // of a plugin whose end is no failure
)

// Supervisor starts a plugin when it is first needed, and again when it has died. Its
// methods may be called concurrently.
//
// A start that follows a start that failed, or a life of less than ten seconds, waits 100
// milliseconds after that, and twice as long each time, up to ten seconds. The start after
// a longer life does not wait. Calls are never repeated: the caller knows which may be.
type Supervisor[T any] struct {
	config ClientConfig
	name   string

	// ending is never started. Kill and CleanupClients kill it, which ends the supervisor.
	ending *Client

	mu     sync.Mutex // guards the fields below
	life   *life[T]   // the last one; nil before the first Get
	client *Client    // of the last life that has one
}

// life is one start of the plugin, and the time until its end.
type life[T any] struct {
	lastFailure error // of the start before

	started  chan struct{} // closed when the start is over, and the fields below are set
	client   *Client
	lost     <-chan struct{} // closed when the connection has ended
	instance T
	err      error
	final    bool // the start has failed, and there is no other

	over    chan struct{} // closed when the plugin has ended, and the fields below are set
	endedAt time.Time
	pause   time.Duration // from endedAt to the next start
}

// NewSupervisor returns a Supervisor for the plugin with that name. It does not start it:
// [Supervisor.Get] does. Call [Supervisor.Kill] when the plugin is no longer needed.
// NewSupervisor panics if config is nil or has Reattach set.
func NewSupervisor[T any](config *ClientConfig, name string) *Supervisor[T] {
	if config == nil || config.Reattach != nil {
		panic("plugin: NewSupervisor needs a ClientConfig without Reattach")
	}
	return &Supervisor[T]{config: *config, name: name, ending: NewClient(config)}
}

// Get returns the instance of the plugin that runs. All callers share it, so do not close
// it. If the plugin has not been started, has exited or has lost its connection, Get starts
// it, and kills the process of a lost connection before. Callers at the same time share one
// start. A caller leaves when its ctx ends, and the start goes on.
//
// The errors are those of [Client.Client] and [Dispense]. If ctx ends first, errors.Is
// finds ctx.Err(), and the error of the start before if that has failed. After
// [Supervisor.Kill], [CleanupClients] if config has Managed set, and the end of the context
// of config.Cmd, Get fails for good.
func (s *Supervisor[T]) Get(ctx context.Context) (T, error) {
	life := s.currentLife()
	select {
	case <-life.started:
		return life.instance, life.err
	case <-ctx.Done():
	}
	if isClosed(life.started) {
		return life.instance, life.err // the plugin runs
	}
	err := fmt.Errorf("plugin %s: waiting for its start: %w", s.name, contextError(ctx))
	if life.lastFailure != nil {
		err = fmt.Errorf("%w; the last start failed: %w", err, life.lastFailure)
	}
	var none T
	return none, err
}

// currentLife returns the life that lasts, or begins one.
func (s *Supervisor[T]) currentLife() *life[T] {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.life
	if last != nil && last.lasts() {
		return last
	}
	s.life = &life[T]{started: make(chan struct{}), over: make(chan struct{})}
	if last != nil {
		s.life.lastFailure = last.err
	}
	go s.live(s.life, last) // ends with the plugin, which Kill ends
	return s.life
}

// lasts reports whether the plugin starts or runs, or cannot be started any more.
func (l *life[T]) lasts() bool {
	switch {
	case !isClosed(l.started):
		return true
	case l.err != nil:
		return l.final
	}
	return !l.client.Exited() && !isClosed(l.lost)
}

// live starts the plugin and waits for its end. last is the life before, or nil.
func (s *Supervisor[T]) live(l, last *life[T]) {
	defer close(l.over)
	var pause time.Duration
	if last != nil {
		<-last.over // it has ended, or is being killed
		pause = last.pause
		waitFor(pause-time.Since(last.endedAt), s.ending.Done())
	}
	l.err = s.start(l)
	startedAt := time.Now()
	close(l.started)
	if l.err == nil {
		s.waitEnd(l)
	}
	l.endedAt = time.Now()
	l.pause = nextPause(pause, l.err == nil && l.endedAt.Sub(startedAt) >= healthyLife)
}

// nextPause returns the pause after a start that had this one before it.
func nextPause(pause time.Duration, healthy bool) time.Duration {
	if healthy {
		return 0
	}
	return min(max(2*pause, firstPause), maxPause)
}

// start starts the plugin and dispenses the instance.
func (s *Supervisor[T]) start(l *life[T]) error {
	l.client = NewClient(&s.config)
	var err error
	if s.setClient(l.client) {
		err = s.dispense(l)
		if err == nil {
			return nil
		}
	}
	l.client.Kill()
	neverRan := l.client.ID() == ""
	contextEnded := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	switch {
	case s.ending.Exited():
		err = errors.New("Kill or CleanupClients was called")
	case neverRan && contextEnded:
		err = fmt.Errorf("the context of ClientConfig.Cmd has ended: %w", err)
	default:
		return err
	}
	l.final = true
	return fmt.Errorf("plugin %s: it is not started any more: %w", s.name, err)
}

// setClient sets the client that Kill kills. It returns false if the supervisor has ended.
func (s *Supervisor[T]) setClient(client *Client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending.Exited() {
		return false
	}
	s.client = client
	return true
}

func (s *Supervisor[T]) dispense(l *life[T]) error {
	conn, err := l.client.Client()
	if err != nil {
		return err
	}
	l.lost = conn.(*RPCClient).ended() // it is always one
	l.instance, err = Dispense[T](conn, s.name)
	return err
}

// waitEnd waits until the plugin has exited. It kills a plugin that cannot be called any
// more.
func (s *Supervisor[T]) waitEnd(l *life[T]) {
	select {
	case <-l.client.Done():
	case <-l.lost:
		// The process may be exiting, or else the calls in flight say that it lives.
		waitFor(lostTimeout+drainTimeout, l.client.Done())
	case <-s.ending.Done():
	}
	l.client.Kill() // does nothing if it has exited
}

// Client returns the Client of the plugin that runs or ran last, or nil before the first
// start. It dispenses other plugins of the same process.
func (s *Supervisor[T]) Client() *Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client
}

// Kill ends the plugin as [Client.Kill] does, or its start, and no other is started. It is
// safe to call Kill more than once and at any time.
func (s *Supervisor[T]) Kill() {
	s.ending.Kill()
	s.mu.Lock()
	client, life := s.client, s.life
	s.mu.Unlock()
	if client != nil {
		client.Kill()
	}
	if life != nil {
		waitFor(reapTimeout, life.over) // unless the host's own code is in the way
	}
}
