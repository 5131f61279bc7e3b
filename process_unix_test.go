//go:build unix

package plugin

import (
	"os"
	"os/exec"
	"syscall"
)

func init() {
	ownGroup = func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
	torments = []os.Signal{syscall.SIGINT, syscall.SIGSTOP, syscall.SIGCONT}
	goOn = func(p *os.Process) { _ = p.Signal(syscall.SIGCONT) }
}
