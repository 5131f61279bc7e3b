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
// methods may be called concurrently. The zero Supervisor cannot be used.
//
// After a failed start, or a life of less than ten seconds, the next start waits 100
// milliseconds, and twice as long each time, up to ten seconds. The start after a longer
// life does not wait. Calls are never repeated: the caller knows which may be.
type Supervisor[T any] struct {
	config ClientConfig
	name   string
	ended  *event        // no plugin is started any more
	pause  time.Duration // before the next start; used by one live at a time

	mu     sync.Mutex // guards the fields below
	life   *life[T]   // the last one; nil before the first Get
	client *Client    // of the last start
}

// life is one start of the plugin, and the time until the next may begin.
type life[T any] struct {
	lastFailure error // of the start before

	started  chan struct{} // closed when the start is over, and the fields below are set
	instance T
	err      error
	lost     <-chan struct{} // closed when the connection has ended

	over chan struct{} // closed when the plugin has ended, and the pause after it
}

// NewSupervisor returns a Supervisor for the plugin with that name. It does not start it:
// [Supervisor.Get] does. Call [Supervisor.Kill] when the plugin is no longer needed.
// NewSupervisor panics if config is nil or has Reattach set.
func NewSupervisor[T any](config *ClientConfig, name string) *Supervisor[T] {
	if config == nil || config.Reattach != nil {
		panic("plugin: NewSupervisor needs a ClientConfig without Reattach")
	}
	s := &Supervisor[T]{config: *config, name: name, ended: newEvent()}
	if config.Managed {
		managed.Store(s, nil) // which kills its clients
		s.config.Managed = false
	}
	return s
}

// Get returns the instance of the plugin that runs. All callers share it, so do not close
// it. If the plugin has not been started, has exited or has lost its connection, Get starts
// it, and kills the process of a lost connection before. Callers at the same time share one
// start. A caller leaves when its ctx ends, and the start goes on. If the plugin runs, Get
// returns the instance, even if ctx has ended.
//
// The errors are those of [Client.Client] and [Dispense]. If ctx ends first, errors.Is
// finds ctx.Err(), and the error of the start before if that has failed. Get fails for
// good after [Supervisor.Kill]; after [CleanupClients], if config has Managed set; and when
// the context of config.Cmd has ended.
func (s *Supervisor[T]) Get(ctx context.Context) (instance T, err error) {
	life := s.currentLife()
	select {
	case <-life.started:
	case <-ctx.Done():
	}
	if isClosed(life.started) { // even if ctx has ended
		return life.instance, life.err
	}
	err = fmt.Errorf("plugin %s: waiting for its start: %w", s.name, contextError(ctx))
	if life.lastFailure != nil {
		err = fmt.Errorf("%w; the last start failed: %w", err, life.lastFailure)
	}
	return instance, err
}

// currentLife returns the life that lasts, or begins one.
func (s *Supervisor[T]) currentLife() *life[T] {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.life
	if last != nil && s.lastsLocked(last) {
		return last
	}
	s.life = &life[T]{started: make(chan struct{}), over: make(chan struct{})}
	if last != nil {
		s.life.lastFailure = last.err
	}
	go s.live(s.life, last) // ends with the plugin, which Kill ends
	return s.life
}

// lastsLocked reports whether the plugin of the last life starts or runs.
func (s *Supervisor[T]) lastsLocked(l *life[T]) bool {
	if !isClosed(l.started) {
		return true
	}
	return l.err == nil && !s.client.Exited() && !isClosed(l.lost)
}

// live starts the plugin, waits for its end, and pauses. last is the life before, or nil.
func (s *Supervisor[T]) live(l, last *life[T]) {
	defer close(l.over)
	if last != nil {
		<-last.over
	}
	client, err := s.start(l)
	if err != nil && s.ended.isSet() {
		err = fmt.Errorf("plugin %s: it is not started any more: %w", s.name, s.ended.reason())
	}
	l.err = err
	startedAt := time.Now()
	close(l.started)
	if err == nil {
		select {
		case <-client.Done():
		case <-l.lost:
			// The process may be exiting. If it is not, the calls in flight say so after
			// lostTimeout. Wait until they have: after Kill, they would blame it.
			waitFor(lostTimeout+drainTimeout, client.Done())
		}
		client.Kill() // waits for nothing if it has exited, but releases the connection
	}
	s.pause = nextPause(s.pause, err == nil && time.Since(startedAt) >= healthyLife)
	waitFor(s.pause, s.ended.done())
}

// start starts the plugin and dispenses the instance. If it fails, no process is left.
func (s *Supervisor[T]) start(l *life[T]) (*Client, error) {
	client := s.newClient()
	if client == nil {
		return nil, errKilled
	}
	conn, err := client.Client()
	if err == nil {
		l.lost = conn.(*RPCClient).session.ended() // it is always one
		l.instance, err = Dispense[T](conn, s.name)
	}
	if err == nil {
		return client, nil
	}
	client.Kill()
	contextEnded := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	if contextEnded && client.ID() == "" { // there was no process
		s.ended.set(fmt.Errorf("the context of ClientConfig.Cmd has ended: %w", err))
	}
	return nil, err
}

// newClient returns the client of a start, which Kill kills. It returns nil if the
// supervisor has ended.
func (s *Supervisor[T]) newClient() *Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended.isSet() {
		return nil
	}
	s.client = NewClient(&s.config)
	return s.client
}

// nextPause returns the pause after a start. The one before that start was pause.
func nextPause(pause time.Duration, healthy bool) time.Duration {
	if healthy {
		return 0
	}
	return min(max(2*pause, firstPause), maxPause)
}

// Client returns the Client of the plugin that runs or ran last, or nil before the first
// start. To dispense other plugins of the same process, call its Client method and
// [Dispense].
func (s *Supervisor[T]) Client() *Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client
}

// Kill ends the plugin as [Client.Kill] does, or its start, and no other is started. It is
// safe to call Kill more than once and at any time.
func (s *Supervisor[T]) Kill() {
	managed.Delete(s)
	s.ended.set(errors.New("Kill or CleanupClients was called"))
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
