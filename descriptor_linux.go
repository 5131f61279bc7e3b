package plugin

import "syscall"

// duplicate is dup2, which package syscall does not have on every architecture.
func duplicate(from, to int) error { return syscall.Dup3(from, to, syscall.O_CLOEXEC) }
