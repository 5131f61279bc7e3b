package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/rpc"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// brokerTimeout limits Accept, Dial, and how long a dialled stream waits to
	// be accepted.
	brokerTimeout = 5 * time.Second
	// untilStopped is no limit.
	untilStopped = math.MaxInt64
)

// MuxBroker opens numbered streams between host and plugin. [Plugin].Server and
// [Plugin].Client get the two ends. One side sends a number to the peer in a call, and the
// peer dials it. ServeReader, ServeWriter and ServeRPC return the number of a reader, a
// writer or a service:
//
//	id, stop := broker.ServeRPC(&Callbacks{})
//	defer stop()
//	err := plugin.Call(ctx, client, "Plugin.Work", WorkArgs{Callbacks: id}, &reply)
//
// NextId returns a number for Accept or AcceptAndServe, which also work with go-plugin.
//
// All methods may be called concurrently. A MuxBroker ends with its connection. The zero
// MuxBroker cannot be used.
type MuxBroker struct {
	session *session
	ids     atomic.Uint32

	mu      sync.Mutex // guards meeting
	meeting map[uint32]*meetingPoint
}

// meetingPoint hands the streams that are dialled as one id to those that accept it. It
// exists while there are any of them.
type meetingPoint struct {
	streams chan *stream
	users   int
}

func newMuxBroker(s *session) *MuxBroker {
	return &MuxBroker{session: s, meeting: make(map[uint32]*meetingPoint)}
}

// meet returns the streams of a meetingPoint. leave must be called.
func (b *MuxBroker) meet(id uint32) (streams chan *stream, leave func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := b.meeting[id]
	if m == nil {
		m = &meetingPoint{streams: make(chan *stream)}
		b.meeting[id] = m
	}
	m.users++
	return m.streams, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if m.users--; m.users == 0 {
			delete(b.meeting, id)
		}
	}
}

// NextId returns a number for a stream. Host and plugin return different numbers, also if
// one of them uses go-plugin. Numbers repeat after 1,073,741,823.
func (b *MuxBroker) NextId() uint32 {
	const bits = 1<<30 - 1
	for {
		if n := b.ids.Add(1) & bits; n != 0 {
			if b.session.host {
				return n | 1<<31
			}
			return n | 1<<30
		}
	}
}

// Accept is [MuxBroker.AcceptContext] with a limit of five seconds.
func (b *MuxBroker) Accept(id uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	return b.AcceptContext(ctx, id)
}

// AcceptContext waits until the peer dials id, and returns the stream. The peer may have
// dialled it up to five seconds before. AcceptContext fails when ctx ends, with an error
// that wraps ctx.Err(), and when the connection ends.
func (b *MuxBroker) AcceptContext(ctx context.Context, id uint32) (net.Conn, error) {
	st, err := b.accept(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("plugin: accepting stream %d: %w", id, err)
	}
	return st, nil
}

func (b *MuxBroker) accept(ctx context.Context, id uint32) (*stream, error) {
	streams, leave := b.meet(id)
	defer leave()
	select {
	case st := <-streams:
		// The peer waits for these bytes, but may have no room for them.
		_ = st.SetWriteDeadline(time.Now().Add(brokerTimeout))
		if _, err := st.Write(binary.LittleEndian.AppendUint32(nil, id)); err != nil {
			abort(st)
			return nil, err
		}
		return st, st.SetWriteDeadline(time.Time{})
	case <-ctx.Done():
		return nil, fmt.Errorf("the peer has not dialled it: %w", contextError(ctx))
	case <-b.session.ended():
		return nil, b.session.explain(net.ErrClosed)
	}
}

// Dial is [MuxBroker.DialContext] with a limit of five seconds.
func (b *MuxBroker) Dial(id uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	return b.DialContext(ctx, id)
}

// DialContext opens a stream as id and waits until the peer accepts it. It fails when ctx
// ends, with an error that wraps ctx.Err(), when the connection ends, and when the peer
// has not accepted the stream within five seconds.
func (b *MuxBroker) DialContext(ctx context.Context, id uint32) (net.Conn, error) {
	type result struct {
		st  *stream
		err error
	}
	dialled := make(chan result)
	// While the process of the peer is stopped, writing may block, and ctx does
	// not end that. This goroutine ends with the answer, ctx or the session.
	running := b.session.spawn(func() {
		st, err := b.dial(ctx, id)
		select {
		case dialled <- result{st, err}:
		case <-ctx.Done():
			if err == nil {
				abort(st)
			}
		}
	})
	r := result{err: net.ErrClosed}
	if running {
		select {
		case r = <-dialled:
		case <-ctx.Done():
			r.err = ctx.Err()
		}
	}
	if r.err != nil && ctx.Err() != nil {
		r.err = fmt.Errorf("the peer has not accepted it: %w", contextError(ctx))
	}
	if r.err != nil {
		return nil, fmt.Errorf("plugin: dialling stream %d: %w", id, r.err)
	}
	return r.st, nil
}

