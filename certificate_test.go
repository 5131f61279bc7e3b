package plugin_test

import (
	"crypto/ed25519"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// newCertificate makes a certificate for localhost that signs itself.
func newCertificate() (tls.Certificate, error) {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		DNSNames:              []string{"localhost"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, template, public, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// testTLS gives the host a configuration that goes with the step "tls".
func testTLS(t testing.TB, cfg *plugin.ClientConfig) {
	t.Helper()
	cert, err := newCertificate()
	check(t, err)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	check(t, err)
	pool := x509.NewCertPool()
	for name, block := range map[string]*pem.Block{
		"cert": {Type: "CERTIFICATE", Bytes: cert.Certificate[0]},
		"key":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		text := pem.EncodeToMemory(block)
		pool.AppendCertsFromPEM(text)
		check(t, os.WriteFile(filepath.Join(envValues(cfg.Cmd.Env, notesEnv)[0], name), text, 0o600))
	}
	cfg.TLSConfig = &tls.Config{RootCAs: pool, ServerName: "localhost"}
}

// The configurations of both sides are used. Where they do not fit, an error
// says so.
func TestTLS(t *testing.T) {
	t.Parallel()
	noEdit := func(*plugin.ClientConfig) {}
	otherRoots := func(c *plugin.ClientConfig) { c.TLSConfig.RootCAs = x509.NewCertPool() }
	noTLS := func(c *plugin.ClientConfig) { c.TLSConfig = nil }
	mtls := func(c *plugin.ClientConfig) { c.AutoMTLS = true }
	impatient := func(c *plugin.ClientConfig) { c.StartTimeout = 2 * time.Second }
	for name, test := range map[string]struct {
		mode string
		edit func(*plugin.ClientConfig)
		word string // in the error; "" for none
	}{
		"both":                {"tls", noEdit, ""},
		"another certificate": {"tls", otherRoots, "certificate"},
		"host only":           {"plugin", noEdit, "TLS"},
		"plugin only":         {"tls", noTLS, "TLS"},
		"imposter":            {"imposter", mtls, "certificate"},
		"deaf":                {"deaf", impatient, "ClientConfig.StartTimeout"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config(test.mode)
			testTLS(t, cfg)
			test.edit(cfg)
			c := plugin.NewClient(cfg)
			defer c.Kill()
			err := receive(t, "a connection", async(func() error { return connect(c) }))
			if test.word == "" {
				check(t, err)
				return
			}
			errorSays(t, err, test.word)
			if c.Exited() {
				t.Error("the plugin was taken for dead:", c.Err())
			}
		})
	}
}

// strangerCanCall reports whether a program that is not the host of a plugin can use it.
func strangerCanCall(t testing.TB, addr net.Addr, secure *tls.Config) bool {
	t.Helper()
	conn, err := net.Dial(addr.Network(), addr.String())
	check(t, err)
	if secure != nil {
		conn = tls.Client(conn, secure)
	}
	stranger, err := plugin.NewRPCClient(conn, testPlugins(nil))
	if err != nil {
		return false
	}
	defer stranger.Close()
	_, err = stranger.Dispense("test")
	return err == nil
}

// Under AutoMTLS only the host that started the plugin can call it, with a
// certificate made for that start.
func TestAutoMTLS(t *testing.T) {
	t.Parallel()
	cert, err := newCertificate()
	check(t, err)
	seen := map[string]bool{}
	for range 2 {
		cfg := newLab(t).config("plugin")
		cfg.AutoMTLS, cfg.TLSConfig = true, &tls.Config{} // which is ignored
		c, p := startPlugin(t, cfg)
		addr, err := c.Start()
		check(t, err)
		for name, secure := range map[string]*tls.Config{
			"no TLS":              nil,
			"no certificate":      {InsecureSkipVerify: true},
			"another certificate": {InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}},
		} {
			if strangerCanCall(t, addr, secure) {
				t.Errorf("a stranger with %s is served", name)
			}
		}
		self := mustCall[Self](t, dispense(t, p).Client, "Self", struct{}{})
		sent := envValues(self.Began, certVariable)
		if len(sent) != 1 || seen[sent[0]] {
			t.Errorf("the certificate is not a new one: %q", sent)
		}
		seen[sent[0]] = true
	}
}
