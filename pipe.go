package plugin

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"sync"
	"sync/atomic"
)

// This file is readers and writers over a stream. Bytes flow one way, from the
// source to the sink, in chunks: a length of four bytes, little-endian, and as
// many bytes. A chunk of length zero ends them; behind it comes a verdict: how
// the source ended. The sink answers with a verdict of its own when it has
// taken everything, or as soon as it takes no more. A verdict is a length like
// a chunk's and a sentError in gob, or length zero for a good end. Both sides
// begin by saying which they are.

const (
	sourceTag = "mux>" // what a source sends first
	sinkTag   = "mux<" // what a sink sends first

	maxChunk   = 64 << 10
	maxVerdict = 1 << 20
	maxText    = maxVerdict / 2 // of the error in a verdict; the rest is names
)

// ServeReader lets the other side read from r, which it does through the
// reader that DialReader returns there for the number that is returned here.
// It has five seconds to dial. From then on r is read as the other side reads,
// until r ends or fails, which the other side is told, or the other side
// closes its reader. r is not closed, and nobody waits for a Read of r that is
// under way.
func (b *MuxBroker) ServeReader(r io.Reader) uint32 {
	return b.whenDialled("reader", func(st *stream) {
		src, err := newSource(st)
		if err == nil {
			err = src.end(src.copyFrom(r))
		}
		if err != nil {
			b.session.logger.Debug("a served reader was not read to its end", "error", err)
		}
	})
}

// DialReader returns a reader for what the other side serves with ServeReader.
// It reads the same bytes, and then fails as that reader failed, with an error
// that keeps its identity as the errors of [Call] do; io.EOF is returned only
// where that reader returned it. Close frees what the other side holds, also
// before the end; it must be called. Read and Close may be called
// concurrently. The error is that of Dial; both ends must use this library.
func (b *MuxBroker) DialReader(id uint32) (io.ReadCloser, error) {
	st, err := b.Dial(id)
	if err != nil {
		return nil, err
	}
	k, err := newSink(st.(*stream))
	if err != nil {
		return nil, fmt.Errorf("plugin: reading from stream %d: %w", id, err)
	}
	return k, nil
}

// ServeWriter lets the other side write to w, which it does through the writer
// that DialWriter returns there for the number that is returned here. It has
// five seconds to dial. If w fails, the other side is told. w is not closed,
// and nobody waits for a Write to w that is under way.
func (b *MuxBroker) ServeWriter(w io.Writer) uint32 {
	return b.whenDialled("writer", func(st *stream) {
		k, err := newSink(st)
		if err == nil {
			err = k.copyTo(w)
		}
		if err != nil {
			b.session.logger.Debug("a served writer was not written to the end", "error", err)
		}
	})
}

// DialWriter returns a writer for what the other side serves with ServeWriter.
// An error of that writer is returned by a later Write, or by Close, and keeps
// its identity as the errors of [Call] do. Close waits until that writer has
// taken everything; it must be called. Write and Close may be called
// concurrently. The error is that of Dial; both ends must use this library.
func (b *MuxBroker) DialWriter(id uint32) (io.WriteCloser, error) {
	st, err := b.Dial(id)
	if err != nil {
		return nil, err
	}
	src, err := newSource(st.(*stream))
	if err != nil {
		return nil, fmt.Errorf("plugin: writing to stream %d: %w", id, err)
	}
	return src, nil
}

// introduce says which side this is, and checks that the other is the other.
func introduce(st *stream, own, other string) error {
	ctx, cancel := st.session.patience()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { abort(st) })
	_, err := io.WriteString(st, own)
	got := make([]byte, len(other))
	if err == nil {
		_, err = io.ReadFull(st, got)
	}
	if !stop() {
		err = waited(ctx)
	}
	switch {
	case string(got) == own:
		err = errors.New("the other side does the same: a reader goes with a reader, a writer with a writer")
	case err == nil && string(got) != other:
		err = errors.New("the other side is not one of ServeReader, DialReader, ServeWriter and DialWriter; these need this library on both sides")
	case err != nil:
		err = fmt.Errorf("the other side did not introduce itself, as this library does: %w", err)
	}
	if err != nil {
		abort(st)
	}
	return err
}

// source is the end of a stream that sends.
type source struct {
	st    *stream
	ended chan struct{} // closed when the sink's verdict is here
	err   error         // that verdict; to be read when ended is closed

	mu    sync.Mutex // serialises writing; guards the fields below
	chunk []byte
	done  bool
}

func newSource(st *stream) (*source, error) {
	if err := introduce(st, sourceTag, sinkTag); err != nil {
		return nil, err
	}
	src := &source{st: st, ended: make(chan struct{})}
	// Ends with the verdict, or with the stream.
	if !st.session.spawn(src.await) {
		return nil, net.ErrClosed
	}
	return src, nil
}

// await waits for the sink's verdict. It ends a Write that waits for room.
func (src *source) await() {
	err := readVerdict(src.st)
	if err == io.EOF {
		err = io.ErrClosedPipe
	}
	src.err = err
	close(src.ended)
	abort(src.st)
}

