// Program host starts a worker and checks one thing with it, written against
// go-plugin's API. It is built once with each library.
//
//	host -list
//	host -plugin FILE -check NAME
//
// It exits with status 0 if the check passes, and otherwise prints why not.
package main

import (
	"bytes"
	"encoding/json"
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
	if *checkName == startAndLeave {
		leave()
		return
	}
	for _, c := range checks {
		if c.name == *checkName {
			if err := run(c.run); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			return
		}
	}
	fmt.Println("no such check:", *checkName)
	os.Exit(2)
}

// run runs a check in a directory of its own.
func run(check func(*host) error) error {
	dir, err := os.MkdirTemp("", "h-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h := &host{dir: dir}
	defer h.killAll()
	done := make(chan error, 1)
	go func() { done <- check(h) }()
	select {
	case err := <-done:
		return err
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
func (h *host) start(config *plugin.ClientConfig) (*plugin.Client, plugin.ClientProtocol, *shared.Remote, error) {
	c := h.client(config)
	protocol, err := c.Client()
	if err != nil {
		return nil, nil, nil, err
	}
	v, err := protocol.Dispense("worker")
	if err != nil {
		return nil, nil, nil, err
	}
	return c, protocol, v.(*shared.Remote), nil
}

// worker is start with the configuration that needs nothing special.
func (h *host) worker() (*shared.Remote, error) {
	_, _, w, err := h.start(h.config())
	return w, err
}

// sound checks that a worker can be called.
func sound(w *shared.Remote) error {
	var sum int
	if err := w.Call("Plugin.Add", [2]int{2, 3}, &sum); err != nil {
		return err
	}
	return same("2+3", sum, 5)
}

// pid asks a worker for its process.
func pid(w *shared.Remote) (n int, err error) {
	err = w.Call("Plugin.Pid", new(any), &n)
	return n, err
}

func same[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s is %v and not %v", what, got, want)
	}
	return nil
}

// await waits until a condition holds.
func await(what string, holds func() bool) error {
	for end := time.Now().Add(hangs); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("in %v it did not come to be that %s", hangs, what)
		}
	}
	return nil
}

// within runs f, which must not hang.
func within(what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(hangs):
		return fmt.Errorf("%s hangs", what)
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
// reattach, and exits without having killed it.
const startAndLeave = "start-and-leave"

func leave() {
	h := &host{}
	c, _, w, err := h.start(h.config())
	if err == nil {
		err = sound(w)
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(shared.NewAddress(c.ReattachConfig()))
	}
	if err != nil {
		fmt.Println(err)
		h.killAll()
		os.Exit(1)
	}
}

// leaver runs start-and-leave in another process.
func leaver() (shared.Address, error) {
	var a shared.Address
	self, err := os.Executable()
	if err != nil {
		return a, err
	}
	cmd := exec.Command(self, "-plugin", *pluginFile, "-check", startAndLeave)
	cmd.Stderr = os.Stderr
	// The plugin must not hold this process's stdin, nor this the plugin's end.
	out, err := cmd.StdoutPipe()
	if err != nil {
		return a, err
	}
	if err := cmd.Start(); err != nil {
		return a, err
	}
	text, err := io.ReadAll(out)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return a, fmt.Errorf("%w: %s", err, text)
	}
	return a, json.Unmarshal(text, &a)
}
