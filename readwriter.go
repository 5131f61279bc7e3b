package plugin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/rpc"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// One side serves a reader or writer, and its peer uses it. It is served as a service, which
// the user dials. The method Read or Write takes the number of a second stream, which the
// user expects and the server dials: the bytes go there. The method returns when they have
// been copied, and its error is that of the reader or writer, which so keeps its identity.
// The method Close closes a reader or writer that was handed over with a function to close
// it, as the results of Invoke are.
//
// A copy from a reader ends when the reader fails or ends. Then the server closes the stream
// of the bytes and answers the call. The user reads up to the end of the stream, and then
// has the error of the answer. If it does not want more, it closes its client, which ends
// the context of the call and so the copy.
//
// A copy to a writer ends when the user has closed the stream of the bytes, or the writer
// fails. The user waits for the answer, so everything has been written when its Close
// returns.
//
// In both cases, the user then calls Close, if what it uses was handed over to it, and at
// last closes its client. That ends the service, and what was handed over is closed if it
// has not been.

// useTimeout is how long a Read or Write that is running delays the Close of its reader or
// writer. A Read that is running delays the end of Invoke as long.
const useTimeout = 100 * time.Millisecond

// ServeReader lets the peer read from r. The peer passes id to [MuxBroker.DialReader]
// within five seconds. r is read until it fails, or the peer closes its end. r is read
// ahead, and not closed.
//
// stop works like that of [MuxBroker.ServeRPC]. It waits for a Read that is running, without
// a limit, so first unblock one that may take long. After stop has returned, r is
// not read, and Read fails in the peer. It does not return io.EOF unless r did.
func (b *MuxBroker) ServeReader(r io.Reader) (id uint32, stop func()) {
	offer := b.offerReader(r, brokerTimeout, nil)
	return offer.id, offer.stop
}

// DialReader returns a reader for the one that the peer serves as id with ServeReader.
// Close it when it is no longer needed. Errors of that reader keep their identity, like
// those of [Call]. Read and Close may be called concurrently. The errors are those of
// [MuxBroker.Dial], and one if id is not a reader.
func (b *MuxBroker) DialReader(id uint32) (io.ReadCloser, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	return b.dialReader(ctx, id, false)
}

// ServeWriter lets the peer write to w. The peer passes id to [MuxBroker.DialWriter]
// within five seconds. w is not closed. stop works like that of
// [MuxBroker.ServeReader], and waits for a Write that is running. After stop has returned,
// w is not written to.
func (b *MuxBroker) ServeWriter(w io.Writer) (id uint32, stop func()) {
	offer := b.offerWriter(w, brokerTimeout, nil)
	return offer.id, offer.stop
}