// Write sends p in chunks.
func (src *source) Write(p []byte) (n int, err error) {
	src.mu.Lock()
	defer src.mu.Unlock()
	for n < len(p) && err == nil {
		size := min(len(p)-n, maxChunk)
		src.chunk = append(append(src.chunk[:0], 0, 0, 0, 0), p[n:n+size]...)
		if err = src.send(size); err == nil {
			n += size
		}
	}
	return n, err
}

// send sends src.chunk, which holds size bytes behind its length.
func (src *source) send(size int) error {
	if src.done {
		return io.ErrClosedPipe
	}
	binary.LittleEndian.PutUint32(src.chunk, uint32(size))
	_, err := src.st.Write(src.chunk)
	select {
	case <-src.ended:
		if src.err == nil {
			return io.ErrClosedPipe
		}
		return src.err
	default:
		return err
	}
}

// copyFrom sends what r holds, and returns why it stopped reading r.
func (src *source) copyFrom(r io.Reader) (err error) {
	defer recoverTo(&err)
	src.chunk = make([]byte, 4+maxChunk)
	for {
		src.chunk = src.chunk[:4+maxChunk]
		n, err := r.Read(src.chunk[4:])
		if n > 0 {
			src.chunk = src.chunk[:4+n]
			if src.send(n) != nil {
				return nil // the verdict says why
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Close ends the bytes and waits until the sink has taken all of them.
func (src *source) Close() error { return src.end(nil) }

// end tells the sink how the bytes ended, and returns its verdict.
func (src *source) end(how error) error {
	src.mu.Lock()
	if !src.done {
		src.done = true
		// If this cannot be sent, the verdict says why.
		_, _ = src.st.Write(appendVerdict(make([]byte, 4), how))
	}
	src.mu.Unlock()
	<-src.ended
	return src.err
}

// sink is the end of a stream that receives.
type sink struct {
	st *stream

	mu   sync.Mutex // guards left and err; held by the one reader
	left int        // bytes of the chunk that have not been read
	err  error      // how the bytes ended

	closing sync.Once
	closed  atomic.Bool // the user has called Close
}

func newSink(st *stream) (*sink, error) {
	if err := introduce(st, sinkTag, sourceTag); err != nil {
		return nil, err
	}
	return &sink{st: st}, nil
}

// Read reads what the source has sent.
func (k *sink) Read(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, err := k.read(p)
	if k.closed.Load() {
		return 0, io.ErrClosedPipe
	}
	return n, err
}

func (k *sink) read(p []byte) (int, error) {
	if k.err == nil && k.left == 0 {
		k.nextChunk()
	}
	if k.err != nil {
		return 0, k.err
	}
	n, err := k.st.Read(p[:min(len(p), k.left)])
	k.left -= n
	if err != nil {
		k.err = cutShort(err, true)
	}
	return n, k.err
}

// nextChunk reads the length of the next chunk, or how the bytes ended.
func (k *sink) nextChunk() {
	var head [4]byte
	if _, err := io.ReadFull(k.st, head[:]); err != nil {
		k.err = cutShort(err, true)
		return
	}
	size := binary.LittleEndian.Uint32(head[:])
	switch {
	case size > maxChunk:
		k.err = errors.New("plugin: what was received is no chunk of a stream")
		abort(k.st)
	case size == 0:
		if k.err = cutShort(readVerdict(k.st), true); k.err == nil {
			k.err = io.EOF
			k.close(nil)
		}
	default:
		k.left = int(size)
	}
}

// copyTo writes everything to w and tells the source how that went.
func (k *sink) copyTo(w io.Writer) error {
	copying := func() (err error) {
		defer recoverTo(&err)
		_, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{k}, make([]byte, maxChunk))
		return err
	}
	err := copying()
	k.close(err)
	return err
}

// Close tells the source that nothing more will be read.
func (k *sink) Close() error {
	k.closed.Store(true)
	k.close(io.ErrClosedPipe)
	return nil
}

func (k *sink) close(verdict error) {
	k.closing.Do(func() {
		// If this cannot be sent, the source learns it from the stream's end.
		_, _ = k.st.Write(appendVerdict(nil, verdict))
		abort(k.st)
	})
}

func appendVerdict(b []byte, err error) []byte {
	var text bytes.Buffer
	if err != nil {
		end := sendable(err)
		end.Text = end.Text[:min(len(end.Text), maxText)]
		_ = gob.NewEncoder(&text).Encode(end)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(text.Len()))
	return append(b, text.Bytes()...)
}

func readVerdict(r io.Reader) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := binary.LittleEndian.Uint32(head[:])
	if size == 0 {
		return nil
	}
	if size > maxVerdict {
		return errors.New("plugin: what was received is no end of a stream")
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(r, text); err != nil {
		return cutShort(err, true)
	}
	var end sentError
	if err := gob.NewDecoder(bytes.NewReader(text)).Decode(&end); err != nil {
		return fmt.Errorf("plugin: what was received is no end of a stream: %w", err)
	}
	return &remoteError{rpc.ServerError(end.Text), knownErrors(end.Is)}
}
