package plugin

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
)

// hosted is the plugin of a host in its own process. The step "host" makes the
// configuration. The next may change it, and then one starts the client and
// brings the plugin to a moment of its life. The steps "ready wait" leave it
// there.
var hosted struct {
	cfg    *ClientConfig
	client *Client
}

func init() {
	modes["host"] = func() {
		// The parent of the tests may have made them ignore these signals.
		interrupted := make(chan os.Signal, 1)
		signal.Notify(interrupted, os.Interrupt, syscall.SIGHUP)
		go func() { <-interrupted; os.Exit(130) }() // ends with the process
		hosted.cfg = config(os.Getenv(childEnv))
	}
	modes["detaching"] = func() { hosted.cfg.Detach = true }
	modes["shell"] = func() {
		cmd := exec.Command("sh", "-c", `"$0"; exit $?`, os.Args[0])
		cmd.Env = hosted.cfg.Cmd.Env
		hosted.cfg.Cmd = cmd
	}
	modes["starting"] = func() {
		hosted.client = NewClient(hosted.cfg)
		go hosted.client.Start() // ends with the process
		awaitNote("plugin")
	}
	modes["started"] = func() {
		hosted.client = NewClient(hosted.cfg)
		note("address", must(hosted.client.Start()).String())
	}
	modes["idle"] = func() { hostedTest() }
	modes["calling"] = func() {
		go hostedTest().Call("Plugin.Block", "", new(string)) // ends with the process
		awaitNote("in a call")
	}
	// Ends when the plugin is gone.
	modes["busy"] = func() {
		test := hostedTest()
		note(fmt.Sprintf("busy-%d", os.Getpid()), hosted.client.ID())
		if test.traffic(context.Background(), func() {}) == errWrong {
			note("a wrong reply", "")
		}
		hosted.client.Kill()
	}
	modes["reattachable"] = func() { note("reattach", strconv.Itoa(hosted.client.ReattachConfig().Pid)) }
	modes["ready"] = func() { note("host is ready", "") }
}

// hostedTest starts the host's plugin and dispenses "test".
func hostedTest() *testClient {
	modes["started"]()
	return must(Dispense[*testClient](must(hosted.client.Client()), "test"))
}

// must is for processes that are no tests.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Plugins exit with their hosts.
func TestOrphans(t *testing.T) {
	for _, test := range []struct{ plugin, host string }{
		{"late plugin", "host starting ready wait"},
		{"plugin say cry", "host started ready wait"},
		{"plugin say cry", "host shell idle ready wait"},
		{"plugin say cry", "host calling ready exit3"},
	} {
		t.Run(test.host, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := l.start(test.host, childEnv+"="+test.plugin)
			l.read("host is ready")
			host.kill(t)
			l.write("serve", "")
			l.deserted(slack)
			l.read("plugin finished")
		})
	}
}
