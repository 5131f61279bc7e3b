package plugin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"sync"
	"sync/atomic"
	"time"
)

// brokerTimeout is how long Accept and Dial wait for the other side, and how
// long a stream that was dialled waits to be accepted.
const brokerTimeout = 5 * time.Second

// MuxBroker hands out streams between the host and the plugin by number.
// [Plugin].Server and [Plugin].Client are given one each, for the two ends of
// their connection. One side takes a number from NextId, sends it to the other
// in an ordinary call, and accepts the stream that the other side dials:
//
//	id := broker.NextId()
//	go broker.AcceptAndServe(id, &Callbacks{})
//	err := client.Call("Plugin.Work", WorkArgs{Callbacks: id}, &reply)
//
// For what is passed most there are pairs that need no more than the number:
// ServeReader and DialReader, ServeWriter and DialWriter, ServeRPC and DialRPC.
//
// All methods may be called concurrently. A MuxBroker lives as long as its
// connection; the zero MuxBroker is not usable.
type MuxBroker struct {
	session *session
	ids     atomic.Uint32

	mu        sync.Mutex // guards the fields below
	accepting map[uint32]chan result
	parked    map[uint32]*stream // dialled before they were accepted
}

func newMuxBroker(s *session) *MuxBroker {
	return &MuxBroker{session: s, accepting: make(map[uint32]chan result), parked: make(map[uint32]*stream)}
}

// NextId returns a number that names a stream. Numbers made by the host, those
// made by the plugin, and those that go-plugin makes on either side never
// meet; after 1,073,741,823 a side begins again with its first.
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

// patience returns a context for five seconds in which the other side could
// have acted: if it, or this process, has been stopped meanwhile, as by a
// debugger, it gets five more when both go on. It must be cancelled.
func (s *session) patience() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	begin := time.Now()
	timer := time.AfterFunc(brokerTimeout, func() {
		// Ends with the answer and the time, or with the session.
		s.spawn(func() {
			defer cancel(errPatience)
			const stopped = brokerTimeout + time.Second
			if _, err := s.mux.Ping(); err == nil && time.Since(begin) > stopped {
				select {
				case <-time.After(brokerTimeout):
				case <-ctx.Done():
				case <-s.ended():
				}
			}
		})
	})
	return ctx, func() { timer.Stop(); cancel(nil) }
}

// waited is why a wait ended with ctx.
func waited(ctx context.Context) error {
	if context.Cause(ctx) == errPatience {
		return context.DeadlineExceeded
	}
	return contextError(ctx)
}

var errPatience = errors.New("plugin: five seconds are over")

// Accept is [MuxBroker.AcceptContext] with a limit of five seconds, not counting
// time in which either process is stopped.
func (b *MuxBroker) Accept(id uint32) (net.Conn, error) {
	ctx, cancel := b.session.patience()
	defer cancel()
	return b.AcceptContext(ctx, id)
}

// AcceptContext waits until the other side dials id, and returns the stream.
// A stream that was dialled up to five seconds ago is returned at once. It
// fails when ctx ends, with an error that wraps ctx.Err(), when the connection
// ends, and when somebody else is accepting the same id.
func (b *MuxBroker) AcceptContext(ctx context.Context, id uint32) (net.Conn, error) {
	st, err := b.accept(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("plugin: accepting stream %d: %w", id, err)
	}
	return st, nil
}

// result is a stream, or why there is none.
type result struct {
	st  *stream
	err error
}

