package plugin

import (
	"bufio"
	"bytes"
	"context"
	"encoding"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"sync"
)

// This file is the messages of an RPC stream: gob values, each with the
// definitions of types that it needs ahead of it. Package gob keeps what it
// has defined for as long as a stream lives, and loses step when a value
// fails; here a value that fails leaves nothing behind but definitions.

const (
	// maxMessage is the most that one message may hold, in bytes.
	maxMessage = 1 << 30
	// maxQueued is how much may wait to be written before Call waits, too, and
	// a server reads no more requests.
	maxQueued = 1 << 20
	// keepBuffer is the largest buffer that is kept for the next message.
	keepBuffer = 2 << 20
	// maxTypes is how many bytes of definitions a reader may have seen to be
	// used for another stream.
	maxTypes = 64 << 10
	// maxDepth is how deep an argument or reply with interfaces may nest.
	maxDepth = 10000
)

// gobWriter encodes messages for one stream. Those of concurrent senders are
// written together: one of them writes what has gathered until nothing is left.
type gobWriter struct {
	conn io.Writer

	mu      sync.Mutex // guards the fields below
	buf     gobBuffer  // what enc has encoded and nobody has begun to write
	spare   []byte     // the buffer that was written last, to be used again
	enc     *gob.Encoder
	known   map[reflect.Type]bool // types in interfaces that are defined already
	mayHold map[reflect.Type]bool // whether values of a type may hold interfaces
	writing bool                  // somebody is in flush, or about to be
	moved   chan struct{}         // closed when buf has been taken to be written; nil if nobody waits

	failing sync.Once
	failed  chan struct{} // closed when nothing can be written any more
	err     error         // why; to be read when failed is closed
}

// gobBuffer is the writer that a gobWriter's encoder writes to.
type gobBuffer []byte

func (b *gobBuffer) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}

// writeError says that a message was not sent because the stream is lost.
type writeError struct{ error }

func (e *writeError) Unwrap() error { return e.error }

func isLost(err error) bool { return errors.As(err, new(*writeError)) }

func newGobWriter(conn io.Writer) *gobWriter {
	w := &gobWriter{conn: conn, known: make(map[reflect.Type]bool), mayHold: make(map[reflect.Type]bool), failed: make(chan struct{})}
	w.enc = gob.NewEncoder(&w.buf)
	return w
}

// encode adds a message. If it reports flush, the caller has to see that flush
// is called. A body that gob cannot encode leaves nothing behind but the
// definitions of types that the encoder believes to be sent now.
func (w *gobWriter) encode(header, body any) (flush bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if isClosed(w.failed) {
		return false, &writeError{w.err}
	}
	if err := w.defineInside(reflect.ValueOf(body), 0); err != nil {
		return false, err
	}
	start := len(w.buf)
	if err := w.append(header); err != nil {
		return false, err
	}
	size := bytesIn(body)
	if size <= maxMessage {
		behind := len(w.buf)
		err = w.append(body)
		size = len(w.buf) - behind
	}
	if err == nil && size > maxMessage {
		err = fmt.Errorf("it takes %d bytes, and a message holds %d at most: pass what is large as a stream (see MuxBroker.ServeReader)", size, maxMessage)
	}
	if err != nil {
		w.rewind(start)
	}
	flush = len(w.buf) > 0 && !w.writing
	w.writing = w.writing || flush
	return flush, err
}

// bytesIn returns how many bytes v holds if it is nothing but bytes: then it
// need not be encoded to see that it is too large.
func bytesIn(v any) int {
	b := reflect.Indirect(reflect.ValueOf(v))
	if k := b.Kind(); k == reflect.String || k == reflect.Slice && b.Type().Elem().Kind() == reflect.Uint8 {
		return b.Len()
	}
	return 0
}

// append encodes v behind what is in buf. What panics on the way, in gob or in
// a GobEncode, is an error.
func (w *gobWriter) append(v any) (err error) {
	defer recoverTo(&err)
	return w.enc.Encode(v)
}

