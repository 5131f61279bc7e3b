//go:build unix && !linux && !solaris

package plugin

import "syscall"

func duplicate(from, to int) error {
	err := syscall.Dup2(from, to)
	syscall.CloseOnExec(to)
	return err
}
