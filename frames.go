package plugin

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
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
//     for a channel, and call yamux for what it certainly has.
//
// So frameConn reads the header of each frame that passes, and keeps in a flow how much a
// stream may send and how much of it can be read. This is right for these reasons:
//
//   - yamux sends only frames without a body: window updates, which also open, acknowledge,
//     close and reset streams, pings, and the end of the session. Each is one call of
//     frameConn.Write. This file sends data without flags, and nothing else.
//   - yamux calls frameConn.Read in one goroutine, and only when it has handled every frame
//     that Read has returned. So at the next call of Read, a flow gets what these frames say.
//   - Whoever writes to the connection holds the turn, and writes whole frames: those in the
//     queue first, then its own. What yamux sends is queued. So a stream is opened before its
//     data is sent. It is closed behind its data, because finish is called before yamux
//     queues the end, and no data is sent after finish.
//   - Only a Write of data waits for the connection, and one that waits for its turn can be
//     interrupted. yamux never waits here. So neither does who reads, opens, accepts or
//     closes a stream. A peer that lets the queue grow above its limit loses the connection.
//
// An error of writing is not returned: the peer is gone, but data from it may not have
// been read. The session ends when reading ends, which has a limit from then on.

const (
	streamWindow = 1 << 20 // how many bytes a stream holds that have not been read
	socketBuffer = 1 << 20 // the size of the system's send buffer
	maxJoined    = 4 << 10 // the longest body that is copied behind its header
	maxQueue     = 1 << 20 // how many bytes may be queued; maxStreams ends are fewer
	maxOpening   = 256     // how many opened streams may wait to be accepted, as in go-plugin
	maxPings     = 1 << 14 // how many pings yamux may be answering
	// lastTimeout limits reading after an error of writing, and writing the queue when
	// a session is closed.
	lastTimeout = 250 * time.Millisecond
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
	header  header
	have    int      // how many bytes of the header have been read
	body    uint32   // how many bytes of the body have not been read
	handled []header // frames that yamux has handled when it calls Read again
	err     error    // for the next Read
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
	c.updateFlows()
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.conn.Read(p)
	if n == 0 {
		return 0, err
	}
	c.received.Store(true)
	c.err = err // after these bytes
	for rest := p[:n]; len(rest) > 0; {
		parsed, err := c.parse(rest)
		if err != nil {
			return 0, err
		}
		rest = rest[parsed:]
	}
	return n, nil
}

// parse reads a header or a body, or a piece of one, and returns its length.
func (c *frameConn) parse(b []byte) (int, error) {
	if c.body > 0 {
		n := min(c.body, uint32(len(b)))
		c.body -= n
		if c.body == 0 {
			c.handled = append(c.handled, c.header)
		}
		return int(n), nil
	}
	n := copy(c.header[c.have:], b)
	c.have += n
	if c.have < len(c.header) {
		return n, nil
	}
	c.have = 0
	if c.header.kind() == frameData {
		c.body = c.header.length()
	}
	if c.body == 0 {
		c.handled = append(c.handled, c.header)
	}
	if c.header.kind() == framePing && c.pings.Add(1) > maxPings {
		return 0, errors.New("plugin: the peer sends pings and reads no answers")
	}
	if c.header.ofStream() && c.header.has(flagSYN) {
		// At once: the stream is accepted while yamux handles the frames.
		c.openFlow(c.header.stream())
	}
	return n, nil
}

func (c *frameConn) openFlow(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flows[id] == nil {
		c.flows[id] = newFlow(id)
	}
}

// updateFlows tells the flows what yamux has handled.
func (c *frameConn) updateFlows() {
	if len(c.handled) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.handled {
		h := &c.handled[i]
		f := c.flows[h.stream()]
		if f == nil || !h.ofStream() {
			continue
		}
		f.receivedLocked(h)
		if h.has(flagACK) {
			c.openedLocked(f)
		}
		c.forgetLocked(f)
	}
	c.handled = c.handled[:0]
}

// openedLocked ends the opening of a stream by this side.
func (c *frameConn) openedLocked(f *flow) {
	if f.opening {
		f.opening = false
		<-c.opening // does not wait
	}
}

// forgetLocked drops f if its stream has ended.
func (c *frameConn) forgetLocked(f *flow) {
	if f.hasEndedLocked() {
		c.openedLocked(f)
		delete(c.flows, f.id)
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

// take takes up to size bytes from what yamux has for a Read, which may be nothing.
func (c *frameConn) take(f *flow, size int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.takeLocked(size)
}

// ---- What is sent ----

// Write queues a frame of yamux.
func (c *frameConn) Write(p []byte) (int, error) {
	h := header(p)
	if h.kind() == framePing {
		c.pings.Add(-1)
	}
	if size := c.queueFrame(&h); size > maxQueue {
		_ = c.conn.Close() // the peer does not read
	}
	return len(p), nil
}

// queueFrame queues a frame without a body, and returns the size of the queue.
func (c *frameConn) queueFrame(h *header) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.ofStream() {
		c.announceLocked(h)
	}
	c.queueLocked(h[:])
	return len(c.queue)
}

// announceLocked tells a flow what the peer is told.
func (c *frameConn) announceLocked(h *header) {
	f := c.flows[h.stream()]
	if f == nil && h.has(flagSYN) {
		f = newFlow(h.stream())
		f.opening = true
		c.flows[f.id] = f
	}
	if f == nil {
		return
	}
	f.sentLocked(h)
	c.forgetLocked(f)
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
		_ = c.turn.lock(context.Background()) // who holds it ends with the connection
		c.mu.Lock()
		c.takeQueueLocked()
		c.mu.Unlock()
		c.writeLocked(nil)
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
		return errors.New("the peer leaves no room for its number")
	}
	c.queueLocked(append(appendDataHeader(nil, f.id, n), p...))
	return nil
}

// sendLocked sends as much of p as the peer has room for, which may be nothing. The
// caller holds the turn. The end of the connection ends sendLocked, and nothing else does.
func (c *frameConn) sendLocked(f *flow, p []byte) (int, error) {
	c.mu.Lock()
	n, err := f.reserveLocked(len(p))
	if n == 0 {
		c.mu.Unlock()
		return 0, err
	}
	c.takeQueueLocked()
	c.mu.Unlock()
	c.buffer = appendDataHeader(c.buffer, f.id, n)
	if n <= maxJoined {
		c.buffer = append(c.buffer, p[:n]...)
		c.writeLocked(nil)
	} else {
		c.writeLocked(p[:n])
	}
	return int(n), nil
}

// takeQueueLocked moves the queue into the buffer. The caller holds the turn, too.
func (c *frameConn) takeQueueLocked() {
	c.buffer = append(c.buffer[:0], c.queue...)
	c.queue = c.queue[:0]
}

// writeLocked writes the buffer and then body, if possible in one system call. The caller
// holds the turn.
func (c *frameConn) writeLocked(body []byte) {
	if c.broken || len(c.buffer) == 0 {
		return
	}
	var err error
	if body == nil {
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
	if !ok || conn.SetReadDeadline(time.Now().Add(lastTimeout)) != nil {
		_ = c.conn.Close()
	}
}
