package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
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
	run        func(*host) error
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

func calls(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	for _, in := range []shared.Record{
		{},
		{Name: "x"},
		{
			Name: "grüße\x00\n", Numbers: []int{-1, 0, 1 << 40}, Ratios: map[string]float64{"a": 0.5, "": -1},
			Bytes: make([]byte, 3<<20), When: time.Unix(1e9, 5).UTC(), Next: &shared.Record{Name: "inside"},
		},
	} {
		var out shared.Record
		if err := w.Call("Plugin.Echo", in, &out); err != nil {
			return err
		}
		if !reflect.DeepEqual(in, out) {
			return fmt.Errorf("%.100v came back as %.100v", in, out)
		}
	}
	return sound(w)
}

func errorsOfCalls(h *host) error {
	_, protocol, w, err := h.start(h.config())
	if err != nil {
		return err
	}
	err = w.Call("Plugin.Fail", "it is what it is", &struct{}{})
	if err != rpc.ServerError("it is what it is") {
		return fmt.Errorf("the error of a method is %T %q", err, err)
	}
	var verdict shared.Verdict
	if err := w.Call("Plugin.Judge", "guilty", &verdict); err != nil {
		return err
	}
	if verdict.Err == nil || verdict.Err.Error() != "guilty" {
		return fmt.Errorf("the error in a reply is %v", verdict.Err)
	}
	for _, name := range []string{"Plugin.NoSuch", "NoSuch.Add", "none"} {
		if err := w.Call(name, 1, new(int)); err == nil {
			return fmt.Errorf("%s can be called", name)
		}
	}
	if err := w.Call("Plugin.Add", "no numbers", new(int)); err == nil {
		return errors.New("an argument of a wrong type is taken")
	}
	if v, err := protocol.Dispense("nobody"); err == nil {
		return fmt.Errorf("an unknown plugin is a %T", v)
	}
	return sound(w)
}

func concurrent(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	var callers sync.WaitGroup
	failed := make(chan error, 64)
	for i := range cap(failed) {
		callers.Go(func() {
			for j := range 200 {
				var sum int
				err := w.Call("Plugin.Add", [2]int{i, j}, &sum)
				if err == nil {
					err = same("a sum", sum, i+j)
				}
				if err != nil {
					failed <- err
					return
				}
			}
		})
	}
	callers.Wait()
	close(failed)
	return <-failed
}

func dispenses(h *host) error {
	_, protocol, w, err := h.start(h.config())
	if err != nil {
		return err
	}
	for range 5 {
		v, err := protocol.Dispense("worker")
		if err != nil {
			return err
		}
		other := v.(*shared.Remote)
		if err := sound(other); err != nil {
			return err
		}
		if err := other.Close(); err != nil {
			return err
		}
	}
	return sound(w)
}

type greeter struct{}

func (greeter) Greet(name string, out *string) error { *out = "welcome, " + name; return nil }

func callBack(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	for range 20 {
		id := w.Broker.NextId()
		go w.Broker.AcceptAndServe(id, greeter{})
		var got string
		if err := w.Call("Plugin.CallBack", id, &got); err != nil {
			return err
		}
		if err := same("the answer", got, "welcome, the plugin"); err != nil {
			return err
		}
	}
	return nil
}

func helper(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	for range 20 {
		var id uint32
		if err := w.Call("Plugin.Helper", new(any), &id); err != nil {
			return err
		}
		conn, err := w.Broker.Dial(id)
		if err != nil {
			return err
		}
		client := rpc.NewClient(conn)
		var got string
		if err := client.Call("Plugin.Greet", "host", &got); err != nil {
			return err
		}
		if err := same("the answer", got, "hello, host"); err != nil {
			return err
		}
		if err := client.Close(); err != nil {
			return err
		}
	}
	return nil
}

const streamSize = 64 << 20

func streamToPlugin(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	t := shared.Transfer{ID: w.Broker.NextId(), Size: streamSize}
	var got string
	call := w.Go("Plugin.Receive", t, &got, nil)
	conn, err := w.Broker.Dial(t.ID)
	if err != nil {
		return err
	}
	sent, err := shared.Send(conn, t.Size)
	if err := errors.Join(err, conn.Close(), (<-call.Done).Error); err != nil {
		return err
	}
	return same("the checksum", got, sent)
}

func streamToHost(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	t := shared.Transfer{ID: w.Broker.NextId(), Size: streamSize}
	var sent string
	call := w.Go("Plugin.Send", t, &sent, nil)
	conn, err := w.Broker.Accept(t.ID)
	if err != nil {
		return err
	}
	n, got, err := shared.Receive(conn)
	if err := errors.Join(err, conn.Close(), (<-call.Done).Error, same("the size", n, t.Size)); err != nil {
		return err
	}
	return same("the checksum", got, sent)
}

