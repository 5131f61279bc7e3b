package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/rpc"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-plugin"

	"github.com/muxplug/plugin/interop/shared"
)

// checks is all that the four pairs of host and plugin must pass.
var checks = []struct {
	name, what string
	run        func(*host)
}{
	{"calls", "calls, with values of every kind", calls},
	{"errors", "errors of methods, unknown methods, unknown plugins, errors in replies", errorsOfCalls},
	{"concurrent", "64 callers at once on one client", concurrent},
	{"dispense", "several instances on one connection", dispenses},
	{"callback-dial", "the plugin dials what the host serves with `AcceptAndServe`", callBack},
	{"callback-accept", "the host dials what the plugin serves with `AcceptAndServe`", helper},
	{"stream-to-plugin", "64 MiB through a broker stream to the plugin, with a checksum", streamToPlugin},
	{"stream-to-host", "64 MiB through a broker stream to the host, with a checksum", streamToHost},
	{"stdio", "stdout and stderr sync", stdio},
	{"logs", "hclog records with levels and values", logs},
	{"version-common", "versions: the highest that both have", versionCommon},
	{"version-none", "versions: none in common is an error that names them", versionNone},
	{"version-legacy", "versions: neither side has more than `ProtocolVersion`", versionLegacy},
	{"version-legacy-host", "versions: a host with only `ProtocolVersion`, a plugin with several", versionLegacyHost},
	{"version-legacy-plugin", "versions: a host with several, a plugin with only `ProtocolVersion`", versionLegacyPlugin},
	{"automtls", "`AutoMTLS`", autoMTLS},
	{"chain", "`AutoMTLS` in a plugin that is a host, too, of a plugin made with its own host's library", chain},
	{"tls", "`TLSProvider` and `TLSConfig`; a host that trusts another certificate", withTLS},
	{"secure", "`SecureConfig`, with the right and a wrong checksum", secure},
	{"cookie", "a magic cookie that does not match", cookie},
	{"reattach", "reattach, from another process than the one that started it", reattach},
	{"reattach-gone", "reattach to what is gone: `ErrProcessNotFound`", reattachGone},
	{"ping", "`Ping`", ping},
	{"kill-graceful", "`Kill` lets a plugin finish", killGraceful},
	{"kill-hard", "`Kill` ends a plugin that does not end by itself", killHard},
	{"managed", "`CleanupClients`", managed},
	{"crash", "a plugin that panics during a call", crash},
	{"test-mode", "a plugin that serves in test mode (`ServeTestConfig`)", testMode},
	{"grpc-only-host", "a host that allows gRPC alone: a clear error", grpcOnlyHost},
}

func calls(h *host) {
	w := h.worker()
	for _, in := range []shared.Record{
		{},
		{Name: "x"},
		{
			Name: "grüße\x00\n", Numbers: []int{-1, 0, 1 << 40}, Ratios: map[string]float64{"a": 0.5, "": -1},
			Bytes: make([]byte, 3<<20), When: time.Unix(1e9, 5).UTC(), Next: &shared.Record{Name: "inside"},
		},
	} {
		var out shared.Record
		h.ok(w.Call("Plugin.Echo", in, &out))
		h.must(reflect.DeepEqual(in, out), "%.100v came back as %.100v", in, out)
	}
	h.sound(w)
}

func errorsOfCalls(h *host) {
	_, protocol, w := h.start(h.config())
	err := w.Call("Plugin.Fail", "it is what it is", &struct{}{})
	h.must(err == rpc.ServerError("it is what it is"), "the error of a method is %T %q", err, err)
	var verdict shared.Verdict
	h.ok(w.Call("Plugin.Judge", "guilty", &verdict))
	h.must(verdict.Err != nil && verdict.Err.Error() == "guilty", "the error in a reply is %v", verdict.Err)
	for _, name := range []string{"Plugin.NoSuch", "NoSuch.Add", "none"} {
		h.must(w.Call(name, 1, new(int)) != nil, "%s can be called", name)
	}
	h.must(w.Call("Plugin.Add", "no numbers", new(int)) != nil, "an argument of a wrong type is taken")
	v, err := protocol.Dispense("nobody")
	h.must(err != nil, "an unknown plugin is a %T", v)
	h.sound(w)
}

