package plugin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"reflect"
	"sync"
	"sync/atomic"
)

// The values of a sequence cross the connection as one stream of gob, in the bytes of a
// reader or writer: a method writes the values of its result to a writer of the caller,
// and reads those of a parameter from a reader. The error with which a sequence ends is
// the error of the method, or of the reader.
//
// Between the sequence and the connection there is a valueBuffer, at the end that encodes
// and at the caller's end of a result. So values are encoded while others are being
// written, and what has been encoded meanwhile is written together. A value that is
// yielded alone is written at once.

const (
	// valueBufferSize is how many bytes of values wait in a valueBuffer.
	valueBufferSize = 64 << 10
	// decodeBufferSize is how many bytes are read at once for decoding.
	decodeBufferSize = 32 << 10
)

var (
	errSequenceUsed  = errors.New("plugin: the sequence can be ranged over once, and has been")
	errSequenceEnded = errors.New("plugin: the method that took the sequence has returned")
)

// sendSequence writes the values that encode encodes to w, and returns the error with
// which the sequence ends, or why the values cannot be written. If ctx ends, no more are
// encoded.
func sendSequence(ctx context.Context, w io.Writer, encode func(io.Writer) error) error {
	values := newValueBuffer()
	stop := context.AfterFunc(ctx, func() { values.abort(context.Cause(ctx)) })
	defer stop()
	defer values.abort(errGoexit) // if encode does not return
	written := make(chan error, 1)
	// Ends when all has been written or values is aborted; waited for below.
	go func() { written <- values.copyTo(w) }()
	err := encode(values)
	values.finish(nil)
	if failed := <-written; failed != nil {
		return failed
	}
	return err
}

// encodeSequence writes the values of a sequence to w, and returns the error with which
// the sequence ends.
func encodeSequence(w io.Writer, sequence reflect.Value) error {
	if sequence.IsNil() {
		return nil
	}
	e := &sequenceEncoder{encoder: gob.NewEncoder(w)}
	yield := reflect.MakeFunc(sequence.Type().In(0), e.yield)
	sequence.Call([]reflect.Value{yield})
	return e.err
}

// sequenceEncoder encodes the values that a sequence yields.
type sequenceEncoder struct {
	encoder *gob.Encoder
	err     error // ends the sequence, whatever it yields afterwards
}

// yield is the function that the sequence calls with a value and an error.
func (e *sequenceEncoder) yield(in []reflect.Value) []reflect.Value {
	if e.err == nil {
		e.err, _ = in[1].Interface().(error) // nil is no error
	}
	if e.err == nil {
		e.err = e.encode(in[0])
	}
	return []reflect.Value{reflect.ValueOf(e.err == nil)}
}

func (e *sequenceEncoder) encode(value reflect.Value) error {
	if checkNil(value) != nil {
		return fmt.Errorf("plugin: a nil %v cannot be sent in a sequence", value.Type())
	}
	if err := e.try(value); err != nil {
		return fmt.Errorf("plugin: a value of type %v cannot be sent in a sequence: %w", value.Type(), err)
	}
	return nil
}

// try encodes a value. A panic in gob or in GobEncode is an error.
func (e *sequenceEncoder) try(value reflect.Value) (err error) {
	defer recoverTo(&err)
	if err := inspect(value, nil); err != nil {
		return err
	}
	return withAdvice(e.encoder.EncodeValue(value))
}

// receiveSequence calls call, which writes values to a writer, and next for each value
// until there are no more or next returns false. It returns the error with which the
// sequence ends, when call has returned.
func receiveSequence(
	outer context.Context, call func(ctx context.Context, values io.Writer) error, next nextValue,
) error {
	ctx, leave := context.WithCancel(outer)
	values := newValueBuffer()
	stop := context.AfterFunc(ctx, func() { values.abort(contextError(ctx)) })
	defer stop()
	returned := make(chan error, 1)
	// Ends with the call, which ends with ctx; waited for below.
	go func() {
		err := call(ctx, values)
		values.finish(err)
		returned <- err
	}()
	endCall := sync.OnceValue(func() error {
		leave()
		return <-returned
	})
	defer endCall() // also if the body of the loop panics
	err := decodeSequence(ctx, values, next)
	if err == nil || outer.Err() == nil {
		return err
	}
	callErr := endCall()
	if errors.Is(callErr, outer.Err()) {
		return callErr // it names the method
	}
	return err // the method had returned, but not all of its values had been yielded
}

// nextValue decodes the next value and yields it. It returns false if the loop is left,
// and an error if there is no value.
type nextValue func(*gob.Decoder) (more bool, err error)

// decodeSequence calls next until there are no more values in r, next returns false, or
// ctx ends. It returns the error with which the sequence ends.
func decodeSequence(ctx context.Context, r io.Reader, next nextValue) error {
	from := &endingReader{r: r}
	decoder := gob.NewDecoder(bufio.NewReaderSize(from, decodeBufferSize))
	for {
		more, err := next(decoder)
		if err != nil {
			return from.explain(err)
		}
		if !more {
			return nil
		}
		if ctx.Err() != nil {
			return contextError(ctx)
		}
	}
}

// endingReader remembers why reading ended.
type endingReader struct {
	r   io.Reader
	err error
}

func (r *endingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil {
		r.err = err
	}
	return n, err
}

