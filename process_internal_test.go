package plugin

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
)

// A process that somebody else has reaped is not signalled: its pid may be that of another
// process.
func TestReapedElsewhere(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_PLUGIN_MODE=wait")
	check(t, cmd.Start())
	p := &child{cmd: cmd}
	p.reapedElsewhere.Store(true)
	err := p.Kill(context.Background())
	if !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Kill returned %v", err)
	}
	if !alive(cmd.Process.Pid) {
		t.Error("the process was signalled")
	}
	p.reapedElsewhere.Store(false)
	check(t, p.Kill(context.Background()))
	var exit *exec.ExitError
	err = cmd.Wait()
	if !errors.As(err, &exit) {
		t.Errorf("Wait returned %v", err)
	}
}