// define adds the definition of t, but no value.
func (w *gobWriter) define(t reflect.Type) {
	start := len(w.buf)
	// If gob cannot encode such a value, whoever has one will be told.
	_ = w.append(reflect.Zero(t).Interface())
	w.rewind(start)
}

// rewind drops what is in buf from start on, but for the definitions of types.
func (w *gobWriter) rewind(start int) {
	w.buf = append(w.buf[:start], definitions(w.buf[start:])...)
	if cap(w.buf) > keepBuffer {
		w.buf = slices.Clone(w.buf)
	}
}

// defineInside defines the types of all that v holds in interfaces. The
// encoder would put the definitions of some of them inside the message, where
// they are lost if it is dropped, or skipped by the one who decodes it.
func (w *gobWriter) defineInside(v reflect.Value, depth int) (err error) {
	if !v.IsValid() || !w.mayHoldInterfaces(v.Type()) {
		return nil
	}
	if depth++; depth > maxDepth {
		return errors.New("it is nested too deeply, or holds itself")
	}
	switch v.Kind() {
	case reflect.Pointer:
		err = w.defineInside(v.Elem(), depth)
	case reflect.Interface:
		if v.IsNil() {
			return nil
		}
		t := v.Elem().Type()
		for t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if !w.known[t] {
			w.known[t] = true
			w.define(t)
		}
		err = w.defineInside(v.Elem(), depth)
	case reflect.Slice, reflect.Array:
		for i := 0; i < v.Len() && err == nil; i++ {
			err = w.defineInside(v.Index(i), depth)
		}
	case reflect.Map:
		for it := v.MapRange(); err == nil && it.Next(); {
			if err = w.defineInside(it.Key(), depth); err == nil {
				err = w.defineInside(it.Value(), depth)
			}
		}
	case reflect.Struct:
		for i := 0; i < v.NumField() && err == nil; i++ {
			if v.Type().Field(i).IsExported() {
				err = w.defineInside(v.Field(i), depth)
			}
		}
	}
	return err
}

// mayHoldInterfaces reports whether a value of type t may hold an interface
// that gob sees. A type that encodes itself holds none: gob does not look
// inside, and what is there may hold itself.
func (w *gobWriter) mayHoldInterfaces(t reflect.Type) bool {
	holds, seen := w.mayHold[t]
	if seen {
		return holds
	}
	visited := make(map[reflect.Type]bool)
	var visit func(t reflect.Type) bool
	visit = func(t reflect.Type) bool {
		if visited[t] {
			return false
		}
		visited[t] = true
		if encodesItself(t) || encodesItself(reflect.PointerTo(t)) {
			return false
		}
		switch t.Kind() {
		case reflect.Interface:
			return true
		case reflect.Pointer, reflect.Slice, reflect.Array:
			return visit(t.Elem())
		case reflect.Map:
			return visit(t.Key()) || visit(t.Elem())
		case reflect.Struct:
			for i := range t.NumField() {
				if f := t.Field(i); f.IsExported() && visit(f.Type) {
					return true
				}
			}
		}
		return false
	}
	w.mayHold[t] = visit(t)
	return w.mayHold[t]
}

func encodesItself(t reflect.Type) bool {
	return t.Implements(reflect.TypeFor[gob.GobEncoder]()) || t.Implements(reflect.TypeFor[encoding.BinaryMarshaler]())
}

// flush writes all that is encoded, also what is added while it does.
func (w *gobWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.buf) > 0 && !isClosed(w.failed) {
		out := w.buf
		w.buf, w.spare = w.spare[:0], nil
		w.wake()
		w.mu.Unlock()
		_, err := w.conn.Write(out)
		if err != nil {
			w.fail(err)
		}
		w.mu.Lock()
		if cap(out) <= keepBuffer {
			w.spare = out
		}
	}
	w.writing = false
	w.wake()
}

// wake lets those look again who wait for room. w.mu is held.
func (w *gobWriter) wake() {
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
}

