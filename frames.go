package plugin

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// This file is the connection below yamux. Frames travel on it as described in
// https://github.com/hashicorp/yamux/blob/master/spec.md.
//
// yamux opens, numbers and closes the streams, checks what arrives, keeps data until it is
// read, and grants the peer room for more. Two things of yamux are not used:
//
//   - Sending data. yamux copies it, starts a timer, and has another goroutine write it in
//     two pieces. Here, the caller of Write writes it in one piece.
//   - Waiting for data. When a session ends, all Reads that wait in yamux spin until yamux
//     has closed their streams, which takes minutes if there are thousands. Here, they wait
//     for a channel, and call yamux for what has arrived.
//
// So frameConn reads the header of each frame that passes, and keeps in a flow how much a
// stream may send and how much of it can be read. Flows stay correct because:
//
//   - yamux sends only frames without a body: window updates, which also open, acknowledge,
//     close and reset streams, pings, and the end of the session. Each is one call of
//     frameConn.Write. This file sends data without flags, and nothing else.
//   - A flow is updated when the last byte of a frame has been read, just before yamux
//     handles the frame. yamux handles it without reading again. So a Read that takes what
//     its flow counts may wait for yamux to catch up, but not for the peer. One exception:
//     while half of the stream's next frame has arrived, yamux holds a lock that the Read
//     needs. A peer that stops there blocks the Read.
//   - Whoever writes to the connection holds the turn, and writes whole frames: those in the
//     queue first, then its own. What yamux sends is queued. So a stream is opened before its
//     data is sent. It is closed after its data, because finish is called before yamux
//     queues the end, and no data is sent after finish.
//   - Only a Write of data waits for the connection, and one that waits for its turn can be
//     interrupted. yamux never waits here. So reading, opening, accepting and closing a stream
//     do not wait for the connection, either. A peer that lets the queue grow above its limit loses the connection.
//
// An error of writing is not returned: the peer is gone, but data from it may not have
// been read. The session ends when reading ends, which has a limit from then on.

const (
	streamWindow    = 1 << 20 // how many bytes a stream holds that have not been read
	socketBuffer    = 1 << 20 // the size of the system's send buffer
	maxJoined       = 4 << 10 // the longest body that is copied behind its header
	maxControlQueue = 1 << 20 // how many bytes may be queued: more than closing maxStreams takes
	maxOpening      = 256     // how many opened streams may wait to be accepted, as in go-plugin
	maxPings        = 1 << 14 // how many pings yamux may be answering
	// flushTimeout limits reading after an error of writing, and writing the queue when
	// a session is closed.
	flushTimeout = 250 * time.Millisecond
)

// frameConn is the connection of a session. Its methods Read, Write and Close are for yamux.
type frameConn struct {
	conn     io.ReadWriteCloser
	received atomic.Bool  // the peer has sent something
	pings    atomic.Int32 // received and not answered: yamux has a goroutine for each

	turn   lock   // of who writes; guards the fields below
	broken bool   // nothing can be written any more
	buffer []byte // what is written

	mu     sync.Mutex // guards the fields below, and each flow
	flows  map[uint32]*flow
	queue  []byte // frames to be written
	closed bool   // nothing is queued any more

	opening chan struct{} // holds one for each flow that is opening
	queued  chan struct{} // holds one if something has been queued
	flushed chan struct{} // closed when the queue has been closed and written

	// The state of Read:
	header header
	have   int    // how many bytes of the header have been read
	body   uint32 // how many bytes of the body have not been read
}

func newFrameConn(conn io.ReadWriteCloser) *frameConn {
	return &frameConn{
		conn:    conn,
		turn:    newLock(),
		flows:   make(map[uint32]*flow),
		opening: make(chan struct{}, maxOpening),
		queued:  make(chan struct{}, 1),
		flushed: make(chan struct{}),
	}
}

// ---- What arrives ----

// Read reads for yamux.
func (c *frameConn) Read(p []byte) (int, error) {
	n, err := c.conn.Read(p)
	if n == 0 {
		return 0, err
	}
	c.received.Store(true)
	if err := c.parse(p[:n]); err != nil {
		return 0, err
	}
	return n, nil // an error of reading comes again
}

// parse follows the frames of which b is a part.
func (c *frameConn) parse(b []byte) error {
	for len(b) > 0 {
		if c.body == 0 {
			n := copy(c.header[c.have:], b)
			c.have += n
			b = b[n:]
			if c.have < len(c.header) {
				return nil
			}
			c.have = 0
			if c.header.kind() == frameData {
				c.body = c.header.length()
			}
		}
		n := min(c.body, uint32(len(b)))
		c.body -= n
		b = b[n:]
		if c.body > 0 {
			return nil
		}
		if c.header.kind() == framePing && c.pings.Add(1) > maxPings {
			return errors.New("plugin: the peer sends more pings than can be answered")
		}
		c.frameReceived(&c.header)
	}
	return nil
}

// frameReceived updates the flow of a frame that has arrived.
func (c *frameConn) frameReceived(h *header) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flowLocked(h)
	if f == nil {
		return
	}
	if h.kind() == frameData {
		f.unread += h.length()
	} else {
		f.window += h.length()
	}
	if h.has(flagACK) {
		c.openedLocked(f)
	}
	f.reset = f.reset || h.has(flagRST)
	if h.has(flagFIN|flagRST) && !isClosed(f.gone) {
		close(f.gone)
	}
	notify(f.readable)
	notify(f.writable)
	c.forgetLocked(f)
}

