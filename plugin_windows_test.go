package plugin

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What is another thing on Windows: there is no pipe by which a plugin notices
// that its host is gone, no socket whose name tells the plugin's pid, and no
// bit that says that a file can be executed.

// The environment variables that tell a host in a process of its own what to do.
const (
	winPluginEnv = "TEST_WIN_PLUGIN" // the mode of its plugin
	winAtEnv     = "TEST_WIN_AT"     // the moment of the plugin's life at which it stays
	winEndEnv    = "TEST_WIN_END"    // how it ends then; "" waits to be killed
	winDetachEnv = "TEST_WIN_DETACH" // not empty for Detach, or "ReattachConfig"
)

func init() {
	modes["windows host"] = func() {
		cfg := config(os.Getenv(winPluginEnv))
		cfg.Detach = os.Getenv(winDetachEnv) == "Detach"
		c := NewClient(cfg)
		if os.Getenv(winAtEnv) == "before Serve" {
			go c.Start()
			awaitNote("plugin")
		} else {
			p, err := c.Client()
			if err != nil {
				panic(err)
			}
			if os.Getenv(winAtEnv) == "in a call" {
				life, err := Dispense[*lifeClient](p, "life")
				if err != nil {
					panic(err)
				}
				go life.Call("Plugin.Hang", true, new(bool))
				awaitNote("in a call")
			}
			note("address", c.starting.result().addr.String())
		}
		if os.Getenv(winDetachEnv) == "ReattachConfig" {
			c.ReattachConfig()
		}
		note("host is ready", "")
		switch os.Getenv(winEndEnv) {
		case "exit":
			os.Exit(3)
		case "panic":
			panic("the host has a bug")
		}
		time.Sleep(forever)
	}
}

// winHost runs a host until it is ready, and kills it if it does not end by
// itself.
func winHost(t *testing.T, l *lab, env ...string) {
	t.Helper()
	host := exec.Command(os.Args[0])
	host.Env = slices.Concat(os.Environ(), l.env(), []string{modeEnv + "=windows host"}, env)
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	defer host.Wait()
	defer host.Process.Kill()
	l.read("plugin")
	l.read("host is ready")
	if slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, winEndEnv+"=") }) {
		_ = host.Wait()
	}
}

// A plugin is gone when its host is gone, however and whenever that goes.
func TestWindowsOrphan(t *testing.T) {
	t.Parallel()
	const bound = orphanTimeout + 500*time.Millisecond + slack
	for _, test := range []struct{ plugin, at, end string }{
		{"life late", "before Serve", ""},
		{"life", "idle", ""},
		{"life", "idle", "exit"},
		{"life", "idle", "panic"},
		{"life", "in a call", ""},
		{"life", "in a call", "exit"},
		{"life endless", "idle", ""},
	} {
		t.Run(fmt.Sprintf("%s, %s, %s", test.plugin, test.at, test.end), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			env := []string{winPluginEnv + "=" + test.plugin, winAtEnv + "=" + test.at}
			if test.end != "" {
				env = append(env, winEndEnv+"="+test.end)
			}
			winHost(t, l, env...)
			if test.at == "before Serve" {
				if len(l.processes()) == 0 {
					t.Error("the plugin is gone before it was in Serve")
				}
				l.write("serve", "")
			}
			l.deserted(bound)
			if test.plugin != "life endless" && !l.noted("main has finished") {
				t.Error("main has not run what follows Serve")
			}
		})
	}
}

