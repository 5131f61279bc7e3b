//go:build unix && !linux && !solaris

package plugin

import "syscall"

func duplicate(from, to int) error { return syscall.Dup2(from, to) }
