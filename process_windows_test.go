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

// Without any setting, only the host that started a plugin can connect to its port.
func TestWindowsAutoMTLS(t *testing.T) {
	t.Parallel()
	set := func(_ testing.TB, c *plugin.ClientConfig) { c.AutoMTLS = true }
	detach := func(_ testing.TB, c *plugin.ClientConfig) { c.Detach = true }
	for name, test := range map[string]struct {
		mode     string
		edit     func(testing.TB, *plugin.ClientConfig)
		sends    bool // the host sends a certificate
		warnings int
		open     bool // a stranger can connect
	}{
		"by itself":      {mode: "plugin", sends: true},
		"set":            {mode: "plugin", sends: true, edit: set},
		"TLSConfig":      {mode: "tls", edit: testTLS},
		"Detach":         {mode: "plugin", open: true, edit: detach},
		"no certificate": {mode: "tcp", sends: true, warnings: 1, open: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config(test.mode)
			if test.edit != nil {
				test.edit(t, cfg)
			}
			logger, records := recorder()
			cfg.Logger = logger
			c, p := startPlugin(t, cfg)
			addr, err := c.Start()
			check(t, err)
			self := mustCall[Self](t, dispense(t, p).Client, "Self", struct{}{})
			sent := envValues(self.Began, certVariable)
			checkEqual(t, "the host sends a certificate", len(sent) == 1, test.sends)
			checkEqual(t, "warnings", len(records.find("certificate")), test.warnings)
			checkEqual(t, "a stranger can connect", strangerCanCall(t, addr, nil), test.open)
		})
	}
}
