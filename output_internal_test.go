package plugin

import (
	"io"
	"testing"
)

// shortWriter counts its calls, and fails.
type shortWriter struct{ calls *int }

func (w shortWriter) Write([]byte) (int, error) {
	*w.calls++
	return 2, io.ErrShortWrite
}

// A writer that fails is not used again, and the output goes on.
func TestHostWriter(t *testing.T) {
	calls := 0
	w := newHostWriter(shortWriter{&calls})
	for range 3 {
		_, _ = w.Write([]byte("output"))
		w.await(t.Context())
		if n, err := w.Write([]byte("output")); n != 6 || err != nil || calls != 1 {
			t.Errorf("Write returned %d, %v, after %d calls", n, err, calls)
		}
	}
}