// A plugin lives on with Detach, for the next host; ReattachConfig alone does
// not see to that here.
func TestWindowsDetach(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	winHost(t, l, winPluginEnv+"=life", winDetachEnv+"=Detach")
	other := newLab(t)
	winHost(t, other, winPluginEnv+"=life", winDetachEnv+"=ReattachConfig")
	// By the time that the one has gone, the other would have, too.
	other.read("main has finished")
	other.deserted(orphanTimeout + slack)

	pid := l.readPid("plugin")
	if !slices.Contains(l.processes(), pid) {
		t.Fatal("the plugin has not survived its host")
	}
	addr, err := parseAddr("tcp", l.read("address"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := l.config("")
	cfg.Cmd, cfg.Reattach = nil, &ReattachConfig{ProtocolVersion: 3, Addr: addr, Pid: pid}
	c, p := start(t, cfg)
	echo(t, dispense[*lifeClient](t, p, "life").Client, "?")
	c.Kill()
	receive(t, "Done", c.Done())
	if err := c.Err(); err != nil {
		t.Error(err)
	}
	l.read("main has finished")
}

// A plugin that was reattached to is asked to quit, and if it does not, it is
// left alone: a port does not tell whose it is.
func TestWindowsStubbornStranger(t *testing.T) {
	t.Parallel()
	cfg := config("base-stubborn")
	cfg.KillTimeout = 300 * time.Millisecond
	first, _ := start(t, cfg)
	again := *cfg
	again.Cmd, again.Reattach = nil, first.ReattachConfig()
	second, _ := start(t, &again)
	returns(t, "Kill", second.Kill)
	if first.Exited() {
		t.Error("the process was killed")
	}
	receive(t, "Done", second.Done())
	returns(t, "Kill", first.Kill)
	if !first.Exited() {
		t.Error("its own host has not killed it")
	}
}

// A plugin takes a port of the given ones that is free, or says that none is.
func TestWindowsPorts(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := uint(taken.Addr().(*net.TCPAddr).Port)
	cfg := config("base")
	cfg.MinPort, cfg.MaxPort = port, min(port+50, 1<<16-1)
	c, _ := start(t, cfg)
	addr, err := c.Start()
	if err != nil {
		t.Fatal(err)
	}
	tcp, ok := addr.(*net.TCPAddr)
	if !ok || !tcp.IP.IsLoopback() || uint(tcp.Port) <= port || uint(tcp.Port) > cfg.MaxPort {
		t.Errorf("the plugin listens at %v, and should at one of the ports %d to %d on the loopback interface", addr, port+1, cfg.MaxPort)
	}
	cfg.MaxPort = port
	none := NewClient(cfg)
	defer none.Kill()
	_, err = none.Start()
	errorSays(t, err, "no port from "+strconv.Itoa(int(port)), "exit status 1")
}

// The ending of a file says whether it can be executed.
func TestWindowsDiscover(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := []string{"a.exe", "b.EXE", "c.com", "d.bat", "e.cmd"}
	for _, name := range append(slices.Clone(want), "f", "g.txt", "h.ps1", "i.exe.txt") {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	found, err := Discover("*", dir)
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	if err != nil || !slices.Equal(found, want) {
		t.Errorf("found %v, %v; want %v", found, err, want)
	}
}

// What the system says when it cannot run a file is told in words.
func TestWindowsBadFile(t *testing.T) {
	t.Parallel()
	other := map[bool]struct{ name, machine string }{true: {"arm64", "\x64\xaa"}, false: {"amd64", "\x64\x86"}}[runtime.GOARCH == "amd64"]
	pe := make([]byte, 4096)
	copy(pe, "MZ")
	pe[60] = 0x80
	copy(pe[0x80:], "PE\x00\x00"+other.machine)
	for text, hint := range map[string]string{
		"hello":    "it is no program for windows/" + runtime.GOARCH,
		string(pe): "it is built for Windows on " + other.name,
	} {
		cfg := newLab(t).config("")
		cfg.Cmd.Path = filepath.Join(t.TempDir(), "greeter.exe")
		writeProgram(t, cfg.Cmd.Path, []byte(text), 0o700)
		if err := startError(t, NewClient(cfg)); !strings.Contains(err.Error(), hint) {
			t.Errorf("there is no hint %q: %v", hint, err)
		}
	}
}

// A grandchild that holds the output open keeps neither Kill nor the end of a
// plugin that crashed from being seen.
func TestWindowsGrandchild(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*Client, *lifeClient){
		"Kill": func(c *Client, _ *lifeClient) { c.Kill() },
		"a crash": func(_ *Client, life *lifeClient) {
			_ = life.Call("Plugin.Die", "panic", new(bool))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			c, p := start(t, l.config("windows parent"))
			life := dispense[*lifeClient](t, p, "life")
			grandchild, err := os.FindProcess(l.readPid("plugin"))
			if err != nil {
				t.Fatal(err)
			}
			defer grandchild.Wait()
			defer grandchild.Kill()
			returns(t, name, func() { end(c, life) })
			receive(t, "Done", c.Done())
		})
	}
}

func init() {
	modes["windows parent"] = func() {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), modeEnv+"=life says nothing")
		child.Stdout, child.Stderr = os.Stdout, os.Stderr
		if err := child.Start(); err != nil {
			panic(err)
		}
		lifeServe()
	}
}
