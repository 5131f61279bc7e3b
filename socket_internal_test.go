package plugin

import (
	"net"
	"strconv"
	"testing"
)

// A plugin takes a free port of the given ones, or says that none is free.
func TestPorts(t *testing.T) {
	t.Parallel()
	taken, err := listenTCP("1", "65535")
	check(t, err)
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	next, err := listenTCP(strconv.Itoa(port), "65535")
	check(t, err)
	defer next.Close()
	if addr := next.Addr().(*net.TCPAddr); !addr.IP.IsLoopback() || addr.Port <= port {
		t.Errorf("where %d is taken, it listens at %v", port, addr)
	}
	_, err = listenTCP(strconv.Itoa(port), strconv.Itoa(port))
	errorSays(t, err, strconv.Itoa(port))
	// Without a lowest port, there is still a highest.
	lowest, err := listenTCP("", "1")
	if err != nil {
		errorSays(t, err, "from 1 to 1")
		return
	}
	defer lowest.Close()
	if port := lowest.Addr().(*net.TCPAddr).Port; port != 1 {
		t.Errorf("where 1 is the highest port, it listens at %d", port)
	}
}