func (b *MuxBroker) accept(ctx context.Context, id uint32) (*stream, error) {
	notDialled := func() error { return fmt.Errorf("the other side has not dialled it: %w", waited(ctx)) }
	if ctx.Err() != nil {
		return nil, notDialled() // and leave what is there for another
	}
	b.mu.Lock()
	st := b.parked[id]
	delete(b.parked, id)
	if st == nil && b.accepting[id] != nil {
		b.mu.Unlock()
		return nil, errors.New("it is being accepted already")
	}
	dialled := make(chan result, 1)
	if st == nil {
		b.accepting[id] = dialled
	}
	b.mu.Unlock()
	if st != nil {
		b.session.spawn(func() { dialled <- st.acknowledge(id) })
	}

	var err error
	select {
	case r := <-dialled:
		return r.st, r.err
	case <-ctx.Done():
		err = notDialled()
	case <-b.session.ended():
		err = b.session.explain(net.ErrClosed)
	}
	b.mu.Lock()
	waiting := b.accepting[id] == dialled
	if waiting {
		delete(b.accepting, id)
	}
	b.mu.Unlock()
	if !waiting { // it came in the same moment
		b.session.discard(dialled)
	}
	return nil, err
}

// discard ends a stream that comes too late.
func (s *session) discard(late chan result) {
	s.spawn(func() {
		if r := <-late; r.err == nil {
			abort(r.st)
		}
	})
}

// acknowledge tells the side that dialled that its stream has been accepted.
// Writing may block for as long as the other process is stopped, so this is
// for the session's goroutines.
func (st *stream) acknowledge(id uint32) result {
	// Whoever dials leaves room for this. Nobody waits for one who does not.
	_ = st.SetWriteDeadline(time.Unix(1, 0))
	if _, err := st.Write(binary.LittleEndian.AppendUint32(nil, id)); err != nil {
		abort(st)
		return result{err: err}
	}
	_ = st.SetWriteDeadline(time.Time{})
	return result{st: st}
}

// Dial is [MuxBroker.DialContext] with the limit that Accept has.
func (b *MuxBroker) Dial(id uint32) (net.Conn, error) {
	ctx, cancel := b.session.patience()
	defer cancel()
	return b.DialContext(ctx, id)
}

// DialContext opens a stream to the side that accepts id, and waits until it
// does. It fails when ctx ends, with an error that wraps ctx.Err(), when the
// connection ends, and when the other side closes the stream without having
// accepted it, as it does after five seconds.
func (b *MuxBroker) DialContext(ctx context.Context, id uint32) (net.Conn, error) {
	st, err := b.dial(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("plugin: dialling stream %d: %w", id, err)
	}
	return st, nil
}

// dial opens the stream in a goroutine of the session's, because writing may
// block for as long as the other process is stopped, and yamux's OpenStream for
// as long as 256 others are unanswered.
func (b *MuxBroker) dial(ctx context.Context, id uint32) (*stream, error) {
	notAccepted := func() error { return fmt.Errorf("the other side has not accepted it: %w", waited(ctx)) }
	opened := make(chan result, 1)
	if !b.session.spawn(func() { opened <- b.open(id) }) {
		return nil, net.ErrClosed
	}
	var st *stream
	select {
	case r := <-opened:
		if r.err != nil {
			return nil, r.err
		}
		st = r.st
	case <-ctx.Done():
		b.session.discard(opened)
		return nil, notAccepted()
	}

	stop := context.AfterFunc(ctx, func() { abort(st) })
	var ack [4]byte
	_, err := io.ReadFull(st, ack[:])
	switch got := binary.LittleEndian.Uint32(ack[:]); {
	case !stop():
		err = notAccepted()
	case err == io.EOF:
		err = errors.New("the other side closed it and did not accept it")
	case err == nil && got != id:
		err = fmt.Errorf("the other side accepted %d", got)
	}
	if err != nil {
		abort(st)
		return nil, err
	}
	return st, nil
}

// open opens a stream and says what it is dialled as.
func (b *MuxBroker) open(id uint32) result {
	st, err := b.session.open()
	if err != nil {
		return result{err: err}
	}
	if _, err := st.Write(binary.LittleEndian.AppendUint32(nil, id)); err != nil {
		abort(st)
		return result{err: err}
	}
	return result{st: st}
}

// Run takes in the streams that the other side dials, until the connection
// ends. The package runs it for every broker that it hands out.
func (b *MuxBroker) Run() {
	for {
		st, err := b.session.accept()
		if err != nil {
			break
		}
		// Ends with the id, its time-out or the session, which waits for it.
		b.session.spawn(func() { b.receive(st) })
	}
	<-b.session.ended() // accepting may fail a moment earlier
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.parked)
}

