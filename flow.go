package plugin

import (
	"encoding/binary"

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

// has reports whether h has one of the flags.
func (h *header) has(flags uint16) bool { return binary.BigEndian.Uint16(h[2:])&flags != 0 }

func appendDataHeader(b []byte, stream, length uint32) []byte {
	b = append(b, 0, frameData, 0, 0)
	b = binary.BigEndian.AppendUint32(b, stream)
	return binary.BigEndian.AppendUint32(b, length)
}

// flow is what frameConn knows about a stream, from its first frame to its last.
type flow struct {
	id      uint32
	window  uint32 // how many bytes may be sent
	unread  uint32 // how many bytes have arrived for Read
	opening bool   // this side has opened the stream, and the peer has not accepted it
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

// reserveLocked takes up to size bytes of what f may send, which may be nothing.
func (f *flow) reserveLocked(size int) (uint32, error) {
	if f.reset {
		return 0, yamux.ErrConnectionReset
	}
	if isClosed(f.finished) {
		return 0, yamux.ErrStreamClosed
	}
	n := uint32(min(int64(size), int64(f.window)))
	f.window -= n
	return n, nil
}
