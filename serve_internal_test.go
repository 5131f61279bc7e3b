//go:build unix

package plugin

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// After Serve, what a method has copied of os.Stdout is the output of the process, and so is
// the variable, which methods may be reading.
func TestRestoredOutput(t *testing.T) {
	stdout, stderr := os.Stdout, os.Stderr
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	file, err := os.Create(filepath.Join(t.TempDir(), "output"))
	check(t, err)
	defer file.Close()
	os.Stdout, os.Stderr = file, file
	c, err := newCapture([2]*os.File{}, canReplace)
	check(t, err)
	within := os.Stdout
	_, err = io.WriteString(within, "to the host")
	check(t, err)
	c.restore()
	if os.Stdout != within {
		t.Error("the variable has been changed")
	}
	_, err = io.WriteString(within, "to its own")
	check(t, err)
	sent, err := io.ReadAll(c.readers[0]) // to its end
	check(t, err)
	own, err := os.ReadFile(file.Name())
	check(t, err)
	if string(sent) != "to the host" || string(own) != "to its own" {
		t.Errorf("the host got %q, and the process printed %q", sent, own)
	}
	for i := range c.readers {
		_ = c.readers[i].Close()
		_ = c.writers[i].Close()
	}
}
