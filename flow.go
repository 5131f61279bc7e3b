package plugin

import (
	"encoding/binary"
	"io"
	"math"

	"github.com/hashicorp/yamux"
)

// This file is about what the frames of a stream say: how much the stream may send, how
// much of it can be read, and whether it has ended. frameConn guards it.

// header is the header of a frame: version, type, flags (2 bytes), stream (4), length or
// window (4).
type header [12]byte

const (
	frameData   = 0
	frameWindow = 1
	framePing   = 2

	flagSYN = 1
	flagACK = 2
	flagFIN = 4
	flagRST = 8

	firstWindow = 256 << 10 // of a new stream
)

func (h *header) kind() byte     { return h[1] }
func (h *header) stream() uint32 { return binary.BigEndian.Uint32(h[4:]) }
func (h *header) length() uint32 { return binary.BigEndian.Uint32(h[8:]) }

func (h *header) has(flag uint16) bool { return binary.BigEndian.Uint16(h[2:])&flag != 0 }

// ofStream reports whether the frame belongs to a stream.
func (h *header) ofStream() bool { return h.kind() <= frameWindow }

func appendDataHeader(b []byte, stream, length uint32) []byte {
	b = append(b, 0, frameData, 0, 0)
	b = binary.BigEndian.AppendUint32(b, stream)
	return binary.BigEndian.AppendUint32(b, length)
}

// flow is what frameConn knows about a stream, from its first frame to its last.
type flow struct {
	id      uint32
	window  uint32 // how many bytes may be sent
	unread  uint32 // how many bytes yamux has for Read
	opening bool   // this side has opened the stream, and the peer has not accepted it
	told    bool   // the peer has been told that this side is closed
	reset   bool   // one side has reset the stream

	readable chan struct{} // holds one if Read should look again
	writable chan struct{} // holds one if Write should look again
	finished chan struct{} // closed when this side sends no more data
	gone     chan struct{} // closed when the peer has closed or reset the stream
}

func newFlow(id uint32) *flow {
	return &flow{
		id:       id,
		window:   firstWindow,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		finished: make(chan struct{}),
		gone:     make(chan struct{}),
	}
}

// notify makes ch, which has room for one, hold one.
func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// receivedLocked updates f by a frame that yamux has handled.
func (f *flow) receivedLocked(h *header) {
	if h.kind() == frameData {
		f.unread += h.length()
		notify(f.readable)
	} else {
		f.window += h.length()
		notify(f.writable)
	}
	if h.has(flagRST) {
		f.resetLocked()
	}
	if h.has(flagFIN) || h.has(flagRST) {
		f.goneLocked()
	}
}

// sentLocked updates f by a frame that yamux sends.
func (f *flow) sentLocked(h *header) {
	if h.has(flagFIN) {
		f.told = true
	}
	if h.has(flagRST) {
		f.resetLocked()
	}
}

func (f *flow) goneLocked() {
	if !isClosed(f.gone) {
		close(f.gone)
	}
	notify(f.readable)
}

func (f *flow) resetLocked() {
	f.reset = true
	notify(f.readable)
	notify(f.writable)
}

// hasEndedLocked reports whether no frame of the stream will come or go.
func (f *flow) hasEndedLocked() bool {
	return f.reset || f.told && isClosed(f.gone)
}

// takeLocked takes up to size bytes from unread, which may be nothing.
func (f *flow) takeLocked(size int) (int, error) {
	n := min(uint32(min(size, math.MaxInt32)), f.unread)
	f.unread -= n
	if f.unread > 0 || f.reset || isClosed(f.gone) {
		notify(f.readable) // for another Read
	}
	if f.reset {
		return 0, yamux.ErrConnectionReset
	}
	if n == 0 && isClosed(f.gone) {
		return 0, io.EOF
	}
	return int(n), nil
}

// reserveLocked takes up to size bytes of what f may send, which may be nothing.
func (f *flow) reserveLocked(size int) (uint32, error) {
	if f.reset {
		return 0, yamux.ErrConnectionReset
	}
	if isClosed(f.finished) {
		return 0, yamux.ErrStreamClosed
	}
	n := min(uint32(min(size, math.MaxInt32)), f.window)
	f.window -= n
	return n, nil
}
