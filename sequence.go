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

const (
	// sendBufferSize is how many bytes of values wait while others are being written.
	sendBufferSize = 64 << 10
	// receiveBufferSize is how many bytes are read at once for decoding.
	receiveBufferSize = 32 << 10
)

var (
	errSequenceUsed = errors.New("plugin: the sequence can be ranged over once, and has been")
	errSequenceOver = errors.New("plugin: the sequence has returned")
)

// ---- The end that has the sequence ----

// sendSequence writes the values of a sequence to w, and returns the error with which the
// sequence ends, or why the values cannot be written. If ctx ends, yield returns false. If
// catch, a panic is an error.
func sendSequence(ctx context.Context, w io.Writer, sequence reflect.Value, catch bool) error {
	if sequence.IsNil() {
		return nil
	}
	s := &sequenceSender{}
	s.encoder = gob.NewEncoder(&s.encoded)
	s.changed.L = &s.mu
	stop := context.AfterFunc(ctx, func() { s.finish(context.Cause(ctx)) })
	defer stop()
	defer s.finish(errGoexit) // if the sequence does not return
	written := make(chan error, 1)
	// Ends when all has been written, or cannot be; waited for below.
	go func() { written <- s.writeTo(w) }()
	end := s.finish(s.rangeOver(sequence, catch))
	if err := <-written; err != nil {
		return err
	}
	if end == errSequenceOver {
		return nil
	}
	return end
}

// sequenceSender encodes the values that a sequence yields, while others are being
// written. What has been encoded meanwhile is written together. A value that is yielded
// alone is written at once.
type sequenceSender struct {
	encoder *gob.Encoder
	encoded bytes.Buffer // one value

	mu      sync.Mutex // guards the fields below
	changed sync.Cond
	values  []byte // that writeTo has not taken yet
	end     error  // if not nil, the sequence has ended with it, and what is yielded is dropped
}

// rangeOver calls the sequence. It returns errSequenceOver or, if catch, that it panicked.
func (s *sequenceSender) rangeOver(sequence reflect.Value, catch bool) (err error) {
	if catch {
		defer recoverTo(&err)
	}
	yield := reflect.MakeFunc(sequence.Type().In(0), s.yield)
	sequence.Call([]reflect.Value{yield})
	return errSequenceOver
}

// yield is the function that the sequence calls with a value and an error.
func (s *sequenceSender) yield(in []reflect.Value) []reflect.Value {
	err, _ := in[1].Interface().(error) // nil is no error
	if err == nil {
		err = s.encode(in[0])
	}
	if err == nil {
		err = s.add()
	}
	if err != nil {
		s.finish(err)
	}
	return []reflect.Value{reflect.ValueOf(err == nil)}
}

func (s *sequenceSender) encode(value reflect.Value) error {
	if checkNil(value) != nil {
		return fmt.Errorf("plugin: a nil %v cannot be sent in a sequence", value.Type())
	}
	s.encoded.Reset()
	err := inspect(value, nil)
	if err == nil {
		err = encode(s.encoder, value)
	}
	if err != nil {
		return fmt.Errorf("plugin: a value of type %v cannot be sent in a sequence: %w", value.Type(), err)
	}
	return nil
}

// add hands the encoded value to writeTo, as soon as there is room.
func (s *sequenceSender) add() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.values) >= sendBufferSize && s.end == nil {
		s.changed.Wait()
	}
	if s.end != nil {
		return s.end
	}
	s.values = append(s.values, s.encoded.Bytes()...)
	s.changed.Broadcast()
	return nil
}

// finish ends the sequence with err, unless it has ended, and returns the error with which
// it has.
func (s *sequenceSender) finish(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end == nil {
		s.end = err
	}
	s.changed.Broadcast()
	return s.end
}

// writeTo writes the values to w until the sequence has ended.
func (s *sequenceSender) writeTo(w io.Writer) error {
	for values := s.take(nil); len(values) > 0; values = s.take(values) {
		if _, err := w.Write(values); err != nil {
			s.finish(err)
			return err
		}
	}
	return nil
}

// take waits for values and returns them. When the sequence has ended and all were taken, it
// returns none. It reuses written, a buffer that has been written.
func (s *sequenceSender) take(written []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.values) == 0 && s.end == nil {
		s.changed.Wait()
	}
	taken := s.values
	s.values = written[:0]
	s.changed.Broadcast()
	return taken
}

// offerSequence offers a sequence to the peer, as a reader of its values. Its use is the
// whole range over it.
func (b *MuxBroker) offerSequence(sequence reflect.Value) *offer {
	s := &servedStream{broker: b}
	s.copy = func(ctx context.Context, conn io.ReadWriter) error {
		if !s.uses.enter() {
			return errStopped
		}
		defer s.uses.Done()
		return sendSequence(ctx, conn, sequence, true)
	}
	return s.offer("Read", untilStopped, nil)
}

// ---- The end that ranges over it ----

// receiveSequence calls next for each value in r, until there are no more, next returns
// false, or ctx ends. It returns the error with which the sequence ends.
func receiveSequence(ctx context.Context, r io.Reader, next nextValue) error {
	buffered := bufio.NewReaderSize(r, receiveBufferSize)
	values := gob.NewDecoder(buffered)
	for more := true; more; {
		_, err := buffered.Peek(1) // waits for the next value
		if ctx.Err() != nil {
			return contextError(ctx)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		more, err = next(values)
		if err != nil {
			return fmt.Errorf("plugin: a value of the sequence cannot be read: %w", err)
		}
	}
	return nil
}

// nextValue decodes the next value and yields it. It returns false if the loop is left,
// and an error if there is no value.
type nextValue func(*gob.Decoder) (more bool, err error)

// remoteSequence is a sequence of the peer that was passed to a method of this end. It is
// dialled when the method ranges over it.
type remoteSequence struct {
	ctx    context.Context // ends when the method has returned
	broker *MuxBroker
	id     uint32 // 0 for an empty sequence
	used   atomic.Bool
}

// call is the sequence: it calls the function that it gets with each value.
func (q *remoteSequence) call(in []reflect.Value) []reflect.Value {
	yield := func(v reflect.Value, err error) (more bool) {
		asError := reflect.ValueOf(&err).Elem() // of type error, even if it is nil
		return in[0].Call([]reflect.Value{v, asError})[0].Bool()
	}
	element := in[0].Type().In(0)
	err := q.receive(func(values *gob.Decoder) (more bool, err error) {
		v := reflect.New(element)
		if err := decode(values, v.Interface()); err != nil {
			return false, err
		}
		return yield(v.Elem(), nil), nil
	})
	if err != nil && q.ctx.Err() != nil {
		err = context.Cause(q.ctx)
	}
	if err != nil {
		yield(reflect.Zero(element), err)
	}
	return nil
}

// receive calls next for each value, and returns the error with which the sequence ends.
func (q *remoteSequence) receive(next nextValue) error {
	if q.id == 0 {
		return nil
	}
	if q.used.Swap(true) {
		return errSequenceUsed
	}
	values, err := q.broker.dialReader(q.ctx, q.id, false)
	if err != nil {
		return err
	}
	defer values.Close() // ends the sequence of the peer, if the loop was left
	stop := context.AfterFunc(q.ctx, func() { _ = values.Close() })
	defer stop()
	return receiveSequence(q.ctx, values, next)
}
