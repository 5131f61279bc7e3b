//go:build unix && !solaris

package plugin

import (
	"fmt"
	"os"
	"syscall"
)

// identity identifies an open file by its kind, device and number. On macOS, which does not
// number pipes, it says only that a file is a pipe. It returns "" if the descriptor is not
// open.
func identity(fd int) string {
	var stat syscall.Stat_t
	err := syscall.Fstat(fd, &stat)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%o:%d:%d", stat.Mode&syscall.S_IFMT, stat.Dev, stat.Ino)
}

// keepToItself makes child processes not inherit a descriptor.
func keepToItself(fd int) { syscall.CloseOnExec(fd) }

// readNow reads what is in a pipe and does not wait for more. It returns 0 if there is
// nothing.
func readNow(pipe *os.File, p []byte) (n int) {
	conn, err := pipe.SyscallConn()
	if err != nil {
		return 0
	}
	_ = conn.Read(func(fd uintptr) (done bool) { // fails if the pipe is closed
		n, _ = syscall.Read(int(fd), p) // fails if there is nothing
		return true
	})
	return max(n, 0)
}

// canReplace reports whether replace does anything.
const canReplace = true

// replace makes the descriptor of old refer to the file of another, unless old is nil.
func replace(old, with *os.File) {
	if old == nil {
		return
	}
	_ = duplicate(int(with.Fd()), int(old.Fd())) // both are open
}