func stdio(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	var want shared.Lines
	for i := range 1000 {
		in := shared.Lines{Stdout: fmt.Sprintf("out %d\n", i), Stderr: fmt.Sprintf("err %d\x00\n", i)}
		if err := w.Call("Plugin.Print", in, &struct{}{}); err != nil {
			return err
		}
		want.Stdout += in.Stdout
		want.Stderr += in.Stderr
	}
	arrived := func() bool {
		return len(h.stdout.String()) >= len(want.Stdout) && len(h.stderr.String()) >= len(want.Stderr)
	}
	if err := await("all output arrived", arrived); err != nil {
		return err
	}
	if h.stdout.String() != want.Stdout || h.stderr.String() != want.Stderr {
		return errors.New("the output is not what was printed")
	}
	return nil
}

func logs(h *host) error {
	w, err := h.worker()
	if err != nil {
		return err
	}
	if err := w.Call("Plugin.Log", new(any), &struct{}{}); err != nil {
		return err
	}
	all := func() bool { return len(h.records("a record")) >= len(shared.LogLevels) }
	if err := await("all records arrived", all); err != nil {
		return fmt.Errorf("%w; the log is:\n%s", err, h.log.String())
	}
	for i, r := range h.records("a record") {
		err := errors.Join(
			same("the level", fmt.Sprint(r["@level"]), shared.LogLevels[i]),
			same("a number", fmt.Sprint(r["number"]), fmt.Sprint(i)),
			same("a text", fmt.Sprint(r["text"]), "with \"quotes\" and\na line"),
		)
		if err != nil {
			return fmt.Errorf("record %d, %v: %w", i, r, err)
		}
	}
	return nil
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
func (h *host) negotiated(config *plugin.ClientConfig, want int) error {
	c, _, w, err := h.start(config)
	if err != nil {
		return err
	}
	var served int
	if err := w.Call("Plugin.Version", new(any), &served); err != nil {
		return err
	}
	return errors.Join(same("the negotiated version", c.NegotiatedVersion(), want), same("the served version", served, want))
}

func versionCommon(h *host) error {
	return h.negotiated(h.versions([]string{"-versions", "1,2,3,5"}, 2, 3, 4), 3)
}

func versionLegacy(h *host) error { return h.negotiated(h.config(), 1) }

func versionLegacyHost(h *host) error { return h.negotiated(h.config("-versions", "1,2,3"), 1) }

func versionLegacyPlugin(h *host) error { return h.negotiated(h.versions(nil, 1, 2, 3), 1) }

func versionNone(h *host) error {
	return h.refused(h.versions([]string{"-versions", "7"}, 8, 9), "7", "8", "9", "ersion")
}

// refused checks that a plugin does not start, with an error that says why,
// and that nothing is left of it.
func (h *host) refused(config *plugin.ClientConfig, reasons ...string) error {
	c := h.client(config)
	return within("a start that fails", func() error {
		_, err := c.Client()
		if err == nil {
			return errors.New("it starts")
		}
		for _, reason := range reasons {
			if !strings.Contains(err.Error(), reason) {
				return fmt.Errorf("the error does not say %q: %w", reason, err)
			}
		}
		c.Kill()
		if p := config.Cmd.Process; p != nil {
			return await("the process is gone", func() bool { return gone(p.Pid) })
		}
		return nil
	})
}

func autoMTLS(h *host) error {
	config := h.config()
	config.AutoMTLS = true
	_, _, w, err := h.start(config)
	if err != nil {
		return err
	}
	return sound(w)
}

// certificate writes a self-signed certificate and its key to a file.
func certificate(path string) (*x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func withTLS(h *host) error {
	own, err := certificate(h.file("own"))
	if err != nil {
		return err
	}
	other, err := certificate(h.file("other"))
	if err != nil {
		return err
	}
	config := func(trusted *x509.Certificate) *plugin.ClientConfig {
		c := h.config("-cert", h.file("own"))
		roots := x509.NewCertPool()
		roots.AddCert(trusted)
		c.TLSConfig = &tls.Config{RootCAs: roots, ServerName: "localhost"}
		return c
	}
	_, _, w, err := h.start(config(own))
	if err == nil {
		err = sound(w)
	}
	if err != nil {
		return err
	}
	return within("a connection that is not trusted", func() error {
		if _, _, _, err := h.start(config(other)); err == nil {
			return errors.New("a certificate that is not trusted is taken")
		}
		return nil
	})
}

func secure(h *host) error {
	binary, err := os.ReadFile(*pluginFile)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(binary)
	config := h.config()
	config.SecureConfig = &plugin.SecureConfig{Checksum: sum[:], Hash: sha256.New()}
	_, _, w, err := h.start(config)
	if err == nil {
		err = sound(w)
	}
	if err != nil {
		return err
	}
	sum[0]++
	config = h.config()
	config.SecureConfig = &plugin.SecureConfig{Checksum: sum[:], Hash: sha256.New()}
	if _, err := h.client(config).Client(); !errors.Is(err, plugin.ErrChecksumsDoNotMatch) {
		return fmt.Errorf("with a wrong checksum, the error is %v", err)
	}
	return nil
}

func cookie(h *host) error {
	config := h.config()
	config.MagicCookieValue = "another"
	return h.refused(config)
}

func reattach(h *host) error {
	address, err := leaver()
	if err != nil {
		return err
	}
	rc, err := address.Reattach()
	if err != nil {
		return err
	}
	config := h.config()
	config.Cmd, config.Reattach = nil, rc
	c, protocol, w, err := h.start(config)
	if err != nil {
		return err
	}
	if err := sound(w); err != nil {
		return err
	}
	if err := protocol.Ping(); err != nil {
		return err
	}
	n, err := pid(w)
	if err != nil {
		return err
	}
	if err := same("the pid", n, address.Pid); err != nil {
		return err
	}
	c.Kill()
	return await("the process is gone", func() bool { return gone(n) })
}

func reattachGone(h *host) error {
	c, _, w, err := h.start(h.config())
	if err != nil {
		return err
	}
	rc := c.ReattachConfig()
	n, err := pid(w)
	if err != nil {
		return err
	}
	c.Kill()
	if err := await("the process is gone", func() bool { return gone(n) }); err != nil {
		return err
	}
	config := h.config()
	config.Cmd, config.Reattach = nil, rc
	if _, err := h.client(config).Client(); !errors.Is(err, plugin.ErrProcessNotFound) {
		return fmt.Errorf("the error is %v", err)
	}
	return nil
}

func ping(h *host) error {
	_, protocol, _, err := h.start(h.config())
	if err != nil {
		return err
	}
	for range 100 {
		if err := protocol.Ping(); err != nil {
			return err
		}
	}
	return nil
}

// killed kills a plugin and checks that it is gone then.
func killed(c *plugin.Client, w *shared.Remote) error {
	n, err := pid(w)
	if err != nil {
		return err
	}
	err = within("Kill", func() error { c.Kill(); return nil })
	if err != nil {
		return err
	}
	if !c.Exited() || !gone(n) {
		return errors.New("the plugin lives after Kill")
	}
	return within("Kill, once more", func() error { c.Kill(); return nil })
}

func killGraceful(h *host) error {
	c, _, w, err := h.start(h.config("-marker", h.file("finished")))
	if err != nil {
		return err
	}
	if err := killed(c, w); err != nil {
		return err
	}
	return same("that it has finished", exists(h.file("finished")), true)
}

func killHard(h *host) error {
	c, _, w, err := h.start(h.config("-linger", "-marker", h.file("finished")))
	if err != nil {
		return err
	}
	if err := killed(c, w); err != nil {
		return err
	}
	return same("that it has finished", exists(h.file("finished")), false)
}

func managed(h *host) error {
	var clients []*plugin.Client
	for range 3 {
		config := h.config()
		config.Managed = true
		c, _, _, err := h.start(config)
		if err != nil {
			return err
		}
		clients = append(clients, c)
	}
	plugin.CleanupClients()
	for _, c := range clients {
		if !c.Exited() {
			return errors.New("a managed plugin lives")
		}
	}
	return nil
}

func crash(h *host) error {
	c, protocol, w, err := h.start(h.config())
	if err != nil {
		return err
	}
	idle := w.Go("Plugin.Sleep", time.Hour, &struct{}{}, nil)
	err = within("a call during which the plugin crashes", func() error {
		err := w.Call("Plugin.Crash", new(any), &struct{}{})
		if err == nil {
			return errors.New("a call returns well though the plugin crashed")
		}
		if err := (<-idle.Done).Error; err == nil {
			return errors.New("another call returns well though the plugin crashed")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := await("Exited is true", c.Exited); err != nil {
		return err
	}
	if err := within("Ping", protocol.Ping); err == nil || strings.HasSuffix(err.Error(), "hangs") {
		return fmt.Errorf("the error of Ping, after the crash, is %v", err)
	}
	if !strings.Contains(h.log.String(), "crash on demand") {
		return errors.New("the log does not have the panic")
	}
	return within("Kill", func() error { c.Kill(); return nil })
}

func testMode(h *host) (err error) {
	cmd := exec.Command(*pluginFile, "-test")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	lines := bufio.NewScanner(stdout)
	lines.Scan()
	var address shared.Address
	if err := json.Unmarshal(lines.Bytes(), &address); err != nil {
		return fmt.Errorf("%w: %q", err, lines.Text())
	}
	// Two hosts, one after the other: the first Kill must not end the plugin.
	for range 2 {
		rc, err := address.Reattach()
		if err != nil {
			return err
		}
		config := h.config()
		config.Cmd, config.Reattach = nil, rc
		c, _, w, err := h.start(config)
		if err != nil {
			return err
		}
		if err := sound(w); err != nil {
			return err
		}
		if err := within("Kill", func() error { c.Kill(); return nil }); err != nil {
			return err
		}
		if gone(cmd.Process.Pid) {
			return errors.New("a plugin in test mode has been ended by Kill")
		}
	}
	return within("the end of the serving", func() error {
		err := stdin.Close()
		lines.Scan()
		return errors.Join(err, same("the last line", lines.Text(), "closed"))
	})
}

func grpcOnlyHost(h *host) error {
	config := h.config()
	config.AllowedProtocols = []plugin.Protocol{plugin.ProtocolGRPC}
	return h.refused(config, "netrpc", "grpc")
}
