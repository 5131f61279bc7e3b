package plugin

import (
	"cmp"
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

	mu      sync.Mutex // guards meeting
	meeting map[uint32]*meetingPoint
}

// meetingPoint is where the streams that are dialled as one id meet those who
// accept it. There is one as long as either is there.
type meetingPoint struct {
	streams chan *stream
	users   int
}

func newMuxBroker(s *session) *MuxBroker {
	return &MuxBroker{session: s, meeting: make(map[uint32]*meetingPoint)}
}

// meet returns the meeting point of an id. leave must be called.
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

// Accept is [MuxBroker.AcceptContext] with a limit of five seconds.
func (b *MuxBroker) Accept(id uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	return b.AcceptContext(ctx, id)
}

// AcceptContext waits until the peer dials id, and returns the stream. A stream
// that was dialled up to five seconds ago is returned at once. It fails when
// ctx ends, with an error that wraps ctx.Err(), and when the connection ends.
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
		// The peer waits for these bytes, but may leave no room for them.
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

// DialContext opens a stream to the peer and waits until the peer accepts id.
// It fails when ctx ends, with an error that wraps ctx.Err(), when the
// connection ends, and when the peer closes the stream without having accepted
// it, as it does after five seconds.
func (b *MuxBroker) DialContext(ctx context.Context, id uint32) (net.Conn, error) {
	type result struct {
		st  *stream
		err error
	}
	dialled := make(chan result)
	// Writing may block while the peer is stopped, whatever becomes of ctx.
	// This ends with the answer of the peer, with ctx, or with the session.
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

// Run takes in the streams that the peer dials, until the connection ends. The
// package runs it for every broker that it hands out.
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

// receive reads what a stream was dialled as and offers it to who accepts that.
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

// Close ends the whole connection: every stream on it, and every wait.
func (b *MuxBroker) Close() error {
	b.session.close()
	return nil
}

// AcceptAndServe accepts id, as Accept does, and serves the methods of v under
// the name "Plugin" until the peer hangs up. The package documentation says
// which methods can be called. An error while accepting is logged.
func (b *MuxBroker) AcceptAndServe(id uint32, v any) {
	svc := b.service(v)
	st, err := b.Accept(id)
	if err != nil {
		b.session.logger.Error("a service was not dialled", "error", err)
		return
	}
	b.session.serve(b.session.calls, st.(*stream), svc)
}

// service returns v as a service. If none of its methods can be called, every
// caller will be told why.
func (b *MuxBroker) service(v any) *service {
	svc, err := newService(v)
	if err != nil {
		b.session.logger.Error("a service cannot be called", "error", err)
		svc = &service{err: err}
	}
	return svc
}

// ServeRPC serves the methods of v to the peer, which gets a client for them
// from DialRPC with the id, within five seconds. If v has no method that can be
// called, that is logged and every caller is told.
//
// stop ends the serving. It ends the contexts of methods that run and waits for
// them to return, so a method must not call it. After stop has returned, no
// method of v runs or is called, and the peer's calls fail with an error that
// says so. stop may be called at any time and more than once. Without it, the
// serving ends when the peer closes its client, or with the connection.
func (b *MuxBroker) ServeRPC(v any) (id uint32, stop func()) {
	svc := b.service(v)
	return b.serve(svc, &svc.calls)
}

// serve serves svc to the peer. stop waits for the uses of what it serves.
func (b *MuxBroker) serve(svc *service, uses *group) (id uint32, stop func()) {
	id = b.NextId()
	ctx, cancel := context.WithCancelCause(b.session.calls)
	b.session.spawn(func() {
		dialling, expire := context.WithTimeout(ctx, brokerTimeout)
		defer expire()
		st, err := b.accept(dialling, id)
		if err != nil {
			b.session.debug("what is served was not dialled", "stream", id, "error", err)
			cancel(nil)
			return
		}
		// Runs the caller's own code, so nothing waits for it but stop. It ends
		// with the stream, or when that code returns.
		go func() {
			defer cancel(nil)
			b.session.serve(ctx, st, svc)
		}()
	})
	return id, func() {
		svc.calls.close()
		uses.close()
		cancel(errStopped)
		uses.Wait()
	}
}

// DialRPC returns a client for what the peer serves as id with ServeRPC or
// AcceptAndServe. Methods are called as "Plugin.Name". Closing the client ends
// the serving; it should be closed. The error is that of Dial.
func (b *MuxBroker) DialRPC(id uint32) (*rpc.Client, error) {
	conn, err := b.Dial(id)
	if err != nil {
		return nil, err
	}
	return newRPCClient(conn, b.session.spawn), nil
}

// Readers and writers are RPC services. Their bytes flow on a stream of their
// own, and one call lasts as long as they flow: its error is how they ended.

// ServeReader lets the peer read from r with DialReader, within five seconds.
// r is read as the peer reads, until it ends or fails, or the peer closes its
// reader. r is not closed.
//
// stop ends that, as the stop of ServeRPC does. It waits for a Read of r that
// is under way, so end a Read that may block for long first. After stop has
// returned, r is not read any more, and the peer's Read fails with an error that
// says so: it does not return io.EOF unless r did.
func (b *MuxBroker) ServeReader(r io.Reader) (id uint32, stop func()) {
	l := &lent{broker: b, use: r.Read}
	return b.serve(b.service(readerService{l}), &l.uses)
}

// DialReader returns a reader for what the peer serves with ServeReader. It
// reads the same bytes and then fails as that reader failed, with an error that
// keeps its identity as those of [Call] do. It must be closed. Read and Close
// may be called concurrently. The error is that of Dial, or says that id is not
// a reader.
func (b *MuxBroker) DialReader(id uint32) (io.ReadCloser, error) {
	p, err := b.dialPipe(id, "Plugin.Read")
	if err != nil {
		return nil, err
	}
	return pipeReader{p}, nil
}

// ServeWriter lets the peer write to w with DialWriter, within five seconds. If
// w fails, the peer is told. w is not closed. stop ends that, as the stop of
// ServeReader does: after it has returned, w is not written to any more.
func (b *MuxBroker) ServeWriter(w io.Writer) (id uint32, stop func()) {
	l := &lent{broker: b, use: w.Write}
	return b.serve(b.service(writerService{l}), &l.uses)
}

// DialWriter returns a writer for what the peer serves with ServeWriter. An
// error of that writer is returned by a later Write, or by Close, and keeps its
// identity as those of [Call] do. Close waits until that writer has taken
// everything; it must be called. Write and Close may be called concurrently.
// The error is that of Dial, or says that id is not a writer.
func (b *MuxBroker) DialWriter(id uint32) (io.WriteCloser, error) {
	p, err := b.dialPipe(id, "Plugin.Write")
	if err != nil {
		return nil, err
	}
	// Ends a Write that waits for room when the call has ended.
	b.session.spawn(func() { <-p.done; abort(p.conn) })
	return pipeWriter{p}, nil
}

// lent is a reader or writer of the caller's. Waiting for its uses does not wait
// for the stream, whose peer may take nothing.
type lent struct {
	broker *MuxBroker
	use    func([]byte) (int, error) // Read or Write
	uses   group                     // closed when it is taken back
}

func (l *lent) Read(p []byte) (int, error) {
	if !l.uses.enter() {
		return 0, errStopped
	}
	defer l.uses.Done()
	return l.use(p)
}

func (l *lent) Write(p []byte) (int, error) { return l.Read(p) }

// copy copies l to or from the stream id, until ctx ends.
func (l *lent) copy(ctx context.Context, id uint32, toPeer bool) (err error) {
	conn, err := l.broker.DialContext(ctx, id)
	if err != nil {
		return err
	}
	defer recoverTo(&err)
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { abort(conn) })()
	var w io.Writer = conn
	var r io.Reader = l
	if !toPeer {
		w, r = l, conn
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	return err
}

type readerService struct{ l *lent }

// Read copies the reader to the stream id.
func (s readerService) Read(ctx context.Context, id uint32, _ *struct{}) error {
	return s.l.copy(ctx, id, true)
}

type writerService struct{ l *lent }

// Write copies the stream id to the writer.
func (s writerService) Write(ctx context.Context, id uint32, _ *struct{}) error {
	return s.l.copy(ctx, id, false)
}

// pipe is the end of a reader or writer that was dialled.
type pipe struct {
	conn   net.Conn
	client *rpc.Client
	done   chan struct{} // closed when the call has ended
	err    error         // its error
	closed atomic.Bool
}

func (b *MuxBroker) dialPipe(id uint32, method string) (*pipe, error) {
	client, err := b.DialRPC(id)
	if err != nil {
		return nil, err
	}
	p := &pipe{client: client, done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	data := b.NextId()
	// Ends with the bytes, or when the client or the connection is closed.
	go func() {
		p.err = Call(context.Background(), client, method, data, nil)
		close(p.done)
		cancel()
	}()
	if p.conn, err = b.AcceptContext(ctx, data); err != nil {
		if isClosed(p.done) {
			err = cmp.Or(p.err, errors.New("plugin: the peer does not serve a reader or writer"))
		}
		_ = client.Close()
		return nil, err
	}
	return p, nil
}

// ended waits for the end of the call and returns its error, or else err.
func (p *pipe) ended(err error) error {
	if p.closed.Load() {
		return io.ErrClosedPipe
	}
	<-p.done
	return cmp.Or(p.err, err)
}

type pipeReader struct{ *pipe }

func (p pipeReader) Read(b []byte) (int, error) {
	if p.closed.Load() {
		return 0, io.ErrClosedPipe
	}
	n, err := p.conn.Read(b)
	if err != nil {
		err = p.ended(err)
	}
	return n, err
}

func (p pipeReader) Close() error {
	p.closed.Store(true)
	abort(p.conn)
	_ = p.client.Close()
	return nil
}

type pipeWriter struct{ *pipe }

func (p pipeWriter) Write(b []byte) (int, error) {
	n, err := p.conn.Write(b)
	if err != nil {
		err = p.ended(err)
	}
	return n, err
}

func (p pipeWriter) Close() error {
	_ = p.conn.Close()
	<-p.done
	p.closed.Store(true)
	_ = p.client.Close()
	return p.err
}
