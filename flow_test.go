package plugin

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

// flowFile is a connection like a file that knows no deadlines: nothing can be
// written to it any more, and nothing comes from it.
type flowFile struct {
	once   sync.Once
	closed chan struct{}
}

func (f *flowFile) Read([]byte) (int, error)        { <-f.closed; return 0, os.ErrClosed }
func (f *flowFile) Write([]byte) (int, error)       { return 0, errCallsFault }
func (f *flowFile) Close() error                    { f.once.Do(func() { close(f.closed) }); return nil }
func (f *flowFile) SetReadDeadline(time.Time) error { return os.ErrNoDeadline }

// A connection that can be written to no more ends, also where it has deadlines
// in name only.
func TestFlowNoDeadlines(t *testing.T) {
	client, err := NewRPCClient(&flowFile{closed: make(chan struct{})}, callsPlugins())
	if err != nil {
		return
	}
	defer client.session.close()
	callsGet(t, "a call", callsGo(func() error { return client.ping(context.Background()) }))
}

// Dial knows a bound also towards a peer that answers pings and takes no streams.
func TestFlowDialIsBounded(t *testing.T) {
	b, _ := callsRaw(t) // never accepts
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for id := range uint32(256) {
		all.Go(func() { _, _ = b.DialContext(ctx, id) })
	}
	callsSoon(t, "all were opened", func() bool { return b.session.mux.NumStreams() == 256 })
	cancel()
	all.Wait()
	dialled := callsGo(func() error { _, err := b.Dial(1000); return err })
	if err := callsGet(t, "Dial", dialled); !errors.Is(err, context.DeadlineExceeded) {
		t.Error("Dial failed with", err)
	}
}

// Accepting ends with its context also when the answer may not be sent.
func TestFlowAcceptIsBounded(t *testing.T) {
	a, c := TestConn(t)
	b := callsBroker(t, a, true)
	go io.Copy(io.Discard, c)
	const none = 1<<32 - firstWindow // takes the first window away
	_, _ = c.Write(append(callsFrame(frameWindow, flagSYN, 2, none), callsFrame(frameData, 0, 2, 4, callsID(7)...)...))
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	accepting := callsGo(func() error { _, err := b.AcceptContext(ctx, 7); return err })
	if err := callsGet(t, "AcceptContext", accepting); err == nil {
		t.Error("it ended with", err)
	}
}

// The account agrees with that of a stock peer after any traffic.
func TestFlowAccount(t *testing.T) {
	for seed := range int64(5) {
		b, st, raw := rawStream(t)
		r := rand.New(rand.NewSource(seed))
		const total = 3 << 20
		data := callsData(total)
		both := []<-chan error{
			callsGo(func() error {
				for left := data; len(left) > 0; {
					n := min(len(left), 1+r.Intn(400<<10)>>r.Intn(16))
					if _, err := st.Write(left[:n]); err != nil {
						return err
					}
					left = left[n:]
				}
				return nil
			}),
			callsGo(func() error { _, err := raw.Write(data); return err }),
			callsGo(func() error { return flowExpect(raw, data, seed) }),
			callsGo(func() error { return flowExpect(st, data, seed+100) }),
		}
		for _, done := range both {
			if err := callsGet(t, "the traffic", done); err != nil {
				t.Fatal(err)
			}
		}
		// Everything has been read, so the peer has less than half of its window
		// yet to give back. What this side thinks it may send can be sent.
		var window uint32
		callsSoon(t, "the last of the window was given back", func() bool {
			b.session.frames.mu.Lock()
			defer b.session.frames.mu.Unlock()
			window = st.flow.window
			return window > firstWindow/2
		})
		if window > firstWindow {
			t.Fatal("the window is", window)
		}
		n, err := st.Write(make([]byte, window))
		if err != nil {
			t.Fatal(n, err)
		}
		st.Close()
		if got, err := io.ReadAll(raw); len(got) != n || err != nil {
			t.Fatal(len(got), n, err)
		}
		raw.Close()
		callsSoon(t, "all was gone", func() bool { return streamsOf(b) == 0 })
	}
}

func flowExpect(from io.Reader, data []byte, seed int64) error {
	r := rand.New(rand.NewSource(seed))
	buf := make([]byte, 300<<10)
	for left := data; len(left) > 0; {
		n, err := from.Read(buf[:min(len(left), 1+r.Intn(len(buf))>>r.Intn(12))])
		if err != nil || !bytes.Equal(buf[:n], left[:n]) {
			return fmt.Errorf("%d bytes before the end: %w", len(left), err)
		}
		left = left[n:]
	}
	return nil
}

func flowConns(t testing.TB) map[string]func() (a, b net.Conn) {
	return map[string]func() (a, b net.Conn){
		"TCP":  func() (net.Conn, net.Conn) { return TestConn(t) },
		"pipe": net.Pipe,
		"TLS": func() (net.Conn, net.Conn) {
			a, b := TestConn(t)
			return flowTLS(t, a, b)
		},
	}
}