func (b *MuxBroker) dial(ctx context.Context, id uint32) (*stream, error) {
	st, err := b.session.open()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { abort(st) })
	var ack [4]byte
	if _, err = st.Write(binary.LittleEndian.AppendUint32(nil, id)); err == nil {
		_, err = io.ReadFull(st, ack[:])
	}
	switch {
	case !stop():
		err = ctx.Err()
	case err == io.EOF:
		err = errors.New("the peer closed it and did not accept it")
	case err == nil && binary.LittleEndian.Uint32(ack[:]) != id:
		err = errors.New("the peer accepted another")
	}
	if err != nil {
		abort(st)
	}
	return st, err
}

// Run receives the streams that the peer dials, until the connection ends. The package
// calls it for every MuxBroker.
func (b *MuxBroker) Run() {
	for {
		st, err := b.session.accept()
		if err != nil {
			return
		}
		// Ends when the stream is accepted, after five seconds, or with the session.
		b.session.spawn(func() { b.receive(st) })
	}
}

// receive reads the id that a stream was dialled as, and waits until it is accepted.
func (b *MuxBroker) receive(st *stream) {
	timeout := time.NewTimer(brokerTimeout)
	defer timeout.Stop()
	_ = st.SetReadDeadline(time.Now().Add(brokerTimeout))
	var id [4]byte
	if _, err := io.ReadFull(st, id[:]); err != nil {
		abort(st)
		return
	}
	_ = st.SetReadDeadline(time.Time{})
	streams, leave := b.meet(binary.LittleEndian.Uint32(id[:]))
	defer leave()
	select {
	case streams <- st:
	case <-timeout.C:
		abort(st)
	case <-b.session.ended():
	}
}

// Close closes the whole connection, with all of its streams. The error is always nil.
func (b *MuxBroker) Close() error {
	b.session.close()
	return nil
}

// AcceptAndServe accepts id and serves the methods of v as "Plugin.Name" until the peer
// closes its client. [Plugin] describes the methods. An error of Accept is logged.
func (b *MuxBroker) AcceptAndServe(id uint32, v any) {
	svc := b.service(v)
	st, err := b.Accept(id)
	if err != nil {
		b.session.logger.Error("a service was not dialled", "error", err)
		return
	}
	b.session.serve(b.session.calls, st.(*stream), svc)
}

// service returns a service for v. If none of its methods can be called, calls return an
// error with the reason.
func (b *MuxBroker) service(v any) *service {
	svc, err := newService(v)
	if err != nil {
		b.session.logger.Error("a service cannot be called", "error", err)
		svc = &service{err: err}
	}
	return svc
}

// ServeRPC serves the methods of v to the peer, which passes id to [MuxBroker.DialRPC]
// within five seconds. [Plugin] describes the methods. If none can be called, that is
// logged, and calls return an error with the reason.
//
// stop ends the contexts of the methods that are running and waits for them to return. So
// a method must not call it. After stop has returned, no method of v is called, and calls
// of the peer fail. It is safe to call stop more than once and at any time. Without stop,
// the service ends when the peer closes its client, or with the connection.
func (b *MuxBroker) ServeRPC(v any) (id uint32, stop func()) {
	svc := b.service(v)
	l := b.serve(svc, &svc.calls, brokerTimeout)
	return l.id, l.stop
}

// loan is a service, reader or writer that is served to the peer.
type loan struct {
	id    uint32
	ctx   context.Context // ends with the loan
	uses  *group          // calls, or Reads or Writes, that are running
	end   func()          // ends the loan without waiting for uses
	reads bool            // it is a reader
}

func (l *loan) stop() {
	l.end()
	l.uses.Wait()
}

// serve serves svc to the peer, which must dial it in time.
func (b *MuxBroker) serve(svc *service, uses *group, timeout time.Duration) *loan {
	id := b.NextId()
	ctx, cancel := context.WithCancelCause(b.session.calls)
	// Ends with the stream or the session, or if the peer does not dial in time.
	b.session.spawn(func() {
		defer cancel(nil)
		dialling, expire := context.WithTimeout(ctx, timeout)
		defer expire()
		if st, err := b.accept(dialling, id); err == nil {
			b.session.serve(ctx, st, svc)
		} else {
			b.session.debug("what is served was not dialled", "stream", id, "error", err)
		}
	})
	return &loan{id: id, ctx: ctx, uses: uses, end: func() {
		svc.calls.close()
		uses.close()
		cancel(errStopped)
	}}
}

// DialRPC returns a client for the service that the peer serves as id with ServeRPC or
// AcceptAndServe. Call its methods as "Plugin.Name", and close it when it is no longer
// needed. The errors are those of [MuxBroker.Dial].
func (b *MuxBroker) DialRPC(id uint32) (*rpc.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	return b.dialRPC(ctx, id)
}

func (b *MuxBroker) dialRPC(ctx context.Context, id uint32) (*rpc.Client, error) {
	conn, err := b.DialContext(ctx, id)
	if err != nil {
		return nil, err
	}
	return newRPCClient(conn, b.session.spawn), nil
}
