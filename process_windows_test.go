package plugin_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/muxplug/plugin"
)

func init() {
	// ReattachConfig does not detach a plugin here.
	orphanTests = append(orphanTests,
		orphanTest{plugin: "plugin say cry", host: "host idle reattachable ready wait"})
}

// The ending of a file's name tells whether it can be executed.
func TestWindowsDiscover(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := []string{"a.exe", "b.EXE", "c.com", "d.bat", "e.cmd"}
	for _, name := range append(slices.Clone(want), "f", "g.txt", "h.ps1", "i.exe.txt") {
		check(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	found, err := plugin.Discover("*", dir)
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	if err != nil || !slices.Equal(found, want) {
		t.Errorf("found %v, %v; want %v", found, err, want)
	}
}

// A file that is no program for this system is told, with a hint.
func TestWindowsBadFile(t *testing.T) {
	startFailure{word: "windows/", edit: func(t testing.TB, c *plugin.ClientConfig) {
		c.Cmd.Path = filepath.Join(t.TempDir(), "greeter.exe")
		writeProgram(t, c.Cmd.Path, []byte("hello"), 0o700)
	}}.run(t)
}
