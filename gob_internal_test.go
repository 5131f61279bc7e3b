package plugin

import (
	"bytes"
	"context"
	"encoding/gob"
	"io"
	"slices"
	"testing"
)

// writes keeps what each Write was called with.
type writes [][]byte

func (w *writes) Write(p []byte) (int, error) {
	*w = append(*w, bytes.Clone(p))
	return len(p), nil
}

// An encoder calls Write for each definition of a type, once, and then for the value. So
// defineLocked can undo the last Write, and nothing but the value is lost.
func TestGobWritesValueLast(t *testing.T) {
	type inner struct{ M map[string][]int }
	type outer struct {
		A inner
		B []inner
	}
	var sent writes
	enc := gob.NewEncoder(&sent)
	check(t, enc.Encode(outer{A: inner{M: map[string][]int{"undone": nil}}}))
	definitions := sent[:len(sent)-1]
	if len(definitions) < 4 {
		t.Fatalf("there are %d definitions", len(definitions))
	}
	check(t, enc.Encode(outer{A: inner{M: map[string][]int{"kept": {1}}}}))
	withoutFirst := slices.Delete(sent, len(definitions), len(definitions)+1)
	dec := gob.NewDecoder(bytes.NewReader(bytes.Join(withoutFirst, nil)))
	var got outer
	check(t, dec.Decode(&got))
	if len(got.A.M["kept"]) != 1 {
		t.Errorf("the value that was kept is %v", got)
	}
	if err := dec.Decode(&got); err != io.EOF {
		t.Errorf("another value, or %v", err)
	}
}

// A sender that waits for room goes on when the queue has been taken, even if others fill
// it again and again.
func TestWaitRoom(t *testing.T) {
	writing, written := make(chan bool), make(chan bool)
	conn := struct {
		io.ReadCloser
		io.Writer
	}{Writer: writerFunc(func(p []byte) (int, error) {
		writing <- true
		<-written
		return len(p), nil
	})}
	spawn := func(f func()) bool {
		go f() // ends below
		return true
	}
	w := newWire(conn, response{}, spawn)
	full := make([]byte, maxUnsent+1)
	check(t, w.send(&response{}, full))
	receive(t, "the first Write", writing)
	check(t, w.send(&response{}, full))
	waited := make(chan error)
	go func() { waited <- w.waitRoom(context.Background()) }() // ends below
	written <- true
	receive(t, "the second Write", writing) // which does not end before there is room
	check(t, receive(t, "room", waited))
	written <- true
	check(t, w.drain(context.Background()))
}

// writerFunc is a function as a writer.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
