// Program host starts a worker and checks one thing with it, written against
// go-plugin's API. It is built once with each library.
//
//	host -list
//	host -plugin FILE [-inner FILE] -check NAME
//
// It exits with status 0 if the check passes, and otherwise prints why not.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"github.com/muxplug/plugin/interop/shared"
)

// hangs is the bound on everything that takes no time unless it hangs.
const hangs = 30 * time.Second

var (
	pluginFile = flag.String("plugin", "", "the plugin's binary")
	innerFile  = flag.String("inner", "", "the binary of the plugin's own plugin")
	checkName  = flag.String("check", "", "the check")
	list       = flag.Bool("list", false, "list the checks, as JSON")
)

func main() {
	flag.Parse()
	if *list {
		var names [][2]string
		for _, c := range checks {
			names = append(names, [2]string{c.name, c.what})
		}
		if err := json.NewEncoder(os.Stdout).Encode(names); err != nil {
			panic(err)
		}
		return
	}
	var check func(*host)
	if *checkName == "" {
		check = startAndLeave
	}
	for _, c := range checks {
		if c.name == *checkName {
			check = c.run
		}
	}
	if err := run(check); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// run runs a check in a directory of its own.
func run(check func(*host)) error {
	dir, err := os.MkdirTemp("", "h-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h := &host{dir: dir}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer h.killAll()
		check(h)
	}()
	select {
	case <-done:
		return h.err
	case <-time.After(2 * hangs):
		buf := make([]byte, 1<<20)
		return fmt.Errorf("the check hangs:\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// host is what a check works with.
type host struct {
	dir            string
	log            buffer // the host's log, as JSON
	stdout, stderr buffer // what the plugin printed
	clients        []*plugin.Client
	err            error // why the check fails
}

// ok ends the check if there is an error.
func (h *host) ok(err error) {
	if err != nil {
		h.err = err
		runtime.Goexit()
	}
}

// must ends the check if something does not hold.
func (h *host) must(holds bool, format string, args ...any) {
	if !holds {
		h.ok(fmt.Errorf(format, args...))
	}
}

// same ends the check if two values are not the same.
func (h *host) same(what string, got, want any) {
	h.must(got == want, "%s is %v and not %v", what, got, want)
}

func (h *host) killAll() {
	for _, c := range h.clients {
		c.Kill()
	}
}

// config is a configuration that starts the plugin with arguments.
func (h *host) config(args ...string) *plugin.ClientConfig {
	return &plugin.ClientConfig{
		HandshakeConfig: shared.Handshake,
		Plugins:         plugin.PluginSet{"worker": &shared.Worker{}},
		Cmd:             exec.Command(*pluginFile, args...),
		Logger:          hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: &h.log, JSONFormat: true}),
		SyncStdout:      &h.stdout,
		SyncStderr:      &h.stderr,
		StartTimeout:    hangs,
	}
}

// client returns a client that is killed when the check has ended.
func (h *host) client(config *plugin.ClientConfig) *plugin.Client {
	c := plugin.NewClient(config)
	h.clients = append(h.clients, c)
	return c
}

// start starts a plugin and dispenses its worker.
func (h *host) start(config *plugin.ClientConfig) (*plugin.Client, plugin.ClientProtocol, *shared.Remote) {
	c := h.client(config)
	protocol, w, err := shared.Dispense(c)
	h.ok(err)
	return c, protocol, w
}

// worker is start with the configuration that needs nothing special.
func (h *host) worker() *shared.Remote {
	_, _, w := h.start(h.config())
	return w
}

// sound checks that a worker can be called.
func (h *host) sound(w *shared.Remote) {
	var sum int
	h.ok(w.Call("Plugin.Add", [2]int{2, 3}, &sum))
	h.same("2+3", sum, 5)
}

// pid asks a worker for its process.
func (h *host) pid(w *shared.Remote) (n int) {
	h.ok(w.Call("Plugin.Pid", new(any), &n))
	return n
}

// await waits until a condition holds.
func (h *host) await(what string, holds func() bool) {
	for end := time.Now().Add(hangs); !holds(); time.Sleep(5 * time.Millisecond) {
		h.must(time.Now().Before(end), "in %v it did not come to be that %s; the log is:\n%s", hangs, what, h.log.String())
	}
}

// gone reports whether a process has ended, also if nobody has waited for it.
func gone(pid int) bool {
	if syscall.Kill(pid, 0) != nil {
		return true
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && strings.Contains(string(stat), ") Z ")
}

func (h *host) file(name string) string { return filepath.Join(h.dir, name) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// buffer is a bytes.Buffer for concurrent use.
type buffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// records returns the records of the host's log with that message.
func (h *host) records(message string) (found []map[string]any) {
	for line := range strings.Lines(h.log.String()) {
		var r map[string]any
		if json.Unmarshal([]byte(line), &r) == nil && r["@message"] == message {
			found = append(found, r)
		}
	}
	return found
}

// startAndLeave is the check that is none: it starts a plugin, tells how to
// reattach, and leaves it.
func startAndLeave(h *host) {
	c, _, w := h.start(h.config())
	h.sound(w)
	h.ok(shared.WriteAttachment(os.Stdout, c.ReattachConfig()))
	h.clients = nil
}

// leave runs startAndLeave in another process.
func (h *host) leave() *plugin.ReattachConfig {
	self, err := os.Executable()
	h.ok(err)
	cmd := exec.Command(self, "-plugin", *pluginFile)
	cmd.Stderr = os.Stderr
	// The plugin must not hold this process's stdin, nor this the plugin's end.
	out, err := cmd.StdoutPipe()
	h.ok(err)
	h.ok(cmd.Start())
	text, err := io.ReadAll(out)
	h.ok(errors.Join(err, cmd.Wait()))
	rc, err := shared.ReadAttachment(text)
	h.ok(err)
	return rc
}
