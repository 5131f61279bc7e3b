package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// This file is about hints: causes of a StartError that its error does not name.

// These stand in what a plugin writes to its stderr when it does not serve.
const (
	withOneArgument = "with one argument, which names one of" // in ServeMux
	isPlugin        = "is a plugin"                           // in Serve, without the cookie
)

// behaviourHint returns why a process may not have become a plugin, or "".
func behaviourHint(e *StartError, cookie string) string {
	if e.State != nil && !e.State.Exited() {
		return "" // a signal has ended it
	}
	if e.State != nil && strings.Contains(e.Stderr, withOneArgument) {
		return "" // what ServeMux has written says all
	}
	if e.State != nil && strings.Contains(e.Stderr, isPlugin) {
		return fmt.Sprintf("it did not accept the cookie %s: "+
			"it is a plugin of another program, or its HandshakeConfig is another one", cookie)
	}
	late := errors.Is(e.Err, context.DeadlineExceeded)
	if e.Stdout != "" && (e.State != nil || late) { // otherwise there was a handshake, too
		return "what it printed to stdout is no handshake: " +
			"does its main call plugin.Serve, and print nothing before?"
	}
	if e.Stderr == "" && (e.State != nil || late) {
		return "does its main call plugin.Serve?"
	}
	return ""
}

// binaryHint returns why a command may not have been executed, or "".
func binaryHint(cmd *exec.Cmd, err error) string {
	path := executed(cmd)
	info, statErr := os.Stat(path)
	switch {
	case errors.Is(err, exec.ErrNotFound) && filepath.Base(cmd.Path) == cmd.Path:
		return fmt.Sprintf("it was looked up in PATH; the file in this directory is ./%s", cmd.Path)
	case statErr == nil && info.IsDir():
		return "it is a directory"
	case isOtherPlatform(err):
		return fmt.Sprintf("is it built for %s/%s, as this host is?", runtime.GOOS, runtime.GOARCH)
	case errors.Is(err, fs.ErrPermission):
		return "is it executable?"
	case errors.Is(err, fs.ErrNotExist) && !isAboutDir(err):
		// The error of a script that names an interpreter that does not exist is the same.
		return fmt.Sprintf("is %s there, and the interpreter that it names?", path)
	}
	return ""
}

// isOtherPlatform reports whether err is that of a binary for another system or processor.
func isOtherPlatform(err error) bool {
	const badFormat, machineMismatch = syscall.Errno(193), syscall.Errno(216) // on Windows
	isOnWindows := errors.Is(err, badFormat) || errors.Is(err, machineMismatch)
	return isOnWindows || errors.Is(err, syscall.ENOEXEC)
}

// isAboutDir reports whether err is about Cmd.Dir, and not about the binary.
func isAboutDir(err error) bool {
	var failed *fs.PathError
	return errors.As(err, &failed) && failed.Op == "chdir"
}

// executed returns the path of the file that a command executes.
func executed(cmd *exec.Cmd) string {
	if filepath.IsAbs(cmd.Path) {
		return cmd.Path
	}
	return filepath.Join(cmd.Dir, cmd.Path)
}
