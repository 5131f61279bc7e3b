package plugin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
)

const (
	// tailSize is how much of the end of a plugin's stderr is kept, in bytes.
	tailSize = 8 << 10
	// crashSize is how much of a panic and its trace is kept, in bytes.
	crashSize = 64 << 10
)

// lineWriter cuts what is written to it into lines.
type lineWriter struct {
	max  int                         // a longer line is cut there
	emit func(line []byte, left int) // gets a line, and how many bytes of it were left out

	mu   sync.Mutex // serialises writing; guards the fields below
	line []byte
	left int
}

// Write never fails.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for rest := p; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte{'\n'})
		room := min(len(part), w.max-len(w.line))
		w.line = append(w.line, part[:room]...)
		w.left += len(part) - room
		if ended {
			w.end()
		}
		rest = after
	}
	return len(p), nil
}

// Close emits a last line that was not ended.
func (w *lineWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.line) > 0 {
		w.end()
	}
	return nil
}

func (w *lineWriter) end() {
	line, left := bytes.TrimSuffix(w.line, []byte{'\r'}), w.left
	w.line, w.left = w.line[:0], 0
	w.emit(line, left)
}

// cutMark says that a line was cut.
func cutMark(left int) string {
	if left == 0 {
		return ""
	}
	return fmt.Sprintf(" [%d more bytes]", left)
}

// stderrLog makes log records of the lines of a plugin's stderr, and keeps
// what may be needed to say why the plugin died.
type stderrLog struct {
	logger hclog.Logger
	tail   tail
	crash  []byte // a panic or fatal error and the lines behind it
	more   int    // how many more lines may belong to it
}

func (l *stderrLog) line(line []byte, left int) {
	level, message, args, ok := parseRecord(line)
	if ok && left == 0 {
		l.logger.Log(level, message, args...)
		return
	}
	if left == 0 || level == hclog.NoLevel { // only of a record that was cut here the level is known
		level, line = textLevel(line)
	}
	if l.crashing(line, level) {
		level = hclog.Error
	}
	l.logger.Log(cmp.Or(level, hclog.Debug), printable(string(line))+cutMark(left))
}

// crashing reports whether a line belongs to a panic or a fatal error, and
// keeps it if so. A message without a trace soon ends: it was only printed.
func (l *stderrLog) crashing(line []byte, level hclog.Level) bool {
	switch {
	case bytes.HasPrefix(line, []byte("panic: ")), bytes.HasPrefix(line, []byte("fatal error: ")):
		l.crash, l.more = nil, 50
	case l.more == 0 || level != hclog.NoLevel:
		l.crash, l.more = nil, 0
		return false
	case bytes.HasPrefix(line, []byte("goroutine ")):
		l.more = math.MaxInt
	}
	l.more--
	if len(l.crash)+len(line) < crashSize {
		l.crash = append(append(l.crash, line...), '\n')
	}
	return true
}

// parseRecord reads a line of hclog's or slog's JSON. The values keep their
// order. The level is returned also for a record that cannot be read to its end.
func parseRecord(line []byte) (level hclog.Level, message string, args []any, ok bool) {
	pairs, whole := readObject(line)
	names := slogNames
	if slices.ContainsFunc(pairs, func(p pair) bool { return p.key == hclogNames.level || p.key == hclogNames.message }) {
		names = hclogNames
	}
	var timestamp, messageText any
	for _, p := range pairs {
		switch {
		case p.key == names.level && level == hclog.NoLevel:
			text, _ := p.value.(string)
			level = parseLevel(text)
		case p.key == names.message && messageText == nil:
			messageText = p.value
		case p.key == names.time && timestamp == nil:
			timestamp = p.value
		default:
			args = append(args, oneLine(p.key), p.value)
		}
	}
	message, ok = messageText.(string)
	if t, isText := timestamp.(string); isText {
		if at, err := time.Parse(time.RFC3339Nano, t); err == nil {
			t = at.Format(hclog.TimeFormat)
		}
		args = append(args, "timestamp", t)
	}
	return level, oneLine(message), args, ok && whole && level != hclog.NoLevel
}

// The names that hclog and slog give to what every record has.
var (
	hclogNames = recordNames{"@level", "@message", "@timestamp"}
	slogNames  = recordNames{"level", "msg", "time"}
)