// explain returns the error of a sequence for an error of decoding. At the end of what
// there is to read, gob returns the error of reading, or io.ErrUnexpectedEOF within a
// value.
func (r *endingReader) explain(err error) error {
	switch {
	case err == io.EOF && r.err == io.EOF:
		return nil
	case r.err != nil && (errors.Is(err, r.err) || err == io.ErrUnexpectedEOF):
		return err
	}
	return fmt.Errorf("plugin: a value of the sequence cannot be read: %w", err)
}

// decodeValue decodes into what v points to. A panic in GobDecode is an error.
func decodeValue(values *gob.Decoder, v any) (err error) {
	defer recoverTo(&err)
	return withAdvice(values.Decode(v))
}

// valueBuffer passes encoded values from one goroutine to another.
type valueBuffer struct {
	mu      sync.Mutex // guards the fields below
	changed sync.Cond
	data    bytes.Buffer
	err     error // nothing is written any more, and Read ends with this
}

func newValueBuffer() *valueBuffer {
	b := &valueBuffer{}
	b.changed.L = &b.mu
	return b
}

// Write waits while the buffer is full.
func (b *valueBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.data.Len() >= valueBufferSize && b.err == nil {
		b.changed.Wait()
	}
	if b.err != nil {
		return 0, b.err
	}
	b.changed.Broadcast()
	return b.data.Write(p)
}

// Read waits while the buffer is empty.
func (b *valueBuffer) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.data.Len() == 0 && b.err == nil {
		b.changed.Wait()
	}
	if b.data.Len() == 0 {
		return 0, b.err
	}
	b.changed.Broadcast()
	return b.data.Read(p)
}

// copyTo writes what is read to w. If that fails, so does Write.
func (b *valueBuffer) copyTo(w io.Writer) error {
	_, err := io.Copy(w, b)
	b.abort(err)
	return err
}

// finish ends the buffer with err, or io.EOF if it is nil, unless it has ended. What has
// been written can still be read.
func (b *valueBuffer) finish(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		err = io.EOF
	}
	if b.err == nil {
		b.err = err
	}
	b.changed.Broadcast()
}

// abort is finish, but drops what has been written.
func (b *valueBuffer) abort(err error) {
	b.finish(err)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.data.Reset()
}

// servedSequence is a sequence of this end that the peer uses as a reader of its values.
// Its use is the range over it, with the writing of the values.
type servedSequence struct {
	broker   *MuxBroker
	sequence reflect.Value
	uses     group // closed when the offer ends
	begun    atomic.Bool
}

// offerSequence offers a sequence to the peer.
func (b *MuxBroker) offerSequence(sequence reflect.Value) *offer {
	s := &servedSequence{broker: b, sequence: sequence}
	o := b.offer(b.service(s), &s.uses, untilStopped)
	o.reads = true // the sequence may wait for something that never comes
	return o
}

// Read sends the values to the stream that the peer accepts as id.
func (s *servedSequence) Read(ctx context.Context, id uint32, _ *struct{}) error {
	if s.begun.Swap(true) {
		return errSequenceUsed
	}
	if !s.uses.enter() {
		return errStopped
	}
	defer s.uses.Done()
	return s.broker.copyOver(ctx, id, func(conn io.ReadWriter) error {
		return sendSequence(ctx, conn, s.encode)
	})
}

// encode encodes the values. A panic in the sequence is its error.
func (s *servedSequence) encode(w io.Writer) (err error) {
	defer recoverTo(&err)
	return encodeSequence(w, s.sequence)
}

// remoteSequence is a sequence of the peer that was passed to a method of this end. It is
// dialled when the method ranges over it.
type remoteSequence struct {
	ctx    context.Context // ends with the context of the method, or when it has returned
	end    context.CancelCauseFunc
	broker *MuxBroker
	id     uint32 // 0 for an empty sequence
	used   atomic.Bool
}

// call is the sequence: it calls the function that it gets with each value.
func (q *remoteSequence) call(in []reflect.Value) []reflect.Value {
	if q.id == 0 {
		return nil
	}
	yield := yieldValue{yield: in[0], element: in[0].Type().In(0)}
	err := q.each(yield.next)
	if err != nil && q.ctx.Err() != nil {
		err = context.Cause(q.ctx)
	}
	if err != nil {
		yield.call(reflect.Zero(yield.element), err)
	}
	return nil
}

// each calls next for each value, and returns the error with which the sequence ends.
func (q *remoteSequence) each(next nextValue) error {
	if q.used.Swap(true) {
		return errSequenceUsed
	}
	reader, err := q.broker.dialReader(q.ctx, q.id, false)
	if err != nil {
		return err
	}
	defer reader.Close() // ends the sequence of the peer, if the loop was left
	stop := context.AfterFunc(q.ctx, func() { _ = reader.Close() })
	defer stop()
	return decodeSequence(q.ctx, reader, next)
}

// Close ends the use of the sequence, because the method has returned.
func (q *remoteSequence) Close() error {
	q.end(errSequenceEnded)
	return nil
}

// yieldValue yields values of a type that only reflection knows.
type yieldValue struct {
	yield   reflect.Value
	element reflect.Type
}

func (y yieldValue) next(values *gob.Decoder) (more bool, err error) {
	v := reflect.New(y.element)
	if err := decodeValue(values, v.Interface()); err != nil {
		return false, err
	}
	return y.call(v.Elem(), nil), nil
}

func (y yieldValue) call(v reflect.Value, err error) (more bool) {
	asError := reflect.ValueOf(&err).Elem() // of type error, also if it is nil
	return y.yield.Call([]reflect.Value{v, asError})[0].Bool()
}
