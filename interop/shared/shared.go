// Package shared is what the host program and the plugin program have in
// common. It knows go-plugin's API alone, as programs do that are to be built
// with either library.
package shared

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/rpc"
	"time"

	"github.com/hashicorp/go-plugin"
)

// Handshake is that of all programs here.
var Handshake = plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "INTEROP_COOKIE", MagicCookieValue: "7c1e"}

// Worker is the plugin "worker".
type Worker struct {
	// Serve returns what is served; nil in the host.
	Serve func(*plugin.MuxBroker) any
}

// Server returns what Serve returns.
func (w *Worker) Server(b *plugin.MuxBroker) (any, error) {
	if w.Serve == nil {
		return nil, errors.New("the host serves no worker")
	}
	return w.Serve(b), nil
}

// Client returns a *Remote.
func (*Worker) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) { return &Remote{b, c}, nil }

// Remote is a worker as the host has it.
type Remote struct {
	Broker *plugin.MuxBroker
	*rpc.Client
}

// Dispense starts a plugin and dispenses its worker.
func Dispense(c *plugin.Client) (plugin.ClientProtocol, *Remote, error) {
	protocol, err := c.Client()
	if err != nil {
		return nil, nil, err
	}
	v, err := protocol.Dispense("worker")
	if err != nil {
		return nil, nil, err
	}
	return protocol, v.(*Remote), nil
}

// Record has a field of each kind that travels.
type Record struct {
	Name    string
	Numbers []int
	Ratios  map[string]float64
	Bytes   []byte
	When    time.Time
	Next    *Record
}

// Lines is text to print.
type Lines struct{ Stdout, Stderr string }

// Transfer is a stream and how much to send on it.
type Transfer struct {
	ID   uint32
	Size int64
}

// Verdict is a reply that holds an error.
type Verdict struct{ Err *plugin.BasicError }

// LogLevels are the levels at which Worker's Log writes a record each.
var LogLevels = []string{"trace", "debug", "info", "warn", "error"}

// Send writes size bytes that do not repeat to w and returns their checksum.
func Send(w io.Writer, size int64) (string, error) {
	sum := sha256.New()
	_, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(w, sum)},
		io.LimitReader(rand.NewChaCha8([32]byte{1}), size), make([]byte, 64<<10))
	return text(sum), err
}

// Receive reads r to its end and returns the size and checksum of what came.
func Receive(r io.Reader) (int64, string, error) {
	sum := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	return n, text(sum), err
}

func text(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)) }

// attachment is a ReattachConfig for JSON, which has no functions.
type attachment struct {
	*plugin.ReattachConfig
	ReattachFunc string `json:",omitempty"` // hides the function where there is one
}

// WriteAttachment writes what another process needs to reattach.
func WriteAttachment(w io.Writer, rc *plugin.ReattachConfig) error {
	return json.NewEncoder(w).Encode(attachment{ReattachConfig: rc})
}

// ReadAttachment returns what WriteAttachment wrote.
func ReadAttachment(text []byte) (*plugin.ReattachConfig, error) {
	rc := &plugin.ReattachConfig{Addr: new(net.UnixAddr)}
	return rc, json.Unmarshal(text, rc)
}