func flowTLS(t testing.TB, a, b net.Conn) (net.Conn, net.Conn) {
	ca, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	client := tls.Client(a, &tls.Config{InsecureSkipVerify: true})
	server := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{ca}})
	shaken := callsGo(client.Handshake)
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := callsGet(t, "the handshake", shaken); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// Streams opened, used, half closed, given up and broken off in any order
// leave nothing behind at either end.
func TestFlowChurn(t *testing.T) {
	for name, conns := range flowConns(t) {
		t.Run(name, func(t *testing.T) {
			x, y := conns()
			sides := [2]*MuxBroker{callsBroker(t, x, true), callsBroker(t, y, false)}
			var crowd sync.WaitGroup
			for i := range 16 {
				crowd.Go(func() {
					r := rand.New(rand.NewSource(int64(i)))
					here, there := sides[i%2], sides[1-i%2]
					for range 30 {
						id := here.NextId()
						how := r.Intn(5)
						size := r.Intn(700<<10) >> r.Intn(15)
						data := callsData(size)
						patience := time.Duration(r.Intn(3000)) * time.Microsecond
						var pair sync.WaitGroup
						pair.Go(func() {
							ctx := callsContext(t)
							if how == 4 {
								c, cancel := context.WithTimeout(ctx, patience)
								defer cancel()
								ctx = c
							}
							conn, err := there.DialContext(ctx, id)
							if err != nil {
								if how != 4 {
									t.Error(err)
								}
								return
							}
							defer conn.Close()
							if how == 0 {
								abort(conn)
								return
							}
							if _, err := conn.Write(data); err != nil && how < 3 {
								t.Error(how, err)
							}
							conn.Close() // half closed: what comes is still read
							got, err := io.ReadAll(conn)
							if how == 1 && (err != nil || !bytes.Equal(got, data)) {
								t.Error(how, len(got), err)
							}
						})
						pair.Go(func() {
							ctx := callsContext(t)
							if how == 4 {
								c, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
								defer cancel()
								ctx = c
							}
							conn, err := here.AcceptContext(ctx, id)
							if err != nil {
								if how != 4 {
									t.Error(err)
								}
								return
							}
							if how == 3 {
								_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
							}
							got, err := io.ReadAll(conn)
							if how == 1 || how == 2 {
								if err != nil || !bytes.Equal(got, data) {
									t.Error(how, len(got), err)
								}
							}
							if how == 1 {
								_, _ = conn.Write(got)
							}
							if how == 3 {
								go io.Copy(io.Discard, conn)
								_ = conn.SetReadDeadline(time.Time{})
							}
							conn.Close()
						})
						pair.Wait()
					}
				})
			}
			callsGet(t, "the crowd", callsGo(func() int { crowd.Wait(); return 0 }))
			for _, b := range sides {
				callsSoon(t, "all streams were gone", func() bool { return streamsOf(b) == 0 })
				if n := reflect.ValueOf(b.session.mux).Elem().FieldByName("synCh").Len(); n != 0 {
					t.Error(n, "streams are still in flight for yamux")
				}
			}
		})
	}
}

// What waits for a socket that takes no more ends with the session, from
// either side.
func TestFlowStuckSocket(t *testing.T) {
	for name, conns := range flowConns(t) {
		for _, here := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, closed here: %v", name, here), func(t *testing.T) {
				x, y := conns()
				s, err := newSession(context.Background(), x, true, hclog.NewNullLogger(), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer s.close()
				var streams []*stream
				for range 200 { // nobody reads: the frames that open them wait
					st, err := s.open()
					if err != nil {
						t.Fatal(err)
					}
					streams = append(streams, st)
				}
				var writing, closing []<-chan error
				for _, st := range streams[:150] {
					writing = append(writing, callsGo(func() error {
						for {
							if _, err := st.Write(make([]byte, 100<<10)); err != nil {
								return err
							}
						}
					}))
				}
				callsSoon(t, "the socket was full", func() bool {
					for range 50 {
						if s.frames.writing.TryLock() {
							s.frames.writing.Unlock()
							return false
						}
						time.Sleep(time.Millisecond)
					}
					return true
				})
				for i, st := range streams[100:] {
					closing = append(closing, callsGo(func() error {
						if i%3 == 0 {
							st.announce()
						}
						if i%2 == 0 {
							return abort(st)
						}
						return st.Close()
					}))
				}
				if here {
					callsGet(t, "close", callsGo(func() int { s.close(); return 0 }))
				} else {
					_ = y.Close()
				}
				for _, w := range writing {
					if err := callsGet(t, "a Write", w); err == nil || !here && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, yamux.ErrStreamClosed) {
						t.Error("a Write ended with", err)
					}
				}
				for _, w := range closing {
					callsGet(t, "a Close", w)
				}
				callsSoon(t, "the session ended", s.mux.IsClosed)
			})
		}
	}
}
