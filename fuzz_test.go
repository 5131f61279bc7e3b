package plugin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
)

// ---- Sessions ----

// feed returns a connection on which a script arrives. It ends behind it, or
// stalls.
func feed(script []byte, stalls bool) io.ReadWriteCloser {
	end, w := io.Pipe()
	if !stalls {
		w.Close()
	}
	return readWriteCloser{io.MultiReader(bytes.NewReader(script), end), io.Discard, end}
}

// addSessions adds what may arrive instead of a session, and what the end that
// is 0 for the host and 1 for the plugin sends in one.
func addSessions(f *testing.F, end int) {
	for _, script := range garbage() {
		f.Add(script)
	}
	var sent syncBuffer
	var ends [2]io.ReadWriteCloser
	ends[0], ends[1] = TestConn(f)
	ends[end] = readWriteCloser{ends[end], io.MultiWriter(&sent, ends[end]), ends[end]}
	go (&RPCServer{Plugins: testPlugins(newTestState())}).ServeConn(ends[1]) // ends with the connection
	c, err := NewRPCClient(ends[0], testPlugins(nil))
	check(f, err)
	answers(f, c)
	check(f, c.Close())
	f.Add([]byte(sent.String()))
}

// FuzzSessionHost is a host whose plugin sends anything.
func FuzzSessionHost(f *testing.F) {
	addSessions(f, 1)
	f.Fuzz(func(t *testing.T, script []byte) {
		for _, stalls := range []bool{false, true} {
			c, err := NewRPCClient(feed(script, stalls), testPlugins(nil))
			if err != nil {
				continue
			}
			dispensing := async(func() error { _, err := c.Dispense("test"); return err })
			if stalls {
				check(t, c.broker.Close())
			}
			receive(t, "Dispense", dispensing)
			_ = c.Close()
			if err := c.Ping(); err == nil {
				t.Error("a closed connection answers")
			}
		}
	})
}

// FuzzSessionPlugin is a plugin whose host sends anything.
func FuzzSessionPlugin(f *testing.F) {
	addSessions(f, 0)
	f.Fuzz(func(t *testing.T, script []byte) {
		server := &RPCServer{Plugins: PluginSet{"test": serves(&useService{func() {}})}}
		serving := async(func() bool { server.ServeConn(feed(script, false)); return true })
		receive(t, "ServeConn", serving)
	})
}

// FuzzBroker is a broker whose peer opens, uses and closes streams at will.
func FuzzBroker(f *testing.F) {
	f.Add([]byte("o1a1w\x02hic0s0o5w\x04textc0s1o6w\x00c0s2o7d3d0d1d2"))
	f.Fuzz(func(t *testing.T, script []byte) {
		raw, c, _ := rawPlugin(t)
		go func() { // sends back what it gets; ends with the session
			for st, err := raw.Accept(); err == nil; st, err = raw.Accept() {
				go io.Copy(st, st)
			}
		}()
		ids := []uint32{1, 2, 3, 4}
		var st net.Conn
		var uses []<-chan bool
		use := func(f func()) { uses = append(uses, async(func() bool { f(); return true })) }
		for len(script) > 1 && len(uses) < 20 {
			op, arg := script[0], int(script[1])
			script = script[2:]
			id, kind := ids[arg%len(ids)], served[arg%len(served)]
			switch {
			case op == 'o':
				st, _ = raw.Open()
				_ = binary.Write(st, binary.LittleEndian, id)
			case op == 'w' && st != nil:
				_, _ = st.Write(script[:min(len(script), arg)])
			case op == 'c' && st != nil:
				_ = st.Close()
			case op == 's':
				id, stop := kind.serve(c.broker, func() {})
				ids = append(ids, id)
				defer stop()
			case op == 'a':
				use(func() { _, _ = c.broker.Accept(id) })
			case op == 'd':
				use(func() {
					if end, err := kind.dial(c.broker, id); err == nil {
						_ = errors.Join(end.next(), end.Close())
					}
				})
			}
		}
		check(t, c.broker.Close())
		for _, done := range uses {
			receive(t, "a use", done)
		}
	})
}
