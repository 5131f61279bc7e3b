// Package job is the work that the benchmark's plugins do over net/rpc. It
// knows no plugin library.
package job

import (
	"encoding/binary"
	"io"
	"net"
	"runtime"
)

// Args is the argument of a small call.
type Args struct {
	Name  string
	Value int
}

// Reply is the reply of a small call.
type Reply struct{ Sum int }

// Open tells a plugin what will be done with a stream.
type Open struct {
	ID  uint32
	Use string // see Use
}

// Service is what a plugin serves.
type Service struct {
	// Accept accepts a stream; nil where there are none.
	Accept func(id uint32) (net.Conn, error)
	// Serve accepts a stream and serves calls on it; nil where there are none.
	Serve func(id uint32, v any)
}

// Small is the small call.
func (s *Service) Small(in Args, out *Reply) error {
	out.Sum = in.Value + len(in.Name)
	return nil
}

// Echo returns what it is given.
func (s *Service) Echo(in []byte, out *[]byte) error { *out = in; return nil }

// Value is one of many. Gob encodes it as about 64 bytes, without its type.
type Value struct {
	N    int
	Text string
}

// NewValue returns the value with that number.
func NewValue(n int) Value {
	return Value{N: n, Text: "this text makes it as long as what is often sent in rows"}
}

// Value returns a value.
func (s *Service) Value(n int, out *Value) error {
	*out = NewValue(n)
	return nil
}

// Mallocs is how many objects the plugin has allocated so far.
func (s *Service) Mallocs(_ int, out *uint64) error { *out = Mallocs(); return nil }

// Mallocs is how many objects this process has allocated so far.
func Mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}

// Open makes the plugin accept a stream and use it, after it has returned.
func (s *Service) Open(in Open, _ *struct{}) error {
	go func() {
		if in.Use == Calls {
			s.Serve(in.ID, &Service{})
		} else if conn, err := s.Accept(in.ID); err == nil {
			Use(conn, in.Use)
		}
	}()
	return nil
}

// Chunk is how much is written to a stream at once.
const Chunk = 64 << 10

// What can be done with a stream, on the plugin's side. For Sink and Source
// the host sends first, in eight bytes, how much it will be.
const (
	Sink   = "sink" // read that much and answer with a byte
	Source = "fill" // write that much
	Pong   = "pong" // send the first message back
	Calls  = "rpc"  // serve calls

	// Values is a stream of gRPC, of so many values as the first message says.
	Values = "values"
)

// ByFirst returns the use with that first letter.
func ByFirst(letter byte) string {
	for _, use := range []string{Sink, Source, Pong, Calls} {
		if use[0] == letter {
			return use
		}
	}
	return ""
}

// Use uses a stream and closes it.
func Use(conn net.Conn, use string) {
	defer conn.Close()
	size := Chunk
	if use == Pong {
		size = 64 // enough for a message, and nothing to measure
	}
	buf := make([]byte, size)
	switch use {
	case Sink:
		if size, err := readSize(conn); err == nil && Read(conn, size, buf) == nil {
			_, _ = conn.Write(buf[:1])
		}
	case Source:
		if size, err := readSize(conn); err == nil {
			_ = Write(conn, size, buf)
		}
	case Pong:
		if n, err := conn.Read(buf); err == nil {
			_, _ = conn.Write(buf[:n])
		}
	}
}

func readSize(r io.Reader) (int64, error) {
	var size [8]byte
	_, err := io.ReadFull(r, size[:])
	return int64(binary.LittleEndian.Uint64(size[:])), err
}

// Write writes size bytes, in pieces like buf, whose length size is a multiple of.
func Write(w io.Writer, size int64, buf []byte) error {
	for ; size > 0; size -= int64(len(buf)) {
		if _, err := w.Write(buf); err != nil {
			return err
		}
	}
	return nil
}

// Read reads size bytes.
func Read(r io.Reader, size int64, buf []byte) error {
	for size > 0 {
		n, err := r.Read(buf[:min(size, int64(len(buf)))])
		size -= int64(n)
		if err != nil && size > 0 {
			return err
		}
	}
	return nil
}
