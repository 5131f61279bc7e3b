package plugin

import (
	"errors"
	"io"
	"os"
	"time"
)

// This file is about the pipes between a host and the process of its plugin.

// outputPipe is a pipe to which the process writes, and from which the host reads. The system
// keeps what is in it when the process ends, however it does.
type outputPipe struct {
	reader *os.File
	writer *hostWriter   // gets the output
	to     io.Writer     // writer and others, whose Write must not wait
	done   chan struct{} // closed when there is no more output
}

func newOutputPipe(writer *hostWriter, others ...io.Writer) *outputPipe {
	to := io.MultiWriter(append(others, writer)...)
	return &outputPipe{writer: writer, to: to, done: make(chan struct{})}
}

// open opens the pipe and returns the end for the process.
func (p *outputPipe) open() (writer *os.File, err error) {
	p.reader, writer, err = os.Pipe()
	return writer, err
}

// copy copies the output until its end, or until finish is called.
func (p *outputPipe) copy() {
	defer close(p.done)
	p.writer.begin()
	defer p.writer.end()
	_, err := io.Copy(p.to, p.reader)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.drain()
	}
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
	p.writer.hurry()
	// A Read with such a deadline reads nothing, so copy then drains the pipe.
	err := p.reader.SetReadDeadline(time.Unix(1, 0))
	if err != nil { // as on Windows
		waitFor(drainTimeout, p.done)
		_ = p.reader.Close() // which ends the Read
	}
	<-p.done
}

// inputPipe is a pipe from which the process reads what is not a file.
type inputPipe struct {
	from           io.Reader
	reader, writer *os.File // the reader is for the process
}

func newInputPipe(from io.Reader) (*inputPipe, error) {
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	return &inputPipe{from: from, reader: reader, writer: writer}, nil
}

// copy copies the input until its end, or until the process has closed the pipe.
func (p *inputPipe) copy() {
	_, _ = io.Copy(p.writer, p.from) // fails if the process does not want it
	_ = p.writer.Close()
}
