package plugin

import (
	"bytes"
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