// flowLocked returns the flow of a frame, which is new if the frame opens a stream. It
// returns nil if there is none.
func (c *frameConn) flowLocked(h *header) *flow {
	if h.kind() > frameWindow { // a ping, or the end of the session
		return nil
	}
	f := c.flows[h.stream()]
	if f == nil && h.has(flagSYN) {
		f = newFlow(h.stream())
		c.flows[f.id] = f
	}
	return f
}

// forgetLocked drops f if its stream has ended.
func (c *frameConn) forgetLocked(f *flow) {
	if f.reset || isClosed(f.finished) && isClosed(f.gone) {
		c.openedLocked(f)
		delete(c.flows, f.id)
	}
}

// openedLocked ends the opening of a stream by this side.
func (c *frameConn) openedLocked(f *flow) {
	if f.opening {
		f.opening = false
		<-c.opening // does not wait
	}
}

// flow returns the flow of a stream that yamux has opened or accepted.
func (c *frameConn) flow(id uint32) *flow {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flows[id]
	if f == nil { // the stream has ended
		f = newFlow(id)
		f.reset = true
		close(f.gone)
	}
	return f
}

// take takes up to size bytes from what has arrived for a Read, which may be nothing.
func (c *frameConn) take(f *flow, size int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(size, int(f.unread))
	switch {
	case f.reset:
		return 0, yamux.ErrConnectionReset
	case f.unread == 0 && isClosed(f.gone):
		return 0, io.EOF
	}
	f.unread -= uint32(n)
	return n, nil
}

// ---- What is sent ----

// Write queues a frame of yamux.
func (c *frameConn) Write(p []byte) (int, error) {
	h := header(p)
	if h.kind() == framePing {
		c.pings.Add(-1) // only answers: this side sends no pings
	}
	c.mu.Lock()
	if f := c.flowLocked(&h); f != nil {
		f.opening = f.opening || h.has(flagSYN)
		f.reset = f.reset || h.has(flagRST)
		c.forgetLocked(f)
	}
	c.queueLocked(p)
	full := len(c.queue) > maxControlQueue
	c.mu.Unlock()
	if full {
		_ = c.conn.Close() // the peer does not read
	}
	return len(p), nil
}

// queueLocked queues a frame, unless closeQueue has been called.
func (c *frameConn) queueLocked(frame []byte) {
	if c.closed {
		return
	}
	c.queue = append(c.queue, frame...)
	notify(c.queued)
}

// writeQueue writes what is queued, until closeQueue or Close is called.
func (c *frameConn) writeQueue() {
	defer close(c.flushed)
	for range c.queued {
		<-c.turn // who has it gives it back, at the latest at the end of the connection
		c.mu.Lock()
		c.takeQueueLocked()
		c.mu.Unlock()
		c.writeInTurn(nil)
		c.turn.unlock()
	}
}

// closeQueue ends the queue. When it has been written, flushed is closed.
func (c *frameConn) closeQueue() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		close(c.queued)
	}
}

// Close closes the connection.
func (c *frameConn) Close() error {
	c.closeQueue()
	return c.conn.Close()
}

// finish ends the sending of data.
func (c *frameConn) finish(f *flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !isClosed(f.finished) {
		close(f.finished)
		c.forgetLocked(f)
	}
}

// queueData queues p, which is short. It fails if the peer has no room for it now.
func (c *frameConn) queueData(f *flow, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := f.reserveLocked(len(p))
	if err != nil {
		return err
	}
	if n < uint32(len(p)) {
		return errors.New("the peer leaves no room for what is to be sent")
	}
	c.queueLocked(append(appendDataHeader(nil, f.id, n), p...))
	return nil
}

// sendInTurn sends as much of p as the peer has room for, which may be nothing. The caller
// holds the turn. Only the end of the connection ends a sendInTurn that is blocked.
func (c *frameConn) sendInTurn(f *flow, p []byte) (int, error) {
	c.mu.Lock()
	n, err := f.reserveLocked(len(p))
	if n == 0 {
		c.mu.Unlock()
		return 0, err
	}
	c.takeQueueLocked()
	c.mu.Unlock()
	c.buffer = appendDataHeader(c.buffer, f.id, n)
	c.writeInTurn(p[:n])
	return int(n), nil
}

// takeQueueLocked moves the queue into the buffer. The caller holds the turn, too.
func (c *frameConn) takeQueueLocked() {
	c.buffer = append(c.buffer[:0], c.queue...)
	c.queue = c.queue[:0]
}

// writeInTurn writes the buffer and then body, if possible in one system call. The caller
// holds the turn.
func (c *frameConn) writeInTurn(body []byte) {
	if c.broken || len(c.buffer) == 0 {
		return
	}
	var err error
	if len(body) <= maxJoined {
		c.buffer = append(c.buffer, body...)
		_, err = c.conn.Write(c.buffer)
	} else {
		pieces := net.Buffers{c.buffer, body}
		_, err = pieces.WriteTo(c.conn)
	}
	if err != nil {
		c.broken = true
		c.limitReading()
	}
}

// limitReading ends reading in a moment.
func (c *frameConn) limitReading() {
	conn, ok := c.conn.(interface{ SetReadDeadline(time.Time) error })
	// Files have this method, but it may fail.
	if !ok || conn.SetReadDeadline(time.Now().Add(flushTimeout)) != nil {
		_ = c.conn.Close()
	}
}
