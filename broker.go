package plugin

import (
	"context"
	"encoding/binary"
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
	// maxWaiting is how many dialled streams may wait to be accepted. After that, yamux
	// keeps maxOpening more, and refuses others.
	maxWaiting = 256
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
// A connection has at most 65,536 streams at a time, and each side can open 2^31 in its
// life.
//
// All methods may be called concurrently. A MuxBroker ends with its connection. The zero
// MuxBroker cannot be used.
type MuxBroker struct {
	session *session
	ids     atomic.Uint64
	waiting chan struct{} // holds one for each dialled stream that has not been accepted

	// expected maps each id that the peer will dial, a new number of this side, to a
	// func(*stream) that gets the stream, in a goroutine of the session. The stream has not
	// been acknowledged then.
	expected sync.Map

	mu         sync.Mutex // guards the fields below, and the users of each rendezvous
	rendezvous map[uint32]*rendezvous

	copyBuffers sync.Pool // of *copyBuffer; most streams are short
}

// copyBuffer is what bytes are copied with.
type copyBuffer [64 << 10]byte

func newMuxBroker(s *session) *MuxBroker {
	return &MuxBroker{
		session:     s,
		waiting:     make(chan struct{}, maxWaiting),
		rendezvous:  make(map[uint32]*rendezvous),
		copyBuffers: sync.Pool{New: func() any { return new(copyBuffer) }},
	}
}

// NextId returns a number for a stream. Host and plugin return different numbers, even if
// one of them uses go-plugin. Numbers repeat after 1,073,741,823.
func (b *MuxBroker) NextId() uint32 {
	n := uint32(b.ids.Add(1)%(1<<30-1)) + 1
	if b.session.host {
		return n | 1<<31
	}
	return n | 1<<30
}

// Accept is [MuxBroker.AcceptContext] with a limit of five seconds.
func (b *MuxBroker) Accept(id uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	return b.AcceptContext(ctx, id)
}

// AcceptContext waits until the peer dials id, and returns the stream. The peer may have
// dialled it up to five seconds before; what it has given up since is not returned.
// AcceptContext fails when ctx ends, with an error that wraps ctx.Err(), and when the
// connection ends.
//
// A write deadline does not interrupt a Write that is blocked in the system, as when the
// plugin is stopped. The end of the connection does. When the peer has closed the stream, a
// Write that finds no more room waits for its deadline or the end of the connection.
func (b *MuxBroker) AcceptContext(ctx context.Context, id uint32) (net.Conn, error) {
	meeting := b.join(id)
	defer b.leave(id, meeting)
	for {
		select {
		case st := <-meeting.streams:
			if isClosed(st.flow.gone) {
				_ = st.Close() // the peer has given up
				continue
			}
			if err := sendID(st, id); err != nil {
				abort(st)
				return nil, fmt.Errorf("plugin: accepting stream %d: %w", id, err)
			}
			return st, nil
		case <-ctx.Done():
			return nil, fmt.Errorf("plugin: accepting stream %d: the peer has not dialled it: %w",
				id, contextError(ctx))
		case <-b.session.ended():
			return nil, b.session.explain(net.ErrClosed)
		}
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
// has not accepted the stream within five seconds. The peer measures these, and a process
// that is stopped never ends them: use a ctx with a deadline.
func (b *MuxBroker) DialContext(ctx context.Context, id uint32) (net.Conn, error) {
	st, err := b.dial(ctx, id)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { abort(st) })
	err = st.waitAcknowledged()
	if !stop() {
		err = notAccepted(ctx, id)
	}
	if err != nil {
		abort(st)
		return nil, err
	}
	return st.stream, nil
}

// notAccepted is the error of a stream that was dialled, and whose context has ended.
func notAccepted(ctx context.Context, id uint32) error {
	return fmt.Errorf("plugin: dialling stream %d: the peer has not accepted it: %w", id, contextError(ctx))
}

// dial opens a stream as id. It does not wait for the acknowledgement, which would be a
// round trip.
func (b *MuxBroker) dial(ctx context.Context, id uint32) (*dialledConn, error) {
	st, err := b.session.open(ctx)
	if err == nil {
		err = sendID(st, id) // fails if st has ended
	}
	if err != nil {
		return nil, fmt.Errorf("plugin: dialling stream %d: %w", id, err)
	}
	return &dialledConn{stream: st, id: id}, nil
}

// dialledConn is a stream whose first Read checks the acknowledgement. One goroutine reads.
type dialledConn struct {
	*stream
	id           uint32
	acknowledged bool
}

func (st *dialledConn) Read(p []byte) (int, error) {
	if err := st.waitAcknowledged(); err != nil {
		return 0, err
	}
	return st.stream.Read(p)
}

// waitAcknowledged reads the acknowledgement, if it has not been read. If the connection
// was lost, its error says why, and not that a stream was dialled.
func (st *dialledConn) waitAcknowledged() error {
	if st.acknowledged {
		return nil
	}
	accepted, err := readID(st.stream)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("plugin: dialling stream %d: the peer closed it and did not accept it", st.id)
	}
	if err == nil && accepted != st.id {
		return fmt.Errorf("plugin: dialling stream %d: the peer accepted another", st.id)
	}
	st.acknowledged = err == nil
	return err
}

// AcceptAndServe accepts id and serves the methods of v as "Plugin.Name" until the peer
// closes its client. [Plugin] describes the methods. An error of Accept is logged.
func (b *MuxBroker) AcceptAndServe(id uint32, v any) {
	svc := b.service(v)
	conn, err := b.Accept(id)
	if err != nil {
		b.session.logger.Error("a service was not dialled", "error", err)
		return
	}
	b.session.answerCalls(b.session.methodsCtx, conn, svc)
}

// ServeRPC serves the methods of v to the peer, which passes id to [MuxBroker.DialRPC]
// within five seconds. [Plugin] describes the methods. If none can be called, that is
// logged, and calls return an error with the reason.
//
// stop ends the contexts of the methods that are running and waits for them to return,
// without a limit. So a method must not call it. After stop has returned, no method of v is
// called, and calls of the peer fail. It is safe to call stop more than once and at any
// time. Without stop, the service ends when the peer closes its client, or with the
// connection.
func (b *MuxBroker) ServeRPC(v any) (id uint32, stop func()) {
	svc := b.service(v)
	offer := b.offer(svc, &svc.calls, brokerTimeout)
	return offer.id, offer.stop
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

// DialRPC returns a client for the service that the peer serves as id with ServeRPC or
// AcceptAndServe. Call its methods as "Plugin.Name", and close it when it is no longer
// needed. The errors are those of [MuxBroker.Dial].
func (b *MuxBroker) DialRPC(id uint32) (*rpc.Client, error) {
	conn, err := b.Dial(id)
	if err != nil {
		return nil, err
	}
	return b.session.client(conn), nil
}

// Close closes the whole connection, with all of its streams. A host that calls it takes a
// later end of the plugin for one that it asked for. The error is always nil.
func (b *MuxBroker) Close() error {
	b.session.close()
	return nil
}

// Run receives the streams that the peer dials, until the connection ends. The package
// calls it for every MuxBroker.
func (b *MuxBroker) Run() {
	for {
		select {
		case b.waiting <- struct{}{}:
		case <-b.session.ended():
			return
		}
		st, err := b.session.accept()
		if err != nil {
			return
		}
		// Ends when the stream is accepted and, if it was expected, not needed any more;
		// when the peer has closed what was refused; or with the session.
		b.session.spawn(func() { b.receive(st) })
	}
}

// receive reads the id that a stream was dialled as, and hands the stream to what expects
// it, or to Accept.
func (b *MuxBroker) receive(st *stream) {
	_ = st.SetReadDeadline(time.Now().Add(brokerTimeout))
	id, err := readID(st)
	_ = st.SetReadDeadline(time.Time{})
	if err != nil {
		refuse(st)
		<-b.waiting // holds one for st
		return
	}
	handle, isExpected := b.expected.LoadAndDelete(id)
	if !isExpected {
		b.handOver(st, id)
	}
	<-b.waiting // holds one for st
	if isExpected {
		handle.(func(*stream))(st)
	}
}

// handOver waits until a stream that was dialled as id is accepted, or refuses it.
func (b *MuxBroker) handOver(st *stream, id uint32) {
	meeting := b.join(id)
	defer b.leave(id, meeting)
	select {
	case meeting.streams <- st:
		return
	case <-time.After(brokerTimeout):
	case <-st.flow.gone: // the peer has given up
	case <-b.session.ended():
	}
	refuse(st)
}

// refuse closes a stream and waits until the peer has closed it, too. What arrives
// meanwhile is dropped, because yamux would keep it.
func refuse(st *stream) {
	_ = st.Close()
	_, _ = io.Copy(io.Discard, st)
}

// sendID sends the number of a stream to the peer: that as which it is dialled, or the
// acknowledgement that it has been accepted. It waits for nothing.
func sendID(st *stream, id uint32) error {
	return st.queue(binary.LittleEndian.AppendUint32(nil, id))
}

func readID(st *stream) (uint32, error) {
	var id [4]byte
	_, err := io.ReadFull(st, id[:])
	return binary.LittleEndian.Uint32(id[:]), err
}

// rendezvous hands the streams that the peer dials as one id to those that accept it. It
// exists while it has users, which are either.
type rendezvous struct {
	streams chan *stream
	users   int
}

// join returns the rendezvous of an id. leave must be called.
func (b *MuxBroker) join(id uint32) *rendezvous {
	b.mu.Lock()
	defer b.mu.Unlock()
	meeting := b.rendezvous[id]
	if meeting == nil {
		meeting = &rendezvous{streams: make(chan *stream)}
		b.rendezvous[id] = meeting
	}
	meeting.users++
	return meeting
}

func (b *MuxBroker) leave(id uint32, meeting *rendezvous) {
	b.mu.Lock()
	defer b.mu.Unlock()
	meeting.users--
	if meeting.users == 0 {
		delete(b.rendezvous, id)
	}
}

// What is served to the peer is offered as a new number, which only the peer is told. So the
// peer dials it once, and need not wait until that is acknowledged: it uses the stream at
// once. The acknowledgement is sent as for any other number.

// offer is a service, reader or writer that the peer may dial and use.
type offer struct {
	broker  *MuxBroker
	id      uint32
	ctx     context.Context // ends with the offer
	cancel  context.CancelCauseFunc
	service *service
	uses    *group      // the calls of a service, or the Reads or Writes of a stream, that are running
	reads   bool        // it is a reader
	expiry  *time.Timer // of an offer with a limit
}

// offer offers svc to the peer, which must dial it in time.
func (b *MuxBroker) offer(svc *service, uses *group, timeout time.Duration) *offer {
	o := &offer{broker: b, id: b.NextId(), service: svc, uses: uses}
	o.ctx, o.cancel = context.WithCancelCause(b.session.methodsCtx)
	o.expiry = time.AfterFunc(timeout, o.end)
	if timeout == untilStopped {
		o.expiry.Stop() // a timer would keep o in memory
	}
	b.expected.Store(o.id, o.serve)
	return o
}

// serve answers the calls of the peer. If the offer has ended, these fail.
func (o *offer) serve(st *stream) {
	defer o.cancel(nil)
	o.expiry.Stop()
	_ = sendID(st, o.id) // fails if st has ended, as its use will
	o.broker.session.answerCalls(o.ctx, st, o.service)
}

// end ends the offer without waiting for uses. None begins any more.
func (o *offer) end() {
	o.broker.expected.Delete(o.id)
	o.service.calls.close()
	o.uses.close()
	o.expiry.Stop()
	o.cancel(errStopped)
}

// stop ends the offer and waits for its uses.
func (o *offer) stop() {
	o.end()
	o.uses.Wait()
}

// dialService returns a client for a service that the peer offers as id.
func (b *MuxBroker) dialService(ctx context.Context, id uint32) (*rpc.Client, error) {
	conn, err := b.dial(ctx, id)
	if err != nil {
		return nil, err
	}
	return b.session.client(conn), nil
}
