package plugin

import "syscall"

// duplicate is dup2, which package syscall does not have on every architecture. Child
// processes do not inherit the new descriptor.
func duplicate(from, to int) error { return syscall.Dup3(from, to, syscall.O_CLOEXEC) }
