//go:build unix

package plugin

import (
	"os/exec"
	"syscall"
)

func init() {
	ownGroup = func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
}
