// Program bare is the benchmark's plugin without a plugin library: net/rpc
// over a Unix socket, or over stdin and stdout.
package main

import (
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"

	"github.com/muxplug/plugin/interop/bench/job"
)

func main() {
	if len(os.Args) == 1 {
		serve(rpc.ServeConn, struct {
			io.Reader
			io.WriteCloser
		}{os.Stdin, os.Stdout})
		return
	}
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		panic(err)
	}
	// One connection is for calls; the others are streams, that begin with
	// what they are for.
	fmt.Println("ready")
	conn, err := listener.Accept()
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go use(conn)
		}
	}()
	serve(rpc.ServeConn, conn)
}

func serve(serveConn func(io.ReadWriteCloser), conn io.ReadWriteCloser) {
	if err := rpc.RegisterName("Plugin", &job.Service{}); err != nil {
		panic(err)
	}
	serveConn(conn)
}

// use uses a stream as its first byte says.
func use(conn net.Conn) {
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		_ = conn.Close()
		return
	}
	if kind := job.ByFirst(first[0]); kind != job.Calls {
		job.Use(conn, kind)
		return
	}
	server := rpc.NewServer()
	if err := server.RegisterName("Plugin", &job.Service{}); err != nil {
		panic(err)
	}
	server.ServeConn(conn)
}
