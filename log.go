package plugin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"io"
	"log/slog"
	"math"
	"regexp"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	tailSize  = 8 << 10  // how many bytes of the end of a plugin's stderr are kept
	crashSize = 64 << 10 // how many bytes of a panic and its trace are kept
)

// lineWriter splits what is written to it into lines.
type lineWriter struct {
	max  int                        // the length at which lines are cut
	emit func(line []byte, cut int) // gets a line, and how many bytes were cut off

	mu   sync.Mutex // serialises writing; guards the fields below
	line []byte
	cut  int
}

// Write never fails.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for part := range bytes.Lines(p) {
		text, ended := bytes.CutSuffix(part, []byte{'\n'})
		kept := min(len(text), w.max-len(w.line))
		w.line = append(w.line, text[:kept]...)
		w.cut += len(text) - kept
		if ended {
			w.endLineLocked()
		}
	}
	return len(p), nil
}

// Close emits the last line if it has no line feed.
func (w *lineWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.line) > 0 {
		w.endLineLocked()
	}
	return nil
}

func (w *lineWriter) endLineLocked() {
	w.emit(bytes.TrimSuffix(w.line, []byte{'\r'}), w.cut)
	w.line = w.line[:0]
	w.cut = 0
}

// stderrLog logs the lines of a plugin's stderr, and keeps those that may explain its
// end.
type stderrLog struct {
	logger hclog.Logger
	tail   tail
	crash  []byte // a panic or fatal error and its trace
	more   int    // how many more lines may be part of it
}

func (l *stderrLog) line(line []byte, cut int) {
	if level, message, args, ok := parseRecord(line); ok && cut == 0 {
		l.logger.Log(level, message, args...)
		return
	}
	level, line := textLevel(line)
	if l.crashing(line, level) {
		level = hclog.Error
	}
	l.logger.Log(cmp.Or(level, hclog.Debug), printable(string(line))+cutMark(cut))
}

// crashing reports whether a line is part of a panic or fatal error, and keeps the line
// if it is. Without a trace, this ends after 50 lines: the plugin only printed something.
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

// parseRecord parses a JSON record of hclog or slog. It sorts the values by their keys.
func parseRecord(line []byte) (level hclog.Level, message string, args []any, ok bool) {
	var record map[string]json.RawMessage
	if json.Unmarshal(line, &record) != nil {
		return level, "", nil, false
	}
	names := []string{"level", "msg", "time"} // slog's
	if record["@level"] != nil || record["@message"] != nil {
		names = []string{"@level", "@message", "@timestamp"}
	}
	var texts [3]string
	for i, name := range names {
		if json.Unmarshal(record[name], &texts[i]) != nil && i < 2 {
			return level, "", nil, false
		}
		delete(record, name)
	}
	for _, key := range sortedKeys(record) {
		var value any = rawJSON{record[key]}
		if text := ""; record[key][0] == '"' && json.Unmarshal(record[key], &text) == nil {
			value = text
		}
		args = append(args, oneLine(key), value)
	}
	if t := texts[2]; t != "" {
		if at, err := time.Parse(time.RFC3339Nano, t); err == nil {
			t = at.Format(hclog.TimeFormat)
		}
		args = append(args, "timestamp", t)
	}
	level = parseLevel(texts[0])
	return level, oneLine(texts[1]), args, level != hclog.NoLevel
}

// rawJSON is a value of a record that is not a string. JSON escapes control
// characters.
type rawJSON struct{ json.RawMessage }

func (r rawJSON) String() string { return printable(string(r.RawMessage)) }

// parseLevel parses a level of hclog or slog. The latter may have an offset.
func parseLevel(text string) hclog.Level {
	if level := hclog.LevelFromString(text); level != hclog.NoLevel && level != hclog.Off {
		return level
	}
	var l slog.Level
	if l.UnmarshalText([]byte(text)) != nil {
		return hclog.NoLevel
	}
	return min(max(hclog.Info+hclog.Level(l>>2), hclog.Trace), hclog.Error) // levels of slog are four apart
}

// levelPatterns are compiled when they are needed, because plugins do not need them.
// The first matches a level in brackets, with or without the date and time of package
// log, and the prefix of slog's default handler. The second matches the beginning of a
// line of slog's TextHandler.
var levelPatterns = sync.OnceValue(func() [2]*regexp.Regexp {
	return [2]*regexp.Regexp{
		regexp.MustCompile(`^(?:\d{4}/\d\d/\d\d )?(?:\d\d:\d\d:\d\d(?:\.\d+)? )?\[(TRACE|DEBUG|INFO|WARN|ERROR)\] ?|` +
			`^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d(?:\.\d+)? ((?:DEBUG|INFO|WARN|ERROR)(?:[+-]\d+)?) `),
		regexp.MustCompile(`^(?:time=\S+ )?level=(\S+) (?:source=\S+ )?msg=`),
	}
})

// textLevel returns the level at the beginning of a line, and the line without the
// date, time and level that the record will have.
func textLevel(line []byte) (hclog.Level, []byte) {
	if m := levelPatterns()[0].FindSubmatch(line); m != nil {
		return parseLevel(string(m[1]) + string(m[2])), line[len(m[0]):]
	}
	if m := levelPatterns()[1].FindSubmatch(line); m != nil {
		return parseLevel(string(m[1])), line
	}
	return hclog.NoLevel, line
}

// tail keeps the last tailSize bytes that are written to it.
type tail struct {
	mu  sync.Mutex // guards buf
	buf []byte
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	t.buf = t.buf[max(0, len(t.buf)-tailSize):]
	return len(p), nil
}

// String returns the last whole lines.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, after, found := bytes.Cut(t.buf, []byte{'\n'}); found && len(t.buf) == tailSize {
		return string(after)
	}
	return string(t.buf)
}

// forgiving writes to a writer of the host until it fails. A failed writer must not
// stop the plugin.
type forgiving struct{ w io.Writer } // w is nil if there is none, or if it has failed

func (f *forgiving) Write(p []byte) (int, error) {
	if f.w != nil {
		if _, err := f.w.Write(p); err != nil {
			f.w = nil
		}
	}
	return len(p), nil
}