// DialWriter returns a writer for the one that the peer serves as id with ServeWriter.
// Close must be called. It waits until everything has been written. An error of that writer
// is returned by a later Write or by Close, and keeps its identity, like those of [Call].
// Write and Close may be called concurrently. The errors are those of [MuxBroker.Dial], and
// one if id is not a writer.
func (b *MuxBroker) DialWriter(id uint32) (io.WriteCloser, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	w, err := b.dialWriter(ctx, id, false)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// offerReader offers r to the peer. If closer is not nil, it is called once, when the
// peer closes its end or the offer ends.
func (b *MuxBroker) offerReader(r io.Reader, timeout time.Duration, closer func() error) *offer {
	s := &servedStream{broker: b}
	s.copy = func(_ context.Context, conn io.ReadWriter) error {
		return b.copyBytes(conn, s.use(r.Read))
	}
	return s.offer("Read", timeout, closer)
}

// offerWriter offers w to the peer, like offerReader.
func (b *MuxBroker) offerWriter(w io.Writer, timeout time.Duration, closer func() error) *offer {
	s := &servedStream{broker: b}
	s.copy = func(_ context.Context, conn io.ReadWriter) error {
		return b.copyBytes(s.use(w.Write), conn)
	}
	return s.offer("Write", timeout, closer)
}

// servedStream is a reader or writer of this side that the peer uses. Its uses are the
// Reads or Writes that are running, and not the copying, because that may wait for the
// peer.
type servedStream struct {
	broker *MuxBroker
	// copy copies all to or from conn, which is aborted when the call ends. That ends the
	// copying of a reader or writer. A sequence may be elsewhere: it needs ctx, which ends
	// with the call, too.
	copy  func(ctx context.Context, conn io.ReadWriter) error
	begun atomic.Bool // copyFor has been called
	uses  group       // closed when the offer ends
}

// offer offers s to the peer, which lets it copy with the method of that name.
func (s *servedStream) offer(name string, timeout time.Duration, closer func() error) *offer {
	closed := sync.OnceValue(func() error { return s.close(closer) })
	callClose := func(_ context.Context, _, _ reflect.Value) error { return closed() }
	svc := &service{methods: map[string]*method{
		name:    {call: s.copyFor, context: true, arg: reflect.TypeFor[uint32](), reply: typeOfNothing},
		"Close": {call: callClose, arg: typeOfNothing, reply: typeOfNothing},
	}}
	o := s.broker.offer(svc, &s.uses, timeout)
	o.reads = name == "Read"
	if closer != nil {
		context.AfterFunc(o.ctx, func() { _ = closed() }) // nobody is left to be told
	}
	return o
}

// close calls closer, if it is not nil, when no use is running or a running one has had
// its time.
func (s *servedStream) close(closer func() error) (err error) {
	if closer == nil {
		return nil
	}
	defer recoverTo(&err)
	s.uses.close()
	waitFor(useTimeout, s.uses.allDone())
	return closer()
}

// copyFor copies to or from the stream that the peer expects as id, until ctx, the context
// of the call, ends.
func (s *servedStream) copyFor(ctx context.Context, id, _ reflect.Value) error {
	if s.begun.Swap(true) {
		return errors.New("plugin: the peer uses the stream twice")
	}
	conn, err := s.broker.dial(ctx, uint32(id.Uint()))
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { abort(conn) })
	defer stop()
	err = s.copy(ctx, conn)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return contextError(ctx) // that conn has been aborted says less
	}
	// Wait until the user has conn, which it acknowledges at the end of dialStream. An answer
	// before that would be a refusal there, and the bytes before err would be lost.
	_ = conn.waitAcknowledged() // err is what matters
	return err
}

// copyBytes copies all of src to dst. Neither has a ReadFrom or WriteTo, so all bytes go
// through Read and Write. A panic of theirs is an error.
func (b *MuxBroker) copyBytes(dst io.Writer, src io.Reader) (err error) {
	defer recoverTo(&err)
	buf := b.copyBuffers.Get().(*copyBuffer)
	defer b.copyBuffers.Put(buf)
	_, err = io.CopyBuffer(dst, src, buf[:])
	return err
}

// use returns call, the Read or Write of the caller's, as a use. It fails when the offer
// has ended.
func (s *servedStream) use(call func([]byte) (int, error)) readWrite {
	return func(p []byte) (int, error) {
		if !s.uses.enter() {
			return 0, errStopped
		}
		defer s.uses.Done()
		return call(p)
	}
}

// readWrite is a function that is a reader and a writer.
type readWrite func(p []byte) (int, error)

func (f readWrite) Read(p []byte) (int, error)  { return f(p) }
func (f readWrite) Write(p []byte) (int, error) { return f(p) }

// dialledStream is a reader or writer of the peer.
type dialledStream struct {
	client *rpc.Client
	conn   *stream       // the bytes
	owned  bool          // Close closes the reader or writer of the peer
	copied chan struct{} // closed when the peer has copied, or cannot any more
	err    error         // the error of that; may be read when copied is closed
	closed atomic.Bool   // Read and Write fail: set by Close, of a writer when all is written
}

// dialReader dials the reader that the peer serves as id. If owned, its Close closes that
// reader.
func (b *MuxBroker) dialReader(ctx context.Context, id uint32, owned bool) (io.ReadCloser, error) {
	s, err := b.dialStream(ctx, id, "Read", owned)
	if err != nil {
		return nil, err
	}
	return &dialledReader{dialledStream: s}, nil
}

// dialWriter dials the writer that the peer serves as id, like dialReader.
func (b *MuxBroker) dialWriter(ctx context.Context, id uint32, owned bool) (*dialledWriter, error) {
	s, err := b.dialStream(ctx, id, "Write", owned)
	if err != nil {
		return nil, err
	}
	// When the peer has copied, it reads no more. This ends a Write that would wait for it.
	// The goroutine ends with the copying, at the latest when the session ends.
	b.session.spawn(func() {
		<-s.copied
		abort(s.conn)
	})
	return &dialledWriter{dialledStream: s}, nil
}