func concurrent(h *host) {
	w := h.worker()
	var callers sync.WaitGroup
	failed := make(chan error, 64)
	for i := range cap(failed) {
		callers.Go(func() {
			for j := range 200 {
				var sum int
				err := w.Call("Plugin.Add", [2]int{i, j}, &sum)
				if err != nil || sum != i+j {
					failed <- fmt.Errorf("%d+%d is %d, %w", i, j, sum, err)
					return
				}
			}
		})
	}
	callers.Wait()
	close(failed)
	h.ok(<-failed)
}

func dispenses(h *host) {
	_, protocol, w := h.start(h.config())
	for range 5 {
		v, err := protocol.Dispense("worker")
		h.ok(err)
		other := v.(*shared.Remote)
		h.sound(other)
		h.ok(other.Close())
	}
	h.sound(w)
}

type greeter struct{}

func (greeter) Greet(name string, out *string) error { *out = "welcome, " + name; return nil }

func callBack(h *host) {
	w := h.worker()
	for range 20 {
		id := w.Broker.NextId()
		go w.Broker.AcceptAndServe(id, greeter{})
		var got string
		h.ok(w.Call("Plugin.CallBack", id, &got))
		h.same("the answer", got, "welcome, the plugin")
	}
}

func helper(h *host) {
	w := h.worker()
	for range 20 {
		var id uint32
		h.ok(w.Call("Plugin.Helper", new(any), &id))
		conn, err := w.Broker.Dial(id)
		h.ok(err)
		client := rpc.NewClient(conn)
		var got string
		h.ok(client.Call("Plugin.Greet", "host", &got))
		h.same("the answer", got, "hello, host")
		h.ok(client.Close())
	}
}

const streamSize = 64 << 20

func streamToPlugin(h *host) {
	w := h.worker()
	t := shared.Transfer{ID: w.Broker.NextId(), Size: streamSize}
	var got string
	call := w.Go("Plugin.Receive", t, &got, nil)
	conn, err := w.Broker.Dial(t.ID)
	h.ok(err)
	sent, err := shared.Send(conn, t.Size)
	h.ok(errors.Join(err, conn.Close(), (<-call.Done).Error))
	h.same("the checksum", got, sent)
}

func streamToHost(h *host) {
	w := h.worker()
	t := shared.Transfer{ID: w.Broker.NextId(), Size: streamSize}
	var sent string
	call := w.Go("Plugin.Send", t, &sent, nil)
	conn, err := w.Broker.Accept(t.ID)
	h.ok(err)
	n, got, err := shared.Receive(conn)
	h.ok(errors.Join(err, conn.Close(), (<-call.Done).Error))
	h.same("the size", n, t.Size)
	h.same("the checksum", got, sent)
}

func stdio(h *host) {
	w := h.worker()
	var want shared.Lines
	for i := range 1000 {
		in := shared.Lines{Stdout: fmt.Sprintf("out %d\n", i), Stderr: fmt.Sprintf("err %d\x00\n", i)}
		h.ok(w.Call("Plugin.Print", in, &struct{}{}))
		want.Stdout += in.Stdout
		want.Stderr += in.Stderr
	}
	h.await("all output arrived", func() bool {
		return len(h.stdout.String()) >= len(want.Stdout) && len(h.stderr.String()) >= len(want.Stderr)
	})
	h.must(h.stdout.String() == want.Stdout && h.stderr.String() == want.Stderr, "the output is not what was printed")
}

func logs(h *host) {
	w := h.worker()
	h.ok(w.Call("Plugin.Log", new(any), &struct{}{}))
	h.await("all records arrived", func() bool { return len(h.records("a record")) >= len(shared.LogLevels) })
	for i, r := range h.records("a record") {
		h.same("the level", r["@level"], shared.LogLevels[i])
		h.same("a number", r["number"], float64(i))
		h.same("a text", r["text"], "with \"quotes\" and\na line")
	}
}

