package plugin

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
)

// describe returns what a handshake says.
func describe(h handshake) string {
	text := fmt.Sprintf("%d %v:%v %s", h.version, h.addr.Network(), h.addr, h.protocol)
	if len(h.cert) > 0 {
		text += fmt.Sprintf(" %x", h.cert)
	}
	if h.sameLibrary {
		text += " flushes"
	}
	return text
}

// sentHandshakes is how many of handshakeLines, from the first, are as this library writes them.
const sentHandshakes = 5

var handshakeLines = []struct{ line, says string }{
	// What plugins of this library and of go-plugin send.
	{"1|3|unix|/tmp/plugin123|netrpc|", "3 unix:/tmp/plugin123 netrpc"},
	{"1|3|unix|/tmp/plugin123|netrpc||flushes", "3 unix:/tmp/plugin123 netrpc flushes"},
	{"1|0|tcp|127.0.0.1:10000|netrpc|+/8BAg", "0 tcp:127.0.0.1:10000 netrpc fbff0102"},
	{"1|3|unix|/s|netrpc|+/8BAg|flushes", "3 unix:/s netrpc fbff0102 flushes"},
	{"1|3|unix|/tmp/with a space|grpc|", "3 unix:/tmp/with a space grpc"},

	// Fields may be missing, and further ones are ignored.
	{"1|3|unix|/s|netrpc", "3 unix:/s netrpc"},
	{"1|3|unix|/s|", "3 unix:/s netrpc"},
	{"1|3|unix|/s", "3 unix:/s netrpc"},
	{"1|3|unix|/s|netrpc||true", "3 unix:/s netrpc"},
	{"1|3|unix|/s|netrpc|+/8BAg|false|more", "3 unix:/s netrpc fbff0102"},
	{"1|1|tcp|[::1]:80|netrpc|\r\n", "1 tcp:[::1]:80 netrpc"},

	// Without a host, and with the usual name of this one.
	{"1|1|tcp|:80|netrpc|", "1 tcp:127.0.0.1:80 netrpc"},
	{"1|1|tcp|localhost:80|netrpc|", "1 tcp:127.0.0.1:80 netrpc"},
}

// badHandshakes are lines by a word of their errors.
var badHandshakes = map[string][]string{
	"core":    {"2|3|unix|/s|netrpc|", "01|3|unix|/s|netrpc|", "99999999999999999999|3|unix|/s", ""},
	"fields":  {"1", "1|3|unix"},
	"version": {"1||unix|/s", "1|x|unix|/s", "1|99999999999999999999|unix|/s"},
	"network": {"1|3|udp|127.0.0.1:1", "1|3||/s"},
	"address": {
		"1|3|tcp|", "1|3|tcp|127.0.0.1", "1|3|tcp|127.0.0.1:http", "1|3|tcp|127.0.0.1:65536",
		"1|3|tcp|example.com:80",
	},
	"certificate": {"1|3|unix|/s|netrpc|false", "1|3|unix|/s|netrpc|" + strings.Repeat("*", 80)},
}

// A handshake line is read as it is meant, or the error says what is wrong.
func TestHandshakeLine(t *testing.T) {
	for i, test := range handshakeLines {
		h, err := parseHandshake(test.line)
		check(t, err)
		if describe(h) != test.says {
			t.Errorf("%q is read as %q, and should be as %q", test.line, describe(h), test.says)
		}
		again, err := parseHandshake(h.String())
		check(t, err)
		if describe(again) != test.says || i < sentHandshakes && h.String() != test.line {
			t.Errorf("%q is written as %q", test.line, h)
		}
	}
	for word, lines := range badHandshakes {
		for _, line := range lines {
			_, err := parseHandshake(line)
			errorSays(t, err, word, strconv.Quote(line))
		}
	}
	long := "1|3|" + strings.Repeat("x", maxHandshake)
	_, err := parseHandshake(long)
	errorSays(t, err, strconv.Quote(long[:maxShown]))
	if n := len(err.Error()); n > 2*maxShown {
		t.Errorf("the error about a long line has %d bytes", n)
	}
}

// A handshake is found behind text without a line end.
func TestCutHandshake(t *testing.T) {
	const good = "1|3|unix|/s|netrpc|"
	for _, test := range []struct{ line, before, handshake string }{
		{good, "", good},
		{"loading... " + good, "loading... ", good},
		{"step 10" + good, "step 10", good},
		{"1|2|3 " + good, "1|2|3 ", good},
		{"\x1b[0m" + good, "\x1b[0m", good},
		{"\ufeff1|3|tcp|:1|netrpc|", "\ufeff", "1|3|tcp|:1|netrpc|"},
		{"loading... 2|3|unix|/s", "loading... ", "2|3|unix|/s"},
		{"1|x|unix|/s", "", "1|x|unix|/s"},
		{"1|3|udp|:1", "", "1|3|udp|:1"},
		{"10|", "", "10|"},
	} {
		before, handshake, found := cutHandshake([]byte(test.line))
		if !found || string(before) != test.before || string(handshake) != test.handshake {
			t.Errorf("%q is %q and %q, %v", test.line, before, handshake, found)
		}
	}
	for _, line := range []string{"", "1", "|1", "loading...", "a 1|b", "1 |3|unix|/s"} {
		before, _, found := cutHandshake([]byte(line))
		if found || string(before) != line {
			t.Errorf("%q is taken for a handshake", line)
		}
	}
}

// What a plugin is told about its host is read as it was written, and anything
// else is nothing.
func TestHostInfo(t *testing.T) {
	for _, h := range []hostInfo{
		newHostInfo(false),
		{Pid: 4194304},
		{Pid: 7, Started: 1<<64 - 1, Detached: true, Binary: passedFile{Descriptor: 3, Identity: "1:2"}},
		{Pid: 1, Lifeline: passedFile{Descriptor: 3, Identity: "1:2"}, Stdout: passedFile{Descriptor: 4}},
	} {
		if got := parseHostInfo(h.String()); got != h {
			t.Errorf("%v is read as %v", h, got)
		}
	}
	for _, text := range []string{
		"", "1", "x", "null", "[]", `{"Pid":1`, `{"Pid":1}x`, `{"Pid":"1"}`, `{"Pid":99999999999999999999}`,
		`{"Pid":1,"Started":-1}`, `{"Pid":1,"Lifeline":{"Descriptor":"x"}}`,
	} {
		if got := parseHostInfo(text); got != (hostInfo{}) {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

// A plugin serves the highest version that the host lists, or its own lowest.
func TestNegotiate(t *testing.T) {
	for _, test := range []struct {
		own  []int
		host string
		want int
	}{
		{[]int{1, 2, 3}, "3,2,1", 3},
		{[]int{1, 2, 3}, "2,4", 2},
		{[]int{1, 2, 10}, "10,9,2", 10},
		{[]int{1, 2, 3}, "4", 1},
		{[]int{2, 3}, "", 2},
		{[]int{0}, "0", 0},
		{[]int{1, 12}, "1,2", 1},
		{[]int{2, 3}, "x,,3y,2", 2},
	} {
		sets := make(map[int]PluginSet)
		for _, version := range test.own {
			sets[version] = PluginSet{}
		}
		if got := negotiate(sets, test.host); got != test.want {
			t.Errorf("of %d, %d is served to a host with %q", test.own, got, test.host)
		}
	}
}
