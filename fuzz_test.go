package plugin

import (
	"bytes"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// ---- What a plugin prints ----

// A line is no handshake, or the same one when it is written again.
func FuzzHandshake(f *testing.F) {
	for _, test := range handshakeLines {
		f.Add(test.line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		h, err := parseHandshake(line)
		if err != nil {
			return
		}
		again, err := parseHandshake(h.String())
		if err != nil {
			t.Fatalf("%q is read, and written as %q: %v", line, h, err)
		}
		if describe(again) != describe(h) {
			t.Fatalf("%q is read as %q, and that as %q", line, describe(h), describe(again))
		}
	})
}

// Any output makes as many records as it has lines.
func FuzzLogLine(f *testing.F) {
	for _, test := range stderrLines {
		f.Add([]byte(test.line), 1)
	}
	f.Add([]byte("panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:1\nafter"), 20)
	f.Fuzz(func(t *testing.T, output []byte, split int) {
		const limit = 200
		split = max(0, min(split, len(output)))
		records, text := logged(t, limit, string(output[:split]), string(output[split:]))
		lines := bytes.Count(output, []byte("\n"))
		if len(output) > 0 && output[len(output)-1] != '\n' {
			lines++
		}
		if len(records) != lines {
			t.Errorf("%d lines make %d records", lines, len(records))
		}
		tame(t, text, lines)
		for _, r := range records {
			level, _, _ := strings.Cut(r, ":")
			if l := hclog.LevelFromString(level); l == hclog.NoLevel || l == hclog.Off || len(r) > 10*limit {
				t.Errorf("a record of %d bytes at level %q", len(r), level)
			}
		}
	})
}