// versions returns the configuration of a host with these versions.
func (h *host) versions(args []string, versions ...int) *plugin.ClientConfig {
	config := h.config(args...)
	config.Plugins = nil
	config.VersionedPlugins = make(map[int]plugin.PluginSet)
	for _, v := range versions {
		config.VersionedPlugins[v] = plugin.PluginSet{"worker": &shared.Worker{}}
	}
	return config
}

// negotiated checks which version a host and a plugin agree on.
func (h *host) negotiated(config *plugin.ClientConfig, want int) {
	c, _, w := h.start(config)
	var served int
	h.ok(w.Call("Plugin.Version", new(any), &served))
	h.same("the negotiated version", c.NegotiatedVersion(), want)
	h.same("the served version", served, want)
}

func versionCommon(h *host) {
	h.negotiated(h.versions([]string{"-versions", "1,2,3,5"}, 2, 3, 4), 3)
}

func versionLegacy(h *host) { h.negotiated(h.config(), 1) }

func versionLegacyHost(h *host) { h.negotiated(h.config("-versions", "1,2,3"), 1) }

func versionLegacyPlugin(h *host) { h.negotiated(h.versions(nil, 1, 2, 3), 1) }

func versionNone(h *host) {
	h.refused(h.versions([]string{"-versions", "7"}, 8, 9), "7", "8", "9", "ersion")
}

// refused checks that a plugin does not start, with an error that says why,
// and that nothing is left of it.
func (h *host) refused(config *plugin.ClientConfig, reasons ...string) {
	c := h.client(config)
	_, err := c.Client()
	h.must(err != nil, "it starts")
	for _, reason := range reasons {
		h.must(strings.Contains(err.Error(), reason), "the error does not say %q: %v", reason, err)
	}
	c.Kill()
	if p := config.Cmd.Process; p != nil {
		h.await("the process is gone", func() bool { return gone(p.Pid) })
	}
}

func autoMTLS(h *host) {
	config := h.config()
	config.AutoMTLS = true
	_, _, w := h.start(config)
	h.sound(w)
}

func chain(h *host) {
	config := h.config()
	config.AutoMTLS = true
	_, _, w := h.start(config)
	var sum int
	h.ok(w.Call("Plugin.Chain", *innerFile, &sum))
	h.same("2+3, by the plugin's plugin", sum, 5)
}