// fail ends all writing; the first reason is kept. It does not wait for who is
// encoding, which may be inside a GobEncode of the caller's.
func (w *gobWriter) fail(err error) {
	w.failing.Do(func() {
		w.err = err
		close(w.failed)
	})
}

// waitRoom waits while so much is queued that more should not be added.
func (w *gobWriter) waitRoom(ctx context.Context) error {
	return w.wait(ctx, func() bool { return len(w.buf) < maxQueued })
}

// drain waits until all that is encoded has been written.
func (w *gobWriter) drain(ctx context.Context) error {
	return w.wait(ctx, func() bool { return !w.writing })
}

func (w *gobWriter) wait(ctx context.Context, ready func() bool) error {
	for {
		w.mu.Lock()
		if ready() || isClosed(w.failed) {
			w.mu.Unlock()
			return nil
		}
		if w.moved == nil {
			w.moved = make(chan struct{})
		}
		moved := w.moved
		w.mu.Unlock()
		select {
		case <-moved:
		case <-w.failed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// gobReader reads the messages of one stream, each whole before gob sees it.
//
// A stock encoder cuts a value in pieces where it holds a type in an interface
// that is new: a message ends with the definition, and the value goes on in
// the next one. Only a decoder can tell, so it may ask for more.
//
// Most of what a short stream costs is its decoder, which compiles code for
// every type anew. So a reader goes from a stream that has ended to another of
// the same peer, whose types have the same numbers as long as it lives. It may
// go on only if its decoder can know no type that types does not have.
type gobReader struct {
	pool   *sync.Pool // where to go in the end
	src    *bufio.Reader
	buf    []byte // the message that was read last, with its length
	rest   []byte // what of it the decoder has yet to read
	defs   []byte // definitions of types that it has yet to read before that
	dec    *gob.Decoder
	header uint64 // with which type headers begin; 0 until one has been read
	simple uint64 // with which type parseHeader is known to read headers as gob does
	failed bool   // a value could not be decoded: pieces of it may follow
	unread bool   // the value was not decoded: nobody wants it
	ahead  bool   // buf is a header already
	method string // of the last header

	types map[uint32]string // the definitions that the decoder has been given
	size  int               // how many bytes they are
	used  bool              // there was another stream before
	own   []byte            // the definitions on this stream, if used
	last  bool              // there must not be another stream
}

// header is an rpc.Request or an rpc.Response. Is is this library's own: the
// names of the errors that Error is.
type header struct {
	ServiceMethod string
	Seq           uint64
	Error         string
	Is            []string
}

// newGobReader returns a reader for conn, maybe one from pool, to which it
// returns when it is released.
func newGobReader(conn io.Reader, pool *sync.Pool) *gobReader {
	if r, ok := pool.Get().(*gobReader); ok {
		r.src.Reset(conn)
		r.used = true
		return r
	}
	r := &gobReader{pool: pool, src: bufio.NewReader(conn), types: make(map[uint32]string)}
	r.dec = gob.NewDecoder((*gobSource)(r))
	return r
}

// release is called when nothing more will be read.
func (r *gobReader) release() {
	if r.last || len(r.defs) > 0 {
		return
	}
	r.src.Reset(nil)
	r.buf, r.rest, r.own, r.header, r.unread = nil, nil, nil, 0, false
	r.pool.Put(r)
}

// define takes account of a definition of a type, of which head bytes are its
// length, and hands it on to the decoder, if that has not got it already.
func (r *gobReader) define(def []byte, head int) {
	number, body := gobUint(def[head:])
	id := uint32(number >> 1) // gob looks at no more of it
	known, ok := r.types[id]
	if r.used && known == string(def) && len(r.own) <= maxTypes {
		r.own = append(r.own, def...)
		return
	}
	// With an interface, more definitions may come inside a value, unseen here.
	if ok || definesInterface(body) || r.size > maxTypes {
		r.claim()
	}
	if r.used {
		r.own = append(r.own, def...)
	}
	if !r.last {
		r.types[id] = string(def)
		r.size += len(def)
	}
	r.defs = append(r.defs, def...)
}

// claim makes the decoder this stream's alone. One that others had before is
// replaced, by one that has yet to read all definitions of this stream.
func (r *gobReader) claim() {
	r.last = true
	if r.used {
		r.dec, r.defs = gob.NewDecoder((*gobSource)(r)), r.own
		r.used, r.own, r.types, r.simple = false, nil, nil, 0
	}
}

// definesInterface reports whether a definition may mention the type of
// interfaces: its number is 8, which is sent as 16, and either the next field
// follows, the one after this one, or a zero.
func definesInterface(def []byte) bool {
	return bytes.Contains(def, []byte{16, 0}) || bytes.Contains(def, []byte{16, 1})
}

// gobSource is the reader that a gobReader's decoder reads from.
type gobSource gobReader

func (r *gobSource) Read(p []byte) (int, error) {
	part, err := r.fill()
	if err != nil {
		return 0, err
	}
	n := copy(p, *part)
	*part = (*part)[n:]
	return n, nil
}

func (r *gobSource) ReadByte() (byte, error) {
	part, err := r.fill()
	if err != nil {
		return 0, err
	}
	b := (*part)[0]
	*part = (*part)[1:]
	return b, nil
}

// fill returns where there is something to read.
func (s *gobSource) fill() (part *[]byte, err error) {
	r := (*gobReader)(s)
	if len(r.defs)+len(r.rest) == 0 {
		if err := r.next(); err != nil {
			return nil, cutShort(err, true)
		}
		// Where it drops a value, gob reads on behind an interface that is nil.
		if r.ahead = r.unread && r.typeID() == r.header; r.ahead {
			return nil, io.ErrUnexpectedEOF
		}
	}
	if len(r.defs) > 0 {
		return &r.defs, nil
	}
	return &r.rest, nil
}

// nextHeader is next for a header. It passes over a value that nobody wants,
// and what is left of one that failed, but for definitions.
func (r *gobReader) nextHeader() (err error) {
	if r.unread {
		_ = r.decode(nil)
	}
	if !r.ahead {
		err = r.next()
	}
	for err == nil && r.failed && r.header != 0 && r.typeID() != r.header {
		err = r.next()
	}
	r.unread, r.ahead, r.failed = false, false, false
	if err == nil && r.header == 0 {
		r.header = r.typeID()
	}
	return err
}

// readHeader reads the next header.
func (r *gobReader) readHeader(h *header) error {
	if err := r.nextHeader(); err != nil {
		return err
	}
	quick, ok := r.parseHeader()
	if ok && r.simple == r.header {
		*h = quick
		return nil
	}
	*h = header{}
	if err := r.decode(h); err != nil {
		return fmt.Errorf("plugin: what was received is not net/rpc: %w", err)
	}
	if ok && h.Seq != 0 && h.ServiceMethod == quick.ServiceMethod && h.Seq == quick.Seq {
		r.simple = r.header
	}
	return nil
}

// parseHeader reads a header that has no more than a method and a sequence
// number, as most have, without gob, which allocates. The fields have numbers,
// in the order of net/rpc's types.
func (r *gobReader) parseHeader() (h header, ok bool) {
	if len(r.defs) > 0 || r.typeID() != r.header {
		return h, false // there are definitions to take in
	}
	_, rest := gobUint(r.buf)
	_, rest = gobUint(rest)
	for field := uint64(0); ; {
		delta, after := gobUint(rest)
		if delta == 0 {
			return h, len(rest) == 1
		}
		field += delta
		n, after := gobUint(after)
		switch {
		case field == 1 && n <= uint64(len(after)):
			if name := after[:n]; r.method != string(name) {
				r.method = string(name)
			}
			h.ServiceMethod, after = r.method, after[n:]
		case field == 2:
			h.Seq = n
		default:
			return h, false
		}
		rest = after
	}
}

// typeID returns what the message in buf begins with.
func (r *gobReader) typeID() uint64 {
	_, message := gobUint(r.buf)
	id, _ := gobUint(message)
	return id
}

// next reads the next value. It returns io.EOF where the stream ends between
// values.
func (r *gobReader) next() error {
	for inside := false; ; inside = true {
		head, err := r.readMessage()
		if err != nil {
			return cutShort(err, inside)
		}
		if !isDefinition(r.buf[head:]) {
			// An interface by itself has no definition, but for its value's.
			if id, value := gobUint(r.buf[head:]); id == 16 && len(value) > 2 {
				r.claim()
			}
			r.rest = r.buf
			return nil
		}
		r.define(r.buf, head)
	}
}

// readMessage reads a message and returns how many bytes its length takes. It
// allocates little more than twice what was in fact sent.
func (r *gobReader) readMessage() (head int, err error) {
	buf := r.buf[:0]
	r.buf, r.rest = nil, nil
	if cap(buf) > keepBuffer {
		buf = nil
	}
	first, err := r.src.Peek(1)
	if err != nil {
		return 0, err
	}
	// A gob count is one byte below 128, or a negated length and as many
	// bytes, the most significant one first.
	head = 1
	if first[0] > 127 {
		head += -int(int8(first[0]))
	}
	if head > 9 {
		return 0, errors.New("plugin: what was received is not gob")
	}
	count, err := r.src.Peek(head)
	if err != nil {
		return 0, cutShort(err, true)
	}
	size, _ := gobUint(count)
	if size == 0 || size > maxMessage || uint64(len(r.defs))+size > 2*maxMessage {
		return 0, fmt.Errorf("plugin: a message of %d bytes was received; 1 to %d are allowed", size, maxMessage)
	}
	r.last = r.last || size > keepBuffer // gob's decoder keeps the message
	for left := head + int(size); left > 0; {
		// As much again as has come: large messages are not copied often.
		n := min(left, max(len(buf), 1<<20))
		buf = slices.Grow(buf, n)
		got, err := io.ReadFull(r.src, buf[len(buf):len(buf)+n])
		buf, left = buf[:len(buf)+got], left-got
		if err != nil {
			return 0, cutShort(err, true)
		}
	}
	r.buf = buf
	return head, nil
}

// cutShort turns the end of a stream into an error, unless it is where a
// stream may end.
func cutShort(err error, inside bool) error {
	if err == io.EOF && inside {
		return io.ErrUnexpectedEOF
	}
	return err
}

// decode decodes the value that next has read into v. One that nobody wants, if
// v is nil, it leaves to nextHeader: only reading on shows where it ends.
func (r *gobReader) decode(v any) (err error) {
	if v == nil && !r.unread {
		r.unread = true
		return nil
	}
	defer func() {
		if err != nil {
			r.failed, r.last = true, true
		}
	}()
	defer recoverTo(&err)
	return r.dec.Decode(v)
}

// gobUint reads an unsigned integer at the beginning of b, as package gob
// documents it, and returns what follows it. It returns 0 if there is none.
func gobUint(b []byte) (n uint64, rest []byte) {
	if len(b) == 0 {
		return 0, nil
	}
	if b[0] <= 127 {
		return uint64(b[0]), b[1:]
	}
	size := -int(int8(b[0]))
	if size > 8 || size >= len(b) {
		return 0, nil
	}
	for _, c := range b[1 : 1+size] {
		n = n<<8 | uint64(c)
	}
	return n, b[1+size:]
}

// isDefinition reports whether a message without its length defines a type:
// then it begins with a negative type id.
func isDefinition(message []byte) bool {
	id, _ := gobUint(message)
	return id&1 == 1
}

// definitions returns those of the messages in b that define types.
func definitions(b []byte) []byte {
	var defs []byte
	for len(b) > 0 {
		size, rest := gobUint(b)
		if size > uint64(len(rest)) {
			break
		}
		if isDefinition(rest) {
			defs = append(defs, b[:len(b)-len(rest)+int(size)]...)
		}
		b = rest[size:]
	}
	return defs
}

// recoverTo turns a panic of the caller into its error.
func recoverTo(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("panic: %v", p)
	}
}
