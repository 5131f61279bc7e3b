package plugin

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	streamWindow = 1 << 20 // how many bytes a stream holds that have not been read
	socketBuffer = 1 << 20 // the size of the system's send buffer
	maxJoined    = 4 << 10 // the longest body that is copied behind its header
	maxPings     = 1 << 14 // how many pings may wait for room for their answers
	// lastTimeout limits reading after an error of writing, and the writing of the
	// ends of streams when a session is closed.
	lastTimeout = 250 * time.Millisecond
)

// frameConn is the connection below yamux. yamux manages the streams and handles what
// arrives. Data is written here directly, because yamux copies it, starts a timer, and
// lets another goroutine write it in two pieces. So frameConn reads the frames that pass
// to know how much each stream may send. The frames are described in
// https://github.com/hashicorp/yamux/blob/master/spec.md.
//
// An error of writing is not returned: the peer is gone, but data from it may not have
// been read. The session ends when reading ends, which has a limit from then on.
type frameConn struct {
	conn  io.ReadWriteCloser
	pings atomic.Int32 // received and not answered: yamux has a goroutine for each
	heard atomic.Bool  // something has been received

	writing sync.Mutex // serialises writers; guards the fields below
	broken  bool       // nothing can be written any more
	frame   []byte     // a buffer for writing

	mu    sync.Mutex // guards flows and each flow
	flows map[uint32]*flow

	// The state of the one reader:
	header [frameHeader]byte
	have   int    // how many bytes of the header have been read
	body   uint32 // how many bytes of the body have not been read
}

// flow is the sending side of a stream. It exists from the first frame of the stream to
// the last.
type flow struct {
	window   uint32        // how many bytes may be sent
	received bool          // the peer has closed its side
	finished bool          // this side is closed
	sent     bool          // the peer has been told so
	reset    bool          // the stream was reset
	changed  chan struct{} // holds one if a field has changed
}

const (
	frameHeader = 12 // version, type, flags (2), stream (4), length or window (4)
	firstWindow = 256 << 10

	frameData   = 0
	frameWindow = 1
	framePing   = 2

	flagSYN = 1
	flagFIN = 4
	flagRST = 8
)

// Read reads for yamux.
func (c *frameConn) Read(p []byte) (int, error) {
	n, err := c.conn.Read(p)
	if n > 0 {
		c.heard.Store(true)
	}
	for b := p[:n]; len(b) > 0; {
		if c.body > 0 {
			inside := min(c.body, uint32(len(b)))
			c.body -= inside
			b = b[inside:]
			continue
		}
		more := copy(c.header[c.have:], b)
		c.have += more
		b = b[more:]
		if c.have == frameHeader {
			c.have = 0
			c.pass(c.header[:], true)
			switch c.header[1] {
			case frameData:
				c.body = binary.BigEndian.Uint32(c.header[8:])
			case framePing:
				if c.pings.Add(1) > maxPings {
					return 0, errors.New("plugin: the peer sends pings and reads no answers")
				}
			}
		}
	}
	return n, err
}

// Write writes a frame for yamux, which has no body.
func (c *frameConn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if p[1] == framePing {
		c.pings.Add(-1)
	}
	c.pass(p, false)
	c.send(p, nil)
	return len(p), nil
}

func (c *frameConn) Close() error { return c.conn.Close() }

// pass updates the flow of a frame.
func (c *frameConn) pass(header []byte, received bool) {
	flags := binary.BigEndian.Uint16(header[2:])
	id := binary.BigEndian.Uint32(header[4:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if header[1] > frameWindow { // a ping, or the end of the session
		return
	}
	f := c.flows[id]
	if f == nil && flags&flagSYN != 0 {
		f = &flow{window: firstWindow, changed: make(chan struct{}, 1)}
		c.flows[id] = f
	}
	if f == nil || received && header[1] == frameData && flags == 0 {
		return
	}
	if received && header[1] == frameWindow {
		f.window += binary.BigEndian.Uint32(header[8:])
	}
	f.received = f.received || received && flags&flagFIN != 0
	f.sent = f.sent || !received && flags&flagFIN != 0
	f.reset = f.reset || flags&flagRST != 0
	if f.reset || f.sent && f.received {
		delete(c.flows, id)
	}
	f.signal()
}

// hasEnded reports whether the peer has closed its side.
func (c *frameConn) hasEnded(f *flow) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.received
}

// finish closes this side.
func (c *frameConn) finish(f *flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.finished = true
	f.signal()
}

// signal wakes a Write that waits for a change.
func (f *flow) signal() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// flow returns the flow of a stream.
func (c *frameConn) flow(id uint32) *flow {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flows[id]; f != nil {
		return f
	}
	return &flow{reset: true, changed: make(chan struct{}, 1)} // the stream has ended
}

// reserve takes up to size bytes of what f may send.
func (c *frameConn) reserve(f *flow, size int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case f.reset:
		return 0, yamux.ErrConnectionReset
	case f.finished:
		return 0, yamux.ErrStreamClosed
	}
	n := min(uint32(min(size, math.MaxInt32)), f.window)
	f.window -= n
	return int(n), nil
}

// sendData sends as much of p as the window allows, which may be nothing.
func (c *frameConn) sendData(id uint32, f *flow, p []byte) (int, error) {
	if _, err := c.reserve(f, 0); err != nil {
		return 0, err // without waiting for other writers
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	n, err := c.reserve(f, len(p))
	if n == 0 {
		return 0, err
	}
	c.frame = append(c.frame[:0], 0, frameData, 0, 0)
	c.frame = binary.BigEndian.AppendUint32(c.frame, id)
	c.frame = binary.BigEndian.AppendUint32(c.frame, uint32(n))
	if n <= maxJoined {
		c.frame = append(c.frame, p[:n]...)
		c.send(c.frame, nil)
	} else {
		c.send(c.frame, p[:n])
	}
	return n, nil
}

// send writes a frame, if possible in one system call.
func (c *frameConn) send(header, body []byte) {
	if c.broken {
		return
	}
	var err error
	if body == nil {
		_, err = c.conn.Write(header)
	} else {
		pieces := net.Buffers{header, body}
		_, err = pieces.WriteTo(c.conn)
	}
	if err == nil {
		return
	}
	c.broken = true
	// Files have this method, but it may fail.
	d, ok := c.conn.(interface{ SetReadDeadline(time.Time) error })
	if !ok || d.SetReadDeadline(time.Now().Add(lastTimeout)) != nil {
		_ = c.conn.Close()
	}
}
