package interop

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/muxplug/plugin/interop/internal/build"
)

// pair is a host and a plugin, each built with one of the libraries.
type pair struct{ host, plugin build.Library }

var pairs = []pair{
	{build.Ours, build.Ours},
	{build.Ours, build.GoPlugin},
	{build.GoPlugin, build.Ours},
	{build.GoPlugin, build.GoPlugin},
	{build.Ours, build.V1_4},
	{build.V1_4, build.Ours},
	{build.Ours, build.V1_0},
	{build.V1_0, build.Ours},
}

func (p pair) String() string { return string(p.host) + " → " + string(p.plugin) }

// has reports whether a library has the API that a check needs.
func has(lib build.Library, check string) bool {
	return lib != build.V1_0 || check != "test-mode"
}

// checks asks the host program what it can check: the names, and what they mean.
func checks(t *testing.T) (list [][2]string) {
	t.Helper()
	out, err := exec.Command(program{"host", build.Ours}.path(t), "-list").Output()
	ok(t, err)
	ok(t, json.Unmarshal(out, &list))
	return list
}

// run runs a host with one check. Sockets of plugins that were killed or crashed
// stay behind if the host is a go-plugin one, and if the plugin does not know of
// the directory that our host makes for its socket, as older ones do not.
func (p pair) run(t *testing.T, check string) {
	dir, err := os.MkdirTemp("", "c-*")
	ok(t, err)
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program{"host", p.host}.path(t), "-check", check,
		"-plugin", program{"plugin", p.plugin}.path(t), "-inner", program{"plugin", p.host}.path(t))
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	cmd.WaitDelay = hangs
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	left := func() string { return processesLeft(dir) }
	if p.host == build.Ours && p.plugin != build.V1_4 && p.plugin != build.V1_0 {
		left = func() string { return processesLeft(dir) + filesLeft(dir) }
	}
	if what := nothing(left); what != "" {
		t.Fatal("left behind:", what)
	}
}

// TestPairs runs every check with every pair.
func TestPairs(t *testing.T) {
	list := checks(t)
	for _, p := range pairs {
		t.Run(p.String(), func(t *testing.T) {
			for _, c := range list {
				if name := c[0]; has(p.host, name) && has(p.plugin, name) {
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						p.run(t, name)
					})
				}
			}
		})
	}
}
