package plugin

import (
	"cmp"
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

const (
	// readTimeout is how long a Read or Write that is running delays the Close of
	// its reader or writer.
	readTimeout = 100 * time.Millisecond
)

// Readers and writers are services with one method, which copies the bytes from or to
// another stream. Its error is the error of the reader or writer.

// ServeReader lets the peer read from r. The peer passes id to [MuxBroker.DialReader]
// within five seconds. r is read until it fails, or the peer closes its end. r is read
// ahead, and not closed.
//
// stop ends this like that of [MuxBroker.ServeRPC]. It waits for a Read that is running,
// so first end one that may block for long. After stop has returned, r is not read, and
// Read fails in the peer. It does not return io.EOF unless r did.
func (b *MuxBroker) ServeReader(r io.Reader) (id uint32, stop func()) {
	l := b.serveStream("Read", r.Read, brokerTimeout, nil)
	return l.id, l.stop
}

// DialReader returns a reader for the one that the peer serves as id with ServeReader.
// Close it when it is no longer needed. Errors of that reader keep their identity, like
// those of [Call]. Read and Close may be called concurrently. The errors are those of
// [MuxBroker.Dial], and one if id is not a reader.
func (b *MuxBroker) DialReader(id uint32) (io.ReadCloser, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	p, err := b.dialStream(ctx, id, "Read", false)
	r, _ := p.(io.ReadCloser)
	return r, err
}

// ServeWriter lets the peer write to w. The peer passes id to [MuxBroker.DialWriter]
// within five seconds. w is not closed. stop ends this like that of
// [MuxBroker.ServeReader]. After stop has returned, w is not written to.
func (b *MuxBroker) ServeWriter(w io.Writer) (id uint32, stop func()) {
	l := b.serveStream("Write", w.Write, brokerTimeout, nil)
	return l.id, l.stop
}

// DialWriter returns a writer for the one that the peer serves as id with ServeWriter.
// Close must be called. It waits until everything has been written. An error of that writer
// is returned by a later Write or by Close, and keeps its identity, like those of [Call].
// Write and Close may be called concurrently. The errors are those of [MuxBroker.Dial], and
// one if id is not a writer.
func (b *MuxBroker) DialWriter(id uint32) (io.WriteCloser, error) {
	ctx, cancel := context.WithTimeout(context.Background(), brokerTimeout)
	defer cancel()
	p, err := b.dialStream(ctx, id, "Write", false)
	w, _ := p.(io.WriteCloser)
	return w, err
}

// lent is a reader or writer of the caller. Waiting for its uses does not wait for the
// stream, because the peer may not read.
type lent struct {
	use  func([]byte) (int, error) // Read or Write
	uses group                     // closed when the loan ends
	used atomic.Bool               // the peer has begun to read or write it
}

func (l *lent) Read(p []byte) (int, error) {
	if !l.uses.enter() {
		return 0, errStopped
	}
	defer l.uses.Done()
	return l.use(p)
}

func (l *lent) Write(p []byte) (int, error) { return l.Read(p) }

// serveStream serves a reader or writer by the name of its method, "Read" or "Write". If
// closer is not nil, it is called when the peer closes its end or the loan ends.
func (b *MuxBroker) serveStream(name string, use func([]byte) (int, error), timeout time.Duration, closer func() error) *loan {
	lent := &lent{use: use}
	flow := func(ctx context.Context, arg, _ reflect.Value) (err error) {
		if lent.used.Swap(true) {
			return errors.New("plugin: the peer uses the stream twice")
		}
		conn, err := b.DialContext(ctx, uint32(arg.Uint()))
		if err != nil {
			return err
		}
		defer recoverTo(&err)
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { abort(conn) })()
		var w io.Writer = conn
		var r io.Reader = lent
		if name == "Write" {
			w, r = lent, conn
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, 64<<10))
		return err
	}
	end := sync.OnceValue(func() (err error) {
		if closer == nil {
			return nil
		}
		defer recoverTo(&err)
		lent.uses.close()
		waitFor(readTimeout, lent.uses.allDone())
		return closer()
	})
	l := b.serve(&service{methods: map[string]*method{
		name:    {call: flow, context: true, arg: reflect.TypeFor[uint32](), into: typeOfNothing},
		"Close": {call: func(context.Context, reflect.Value, reflect.Value) error { return end() }, arg: typeOfNothing, into: typeOfNothing},
	}}, &lent.uses, timeout)
	l.reads = name == "Read"
	if closer != nil {
		context.AfterFunc(l.ctx, func() { _ = end() })
	}
	return l
}

// pipe is a reader or writer of the peer that was dialled.
type pipe struct {
	conn   net.Conn
	client *rpc.Client
	done   chan struct{} // closed when the call has returned
	err    error         // its error
	closed atomic.Bool
	failed atomic.Bool // a Write has returned an error
	owned  bool        // Close closes the reader or writer of the peer
}

// dialStream returns a pipeReader or pipeWriter.
func (b *MuxBroker) dialStream(ctx context.Context, id uint32, method string, owned bool) (io.Closer, error) {
	client, err := b.dialRPC(ctx, id)
	if err != nil {
		return nil, err
	}
	p := &pipe{client: client, done: make(chan struct{}), owned: owned}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	data := b.NextId()
	// Ends with the copying, or when the client or the connection is closed.
	go func() {
		p.err = Call(context.Background(), client, "Plugin."+method, data, nil)
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
	if method == "Read" {
		return pipeReader{p}, nil
	}
	// Ends a Write that waits for the peer to read.
	b.session.spawn(func() { <-p.done; abort(p.conn) })
	return pipeWriter{p}, nil
}

// close closes the client and, if owned, the reader or writer of the peer.
func (p *pipe) close(err error) error {
	if p.owned {
		err = cmp.Or(err, Call(context.Background(), p.client, "Plugin.Close", struct{}{}, nil))
	}
	_ = p.client.Close()
	return err
}

// ended waits until the call has returned, and returns its error or, if nil, err.
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
	return p.close(nil)
}

type pipeWriter struct{ *pipe }

func (p pipeWriter) Write(b []byte) (int, error) {
	n, err := p.conn.Write(b)
	if err != nil {
		p.failed.Store(true)
		err = p.ended(err)
	}
	return n, err
}

func (p pipeWriter) Close() error {
	_ = p.conn.Close()
	<-p.done
	p.closed.Store(true)
	return p.close(p.err)
}
