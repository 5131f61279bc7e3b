package plugin

import (
	"io"
	"testing"
	"testing/synctest"
	"time"
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

// close waits for a Write whose data has been taken, even if the call has not begun, and for
// nothing else.
func TestCloseOfWriters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		open := newHostWriters(io.Discard, nil, nil)
		open.stdout.begin() // and no end
		open.close()
		if took := time.Since(began); took > 0 {
			t.Errorf("close without a Write took %v", took)
		}

		taken := newHostWriters(io.Discard, nil, nil)
		taken.stdout.pending = []byte("output")
		_ = taken.stdout.next() // as deliver, which has not called Write yet
		ended := make(chan struct{})
		go func() {
			taken.close()
			close(ended)
		}()
		synctest.Wait()
		if isClosed(ended) {
			t.Error("close has not waited for the Write")
		}
		_ = taken.stdout.next()
		receive(t, "the end of close", ended)
		if took := time.Since(began); took > 0 {
			t.Errorf("close went on for %v after the end of Write", took)
		}
	})
}