type recordNames struct{ level, message, time string }

type pair struct {
	key   string
	value any
}

// readObject reads a JSON object as far as it can be read, and reports whether
// that is all of the line.
func readObject(line []byte) (pairs []pair, whole bool) {
	if len(line) == 0 || line[0] != '{' {
		return nil, false
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	if _, err := dec.Token(); err != nil {
		return nil, false
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return pairs, false
		}
		var raw json.RawMessage
		if dec.Decode(&raw) != nil {
			return pairs, false
		}
		var value any = rawJSON{raw}
		if text := ""; json.Unmarshal(raw, &text) == nil && raw[0] == '"' {
			value = text
		}
		pairs = append(pairs, pair{key.(string), value})
	}
	_, err := dec.Token()
	return pairs, err == nil && dec.InputOffset() == int64(len(bytes.TrimRight(line, " \t")))
}

// oneLine is printable for what must not be taken for a record of the host's.
func oneLine(s string) string {
	return strings.NewReplacer("\n", `\n`, "\t", `\t`).Replace(printable(s))
}

// rawJSON is what a record holds and is no string. JSON has no control
// characters that are not escaped.
type rawJSON struct{ json.RawMessage }

func (r rawJSON) String() string { return printable(string(r.RawMessage)) }

// parseLevel reads hclog's levels, and slog's, which may have an offset.
func parseLevel(text string) hclog.Level {
	if level := hclog.LevelFromString(text); level != hclog.NoLevel && level != hclog.Off {
		return level
	}
	var l slog.Level
	if l.UnmarshalText([]byte(text)) != nil {
		return hclog.NoLevel
	}
	return min(max(hclog.Info+hclog.Level(l>>2), hclog.Trace), hclog.Error) // slog's are four apart
}

var (
	// levelPrefix is a level in brackets, maybe behind the date and time of
	// package log, or what slog's default handler writes.
	levelPrefix = regexp.MustCompile(`^(?:\d{4}/\d\d/\d\d )?(?:\d\d:\d\d:\d\d(?:\.\d+)? )?\[(TRACE|DEBUG|INFO|WARN|ERROR)\] ?|` +
		`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d(?:\.\d+)? ((?:DEBUG|INFO|WARN|ERROR)(?:[+-]\d+)?) `)
	// slogText is how a line of slog's TextHandler begins.
	slogText = regexp.MustCompile(`^(?:time=\S+ )?level=(\S+) (?:source=\S+ )?msg=`)
)

// textLevel returns the level that is written at the front of a line, and the
// line without a prefix that says no more than the record will.
func textLevel(line []byte) (hclog.Level, []byte) {
	if m := levelPrefix.FindSubmatch(line); m != nil {
		return parseLevel(string(m[1]) + string(m[2])), line[len(m[0]):]
	}
	if m := slogText.FindSubmatch(line); m != nil {
		return parseLevel(string(m[1])), line
	}
	return hclog.NoLevel, line
}

// printable returns s, escaped if anything in it could do something to a
// terminal or a log file, except tabs and the ends of lines.
func printable(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if strings.ContainsFunc(line, func(r rune) bool { return r == utf8.RuneError || r != '\t' && r != '\n' && !strconv.IsPrint(r) }) {
			quoted := strconv.Quote(strings.TrimSuffix(line, "\n"))
			line = quoted[1:len(quoted)-1] + line[len(strings.TrimSuffix(line, "\n")):]
		}
		b.WriteString(line)
	}
	return b.String()
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex // guards buf
	buf []byte
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p[max(0, len(p)-tailSize):]...)
	if over := len(t.buf) - tailSize; over > tailSize {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

// String returns the last lines, 8 KiB at most.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.buf
	if over := len(b) - tailSize; over > 0 {
		b = b[over:]
		if _, after, found := bytes.Cut(b, []byte{'\n'}); found {
			b = after
		}
	}
	return string(b)
}

// forgiving writes to a writer of the host's until that fails: it must not stop
// the plugin.
type forgiving struct{ w io.Writer } // w is nil if there is none any more

func (f *forgiving) Write(p []byte) (int, error) {
	if f.w != nil {
		if _, err := f.w.Write(p); err != nil {
			f.w = nil
		}
	}
	return len(p), nil
}
