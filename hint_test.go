package plugin_test

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// An error of a start has a hint only where it does not mislead.
func TestHints(t *testing.T) {
	t.Parallel()
	type edit = func(testing.TB, *plugin.ClientConfig)
	tests := []struct {
		name    string
		mode    string
		edit    edit
		word    string // in the error
		without string // not in it
	}{
		{
			name: "a directory as the path",
			mode: "plugin",
			edit: func(t testing.TB, c *plugin.ClientConfig) { c.Cmd.Path = t.TempDir() },
			word: "it is a directory", without: "is it executable",
		}, {
			name: "no such working directory",
			mode: "plugin",
			edit: func(t testing.TB, c *plugin.ClientConfig) { c.Cmd.Dir = filepath.Join(t.TempDir(), "missing") },
			word: "missing", without: "interpreter",
		}, {
			name: "no directory for the socket",
			mode: "plugin",
			edit: func(t testing.TB, c *plugin.ClientConfig) {
				c.UnixSocketConfig = &plugin.UnixSocketConfig{TempDir: filepath.Join(t.TempDir(), "missing")}
			},
			word: "TempDir", without: "interpreter",
		}, {
			name: "a bar in the path of the socket",
			mode: "plugin",
			edit: func(t testing.TB, c *plugin.ClientConfig) {
				dir := filepath.Join(t.TempDir(), "a|b")
				check(t, os.Mkdir(dir, 0o700))
				c.UnixSocketConfig = &plugin.UnixSocketConfig{TempDir: dir}
			},
			word: "without |", without: "plugin.Serve",
		},
		{name: "killed by a signal", mode: "killed", word: "killed", without: "plugin.Serve"},
		{name: "killed after a line", mode: "say killed", word: "jungle", without: "plugin.Serve"},
		{
			name: "too late",
			mode: "wait",
			edit: func(_ testing.TB, c *plugin.ClientConfig) { c.StartTimeout = 100 * time.Millisecond },
			word: "ClientConfig.StartTimeout", without: "interpreter",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if runtime.GOOS == "windows" && test.mode != "wait" {
				return // without signals and sockets, and with other errors
			}
			cfg := newLab(t).config(test.mode, sayEnv+"=jungle")
			if test.edit != nil {
				test.edit(t, cfg)
			}
			err := startError(t, plugin.NewClient(cfg))
			errorSays(t, err, test.word)
			if strings.Contains(err.Error(), test.without) {
				t.Errorf("the error says %q:\n%v", test.without, err)
			}
		})
	}
}