// receive reads what a stream was dialled as and gives it to who accepts that.
func (b *MuxBroker) receive(st *stream) {
	var id [4]byte
	_ = st.SetReadDeadline(time.Now().Add(brokerTimeout))
	if _, err := io.ReadFull(st, id[:]); err != nil {
		abort(st)
		return
	}
	_ = st.SetReadDeadline(time.Time{})
	b.deliver(binary.LittleEndian.Uint32(id[:]), st)
}

// deliver gives a stream to who accepts id, or keeps it for a while. It ends
// the stream if there is one with that id already.
func (b *MuxBroker) deliver(id uint32, st *stream) {
	b.mu.Lock()
	dialled := b.accepting[id]
	free := b.parked[id] == nil && !st.over()
	switch {
	case dialled != nil:
		delete(b.accepting, id)
	case free:
		b.parked[id] = st
	}
	b.mu.Unlock()
	switch {
	case dialled != nil:
		dialled <- st.acknowledge(id) // has room
	case free:
		// yamux has an end of streams that nobody knows of here.
		b.session.frames.announce(st)
		time.AfterFunc(brokerTimeout, func() { b.expire(id, st) })
	default:
		abort(st)
	}
}

// expire ends a stream that nobody has accepted.
func (b *MuxBroker) expire(id uint32, st *stream) {
	b.mu.Lock()
	late := b.parked[id] == st
	if late {
		delete(b.parked, id)
	}
	b.mu.Unlock()
	if late {
		abort(st)
	}
}

// Close ends the whole connection: every stream on it, and every wait.
func (b *MuxBroker) Close() error {
	b.session.close()
	return nil
}

// AcceptAndServe accepts id, as Accept does, and serves the methods of v under
// the name "Plugin" until the other side hangs up. The package documentation
// says which methods can be called. An error while accepting is logged.
func (b *MuxBroker) AcceptAndServe(id uint32, v any) {
	services := b.services(v)
	st, err := b.Accept(id)
	if err != nil {
		b.session.logger.Error("a service was not dialled", "error", err)
		return
	}
	b.session.serve(st.(*stream), services)
}

// services returns v as the service "Plugin". If none of its methods can be
// called, every caller will be told why.
func (b *MuxBroker) services(v any) map[string]*service {
	svc, err := newService(v)
	if err != nil {
		b.session.logger.Error("a service cannot be called", "error", err)
		svc = &service{err: err}
	}
	return map[string]*service{"Plugin": svc}
}

// ServeRPC serves the methods of v to the other side, which gets a client for
// them from DialRPC with the number that is returned, within five seconds. If v
// has no method that can be called, that is logged and every caller is told.
func (b *MuxBroker) ServeRPC(v any) uint32 {
	services := b.services(v)
	return b.whenDialled("service", func(st *stream) { b.session.serve(st, services) })
}

// DialRPC returns a client for what the other side serves as id, be it with
// ServeRPC or with AcceptAndServe. Methods are called as "Plugin.Name".
// Closing the client ends the serving; it should be closed. The error is that
// of Dial.
func (b *MuxBroker) DialRPC(id uint32) (*rpc.Client, error) {
	conn, err := b.Dial(id)
	if err != nil {
		return nil, err
	}
	return newRPCClient(conn, b.session.spawn, &b.session.responses), nil
}

// whenDialled returns a number, and runs f with the stream once it is dialled.
func (b *MuxBroker) whenDialled(what string, f func(*stream)) uint32 {
	id := b.NextId()
	b.session.spawn(func() {
		ctx, cancel := b.session.patience()
		defer cancel()
		st, err := b.accept(ctx, id)
		if err != nil {
			b.session.logger.Debug("a "+what+" was not dialled", "stream", id, "error", err)
			return
		}
		// Runs the caller's own code, so nothing waits for it. It ends with
		// the stream, or when that code returns.
		go f(st)
	})
	return id
}