// certificate writes a self-signed certificate and its key to a file.
func (h *host) certificate(path string) *x509.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.ok(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	h.ok(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	h.ok(err)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	h.ok(os.WriteFile(path, text, 0o600))
	cert, err := x509.ParseCertificate(der)
	h.ok(err)
	return cert
}

func withTLS(h *host) {
	own, other := h.certificate(h.file("own")), h.certificate(h.file("other"))
	config := func(trusted *x509.Certificate) *plugin.ClientConfig {
		c := h.config("-cert", h.file("own"))
		roots := x509.NewCertPool()
		roots.AddCert(trusted)
		c.TLSConfig = &tls.Config{RootCAs: roots, ServerName: "localhost"}
		return c
	}
	_, _, w := h.start(config(own))
	h.sound(w)
	_, _, err := shared.Dispense(h.client(config(other)))
	h.must(err != nil, "a certificate that is not trusted is taken")
}

func secure(h *host) {
	binary, err := os.ReadFile(*pluginFile)
	h.ok(err)
	sum := sha256.Sum256(binary)
	config := h.config()
	config.SecureConfig = &plugin.SecureConfig{Checksum: sum[:], Hash: sha256.New()}
	_, _, w := h.start(config)
	h.sound(w)
	sum[0]++
	config = h.config()
	config.SecureConfig = &plugin.SecureConfig{Checksum: sum[:], Hash: sha256.New()}
	_, err = h.client(config).Client()
	h.must(errors.Is(err, plugin.ErrChecksumsDoNotMatch), "with a wrong checksum, the error is %v", err)
}

func cookie(h *host) {
	config := h.config()
	config.MagicCookieValue = "another"
	h.refused(config)
}

func reattach(h *host) {
	rc := h.leave()
	config := h.config()
	config.Cmd, config.Reattach = nil, rc
	c, protocol, w := h.start(config)
	h.sound(w)
	h.ok(protocol.Ping())
	h.same("the pid", h.pid(w), rc.Pid)
	c.Kill()
	h.await("the process is gone", func() bool { return gone(rc.Pid) })
}

func reattachGone(h *host) {
	c, _, w := h.start(h.config())
	rc, pid := c.ReattachConfig(), h.pid(w)
	c.Kill()
	h.await("the process is gone", func() bool { return gone(pid) })
	config := h.config()
	config.Cmd, config.Reattach = nil, rc
	_, err := h.client(config).Client()
	h.must(errors.Is(err, plugin.ErrProcessNotFound), "the error is %v", err)
}

func ping(h *host) {
	_, protocol, _ := h.start(h.config())
	for range 100 {
		h.ok(protocol.Ping())
	}
}

// killed kills a plugin and checks that it is gone then.
func (h *host) killed(c *plugin.Client, w *shared.Remote) {
	pid := h.pid(w)
	c.Kill()
	h.must(c.Exited() && gone(pid), "the plugin lives after Kill")
	c.Kill()
}

func killGraceful(h *host) {
	c, _, w := h.start(h.config("-marker", h.file("finished")))
	h.killed(c, w)
	h.must(exists(h.file("finished")), "it has not finished")
}

func killHard(h *host) {
	c, _, w := h.start(h.config("-linger", "-marker", h.file("finished")))
	h.killed(c, w)
	h.must(!exists(h.file("finished")), "it has finished")
}

func managed(h *host) {
	var clients []*plugin.Client
	for range 3 {
		config := h.config()
		config.Managed = true
		c, _, _ := h.start(config)
		clients = append(clients, c)
	}
	plugin.CleanupClients()
	for _, c := range clients {
		h.must(c.Exited(), "a managed plugin lives")
	}
}

func crash(h *host) {
	c, protocol, w := h.start(h.config())
	idle := w.Go("Plugin.Sleep", time.Hour, &struct{}{}, nil)
	h.must(w.Call("Plugin.Crash", new(any), &struct{}{}) != nil, "a call returns well though the plugin crashed")
	h.must((<-idle.Done).Error != nil, "another call returns well though the plugin crashed")
	h.await("Exited is true", c.Exited)
	h.must(protocol.Ping() != nil, "Ping returns well after the crash")
	h.await("the log has the panic", func() bool {
		log := h.log.String()
		// go-plugin before 1.6 may close the pipe before it has read all, and logs that.
		return strings.Contains(log, "crash on demand") || strings.Contains(log, "file already closed")
	})
	c.Kill()
}

func testMode(h *host) {
	cmd := exec.Command(*pluginFile, "-test")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	h.ok(err)
	stdout, err := cmd.StdoutPipe()
	h.ok(err)
	h.ok(cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	lines := bufio.NewScanner(stdout)
	lines.Scan()
	rc, err := shared.ReadAttachment(lines.Bytes())
	h.ok(err)
	// Two hosts, one after the other: the first Kill must not end the plugin.
	for range 2 {
		config := h.config()
		config.Cmd, config.Reattach = nil, rc
		c, _, w := h.start(config)
		h.sound(w)
		c.Kill()
		h.must(!gone(cmd.Process.Pid), "a plugin in test mode has been ended by Kill")
	}
	h.ok(stdin.Close())
	lines.Scan()
	h.same("the last line", lines.Text(), "closed")
}

func grpcOnlyHost(h *host) {
	config := h.config()
	config.AllowedProtocols = []plugin.Protocol{plugin.ProtocolGRPC}
	h.refused(config, "netrpc", "grpc")
}
