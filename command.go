package plugin

import (
	"os"
	"os/exec"
	"sync"
)

// This file is about the caller's exec.Cmd. Clients with the same ClientConfig share it: each
// starts a copy, and says in the caller's what has become of that.

// sharedCmdMu guards Process and ProcessState of all callers' commands.
var sharedCmdMu sync.Mutex

// sharedCmd is a caller's command.
type sharedCmd struct{ *exec.Cmd }

// copy returns a copy that has not been started.
func (c sharedCmd) copy() *exec.Cmd {
	sharedCmdMu.Lock()
	defer sharedCmdMu.Unlock()
	cmd := *c.Cmd
	cmd.Process, cmd.ProcessState = nil, nil
	return &cmd
}

// started sets Process to that of a copy.
func (c sharedCmd) started(process *os.Process) {
	sharedCmdMu.Lock()
	defer sharedCmdMu.Unlock()
	c.Process, c.ProcessState = process, nil
}

// ended sets ProcessState to that of a copy, unless another has been started since.
func (c sharedCmd) ended(process *os.Process, state *os.ProcessState) {
	sharedCmdMu.Lock()
	defer sharedCmdMu.Unlock()
	if c.Process == process {
		c.ProcessState = state
	}
}

// cancel calls the Cancel of a copy. Process is that of the copy meanwhile, because the Cancel
// of exec.CommandContext looks there.
func (c sharedCmd) cancel(process *os.Process, cancel func() error) error {
	sharedCmdMu.Lock()
	defer sharedCmdMu.Unlock()
	before := c.Process
	if before == process {
		return cancel()
	}
	c.Process = process
	err := cancel()
	c.Process = before
	return err
}
