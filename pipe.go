package plugin

// This file is about the pipes to which the process of a plugin writes, and from which the
// host reads. The system keeps what is in them when the process ends, however it does.

import (
	"errors"
	"io"
	"os"
	"slices"
	"time"
)

// processPipes are the pipes of one process.
type processPipes struct {
	writers *hostWriters
	own     [2]*outputPipe // its stdout and stderr
	served  [2]*outputPipe // os.Stdout and os.Stderr while it serves; nil if it sends that
}

// openOwn opens the pipes for stdout and stderr of the process.
func (p *processPipes) openOwn(stdout, stderr, tail io.Writer) (err error) {
	p.own[0], err = newOutputPipe(stdout)
	if err != nil {
		return err
	}
	p.own[1], err = newOutputPipe(io.MultiWriter(tail, p.writers.process, stderr))
	return err
}

// openServed opens the pipes for os.Stdout and os.Stderr.
func (p *processPipes) openServed(tail io.Writer) (err error) {
	p.served[0], err = newOutputPipe(p.writers.stdout)
	if err != nil {
		return err
	}
	p.served[1], err = newOutputPipe(io.MultiWriter(tail, p.writers.stderr))
	return err
}

// opened returns the pipes that are open.
func (p *processPipes) opened() []*outputPipe {
	all := slices.Concat(p.own[:], p.served[:])
	return slices.DeleteFunc(all, func(pipe *outputPipe) bool { return pipe == nil })
}

// copy starts to copy the output. The goroutines end at its end, or with finish.
func (p *processPipes) copy() {
	go p.own[0].copy()
	go p.own[1].copyFor(p.writers.process)
	if p.served[0] != nil {
		go p.served[0].copyFor(p.writers.stdout)
		go p.served[1].copyFor(p.writers.stderr)
	}
}

// awaitServed waits until the process has left the pipes for os.Stdout and os.Stderr. A
// child of the plugin may hold them, so there is a limit.
func (p *processPipes) awaitServed() {
	if p.served[0] != nil {
		waitFor(drainTimeout, p.served[0].done, p.served[1].done)
	}
}

// finish brings the output to its end when the process has ended.
func (p *processPipes) finish() {
	p.writers.hurry()
	for _, pipe := range p.opened() {
		pipe.finish()
	}
}

// closeWriters closes the ends that the process has.
func (p *processPipes) closeWriters() {
	for _, pipe := range p.opened() {
		_ = pipe.writer.Close() // nothing was written
	}
}

// close closes the ends that the host has.
func (p *processPipes) close() {
	for _, pipe := range p.opened() {
		_ = pipe.reader.Close() // it may be closed
	}
}

// outputPipe is one pipe.
type outputPipe struct {
	reader *os.File
	writer *os.File      // for the process
	to     io.Writer     // gets the output; its Write must not wait when the process has ended
	done   chan struct{} // closed when there is no more output
}

func newOutputPipe(to io.Writer) (*outputPipe, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	return &outputPipe{reader: r, writer: w, to: to, done: make(chan struct{})}, nil
}

// copy copies the output until its end, or until finish is called.
func (p *outputPipe) copy() {
	defer close(p.done)
	_, err := io.Copy(p.to, p.reader)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.drain()
	}
}

// copyFor is copy for a hostWriter that gets the output.
func (p *outputPipe) copyFor(w *hostWriter) {
	w.begin()
	p.copy()
	w.end()
}

// drain copies what is in the pipe, without waiting for more. A child of the plugin may
// write on, so there is a limit, which is above what a pipe can hold.
func (p *outputPipe) drain() {
	_ = p.reader.SetReadDeadline(time.Time{}) // it has been set before
	buf := make([]byte, 32<<10)
	for left := 2 << 20; left > 0; {
		n := readNow(p.reader, buf)
		if n == 0 {
			return
		}
		_, _ = p.to.Write(buf[:n]) // never fails
		left -= n
	}
}

// finish ends the copying when the process has ended. It does not wait for the end of the
// output: a child of the plugin may hold the pipe open.
func (p *outputPipe) finish() {
	// A Read with such a deadline reads nothing, so copy then drains the pipe.
	err := p.reader.SetReadDeadline(time.Unix(1, 0))
	if err != nil { // as on Windows
		waitFor(drainTimeout, p.done)
		_ = p.reader.Close() // which ends the Read
	}
	<-p.done
	_ = p.reader.Close() // it may be closed
}