// dialStream dials what the peer serves as id, and lets the peer copy with the method.
func (b *MuxBroker) dialStream(
	ctx context.Context, id uint32, method string, owned bool,
) (*dialledStream, error) {
	client, err := b.dialService(ctx, id)
	if err != nil {
		return nil, err
	}
	s := &dialledStream{client: client, owned: owned, copied: make(chan struct{})}
	data := b.NextId()
	arrived := make(chan *stream, 1)
	b.expected.Store(data, func(st *stream) { arrived <- st })
	// Ends with the copying, or when the client or the connection is closed.
	go s.letCopy("Plugin."+method, data)
	s.conn, err = s.await(ctx, b.session, arrived)
	if err == nil {
		// Not before: the server waits for this before it answers with an error. So the
		// error does not overtake the bytes before it.
		_ = sendID(s.conn, data) // fails if conn has ended, as its use will
		return s, nil
	}
	_ = client.Close() // err says why
	if _, isExpected := b.expected.LoadAndDelete(data); !isExpected {
		abort(<-arrived) // too late
	}
	if ctx.Err() != nil {
		err = notAccepted(ctx, id)
	}
	return nil, err
}

// letCopy lets the peer copy to or from the stream that it dials as data.
func (s *dialledStream) letCopy(method string, data uint32) {
	s.err = Call(context.Background(), s.client, method, data, nil)
	close(s.copied)
}

// await waits for the stream of the bytes.
func (s *dialledStream) await(
	ctx context.Context, session *session, arrived <-chan *stream,
) (*stream, error) {
	copied := s.copied
	var ended <-chan struct{}
	var timeout <-chan time.Time
	for {
		select {
		case st := <-arrived:
			return st, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-ended:
			return nil, session.explain(net.ErrClosed)
		case <-timeout:
			return nil, errors.New("plugin: the peer does not serve a reader or writer")
		case <-copied:
			if s.err != nil {
				return arrivedOr(s.err, arrived)
			}
			// The peer has dialled before it answered.
			copied = nil
			ended = session.ended()
			timeout = time.After(brokerTimeout)
		}
	}
}

// arrivedOr returns the stream if it has arrived, and otherwise err.
func arrivedOr(err error, arrived <-chan *stream) (*stream, error) {
	select {
	case st := <-arrived:
		return st, nil // with what was copied before the error
	default:
		return nil, err
	}
}

// release closes the reader or writer of the peer, if owned, and the client.
func (s *dialledStream) release() (err error) {
	if s.owned {
		err = Call(context.Background(), s.client, "Plugin.Close", struct{}{}, nil)
	}
	_ = s.client.Close() // fails only if it is closed already
	return err
}

// explain returns the error for a Read or Write that failed with err: that of the copying
// at the peer, if there is one.
func (s *dialledStream) explain(err error) error {
	if s.closed.Load() {
		return io.ErrClosedPipe
	}
	<-s.copied
	if s.err != nil {
		return s.err
	}
	return err
}

// dialledReader reads from a reader of the peer.
type dialledReader struct{ *dialledStream }

func (r *dialledReader) Read(p []byte) (int, error) {
	if r.closed.Load() {
		return 0, io.ErrClosedPipe
	}
	n, err := r.conn.Read(p)
	if err != nil {
		err = r.explain(err)
	}
	return n, err
}

func (r *dialledReader) Close() error {
	r.closed.Store(true)
	abort(r.conn)
	return r.release()
}

// dialledWriter writes to a writer of the peer.
type dialledWriter struct {
	*dialledStream
	failed atomic.Bool // a Write has returned an error
}

func (w *dialledWriter) Write(p []byte) (int, error) {
	n, err := w.conn.Write(p)
	if err != nil {
		w.failed.Store(true)
		err = w.explain(err)
	}
	return n, err
}

// finish tells the peer that all has been written. It does not wait.
func (w *dialledWriter) finish() { _ = w.conn.Close() }

// abort ends the use of the writer. Afterwards, neither Write nor Close waits for the peer.
func (w *dialledWriter) abort() { _ = w.client.Close() }

func (w *dialledWriter) Close() error {
	w.finish()
	<-w.copied
	w.closed.Store(true)
	err := w.release()
	if w.err != nil {
		return w.err
	}
	return err
}
