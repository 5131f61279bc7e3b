package plugin

import (
	"bytes"
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file turns what a plugin writes to stderr into records of the host's log, and keeps
// what may explain its end.

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
	crash  crashTrace
}

func (l *stderrLog) line(line []byte, cut int) {
	if cut == 0 {
		if r, ok := parseRecord(line); ok {
			l.logger.Log(r.level, r.message, r.args...)
			return
		}
	}
	level, text := textLevel(line)
	if level == hclog.NoLevel {
		l.crash.add(text)
		level = hclog.Debug
	} else {
		l.crash.forget()
	}
	l.logger.Log(level, printable(string(text))+cutMark(cut))
}

// crashTrace keeps the message and the trace of the last panic or fatal error.
type crashTrace struct {
	text   []byte
	traced bool // there is a trace, so the program has not only printed the message
}

// add adds a line, if it is part of a panic or fatal error.
func (c *crashTrace) add(line []byte) {
	switch {
	case bytes.HasPrefix(line, []byte("panic: ")), bytes.HasPrefix(line, []byte("fatal error: ")):
		c.forget()
	case len(c.text) == 0:
		return
	case bytes.HasPrefix(line, []byte("goroutine ")):
		c.traced = true
	}
	if len(c.text)+len(line) < crashSize {
		c.text = append(c.text, line...)
		c.text = append(c.text, '\n')
	}
}

// forget forgets a panic that the program has survived.
func (c *crashTrace) forget() { *c = crashTrace{} }

// ofExit returns the message and the trace if they are of a process that exited with that
// status, or "". With GOTRACEBACK=none there is no trace, but a Go program exits with 2.
func (c *crashTrace) ofExit(status int) string {
	if !c.traced && status != 2 {
		return ""
	}
	return strings.TrimSpace(string(c.text))
}

// record is a record of a plugin's log.
type record struct {
	level   hclog.Level
	message string
	args    []any
}

// parseRecord parses a JSON record of hclog, slog and loggers like it.
func parseRecord(line []byte) (r record, ok bool) {
	fields, ok := parseObject(line)
	if !ok {
		return r, false
	}
	level, hasLevel := fields.takeText("@level")
	message, hasMessage := fields.takeText("@message")
	at, _ := fields.takeText("@timestamp")
	if !hasLevel && !hasMessage {
		level, hasLevel = fields.takeText("level")
		message, hasMessage = fields.takeText("msg")
		if !hasMessage {
			message, hasMessage = fields.takeText("message") // zerolog's
		}
		at, _ = fields.takeText("time")
	}
	if !hasLevel || !hasMessage {
		return r, false
	}
	r = record{level: parseLevel(level), message: oneLine(message)}
	for _, f := range fields {
		// JSON loggers of the host have fields of their own that begin with @.
		r.args = append(r.args, oneLine(strings.TrimLeft(f.key, "@")), f.arg())
	}
	if at != "" {
		r.args = append(r.args, "timestamp", parseTime(at))
	}
	return r, r.level != hclog.NoLevel
}

// jsonField is a key and a value of a record.
type jsonField struct {
	key   string
	value json.RawMessage
}

// text returns the value, if it is a string.
func (f jsonField) text() (text string, ok bool) {
	err := json.Unmarshal(f.value, &text)
	return text, err == nil && f.value[0] == '"' // and not null
}

// arg returns the value for a log.
func (f jsonField) arg() any {
	if text, ok := f.text(); ok {
		return text
	}
	return rawJSON{f.value}
}

// rawJSON is a value of a record that is not a string. JSON escapes control
// characters.
type rawJSON struct{ json.RawMessage }

func (r rawJSON) String() string { return printable(string(r.RawMessage)) }

// jsonFields are a record, in its order. Keys may be there twice.
type jsonFields []jsonField

// takeText removes the first field with that key and returns it, if it is a string.
func (fields *jsonFields) takeText(key string) (text string, ok bool) {
	for i, f := range *fields {
		if f.key != key {
			continue
		}
		text, ok = f.text()
		if ok {
			*fields = slices.Delete(*fields, i, i+1)
		}
		return text, ok
	}
	return "", false
}

// parseObject parses a JSON object. Unlike a map, the result has all fields.
func parseObject(line []byte) (fields jsonFields, ok bool) {
	if !json.Valid(line) {
		return nil, false
	}
	decoder := json.NewDecoder(bytes.NewReader(line))
	start, err := decoder.Token()
	if err != nil || start != json.Delim('{') {
		return nil, false
	}
	for decoder.More() {
		key, err := decoder.Token()
		if err != nil {
			return nil, false
		}
		var value json.RawMessage
		err = decoder.Decode(&value)
		if err != nil {
			return nil, false
		}
		fields = append(fields, jsonField{key: key.(string), value: value}) // keys are strings
	}
	return fields, true
}

// pluginTime is the time of a record of a plugin, as a value of the host's record.
type pluginTime time.Time

// parseTime returns a pluginTime, or the text if it is no time.
func parseTime(text string) any {
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return text
	}
	return pluginTime(at)
}

func (t pluginTime) String() string { return time.Time(t).Format(hclog.TimeFormat) }

// MarshalText makes JSON loggers log a string.
func (t pluginTime) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// levelNames has the levels of hclog, slog, logrus, zap and zerolog.
var levelNames = map[string]hclog.Level{
	"trace": hclog.Trace, "debug": hclog.Debug, "info": hclog.Info, "warn": hclog.Warn, "warning": hclog.Warn,
	"error": hclog.Error, "dpanic": hclog.Error, "panic": hclog.Error, "fatal": hclog.Error,
}

// parseLevel parses a level. That of slog may have an offset, as in INFO+2.
func parseLevel(text string) hclog.Level {
	name, offset := text, ""
	if i := strings.IndexAny(text, "+-"); i >= 0 {
		name, offset = text[:i], text[i:]
	}
	level := levelNames[strings.ToLower(name)]
	if level == hclog.NoLevel || offset == "" {
		return level
	}
	n, err := strconv.ParseInt(offset, 10, 32)
	if errors.Is(err, strconv.ErrSyntax) {
		return hclog.NoLevel
	}
	// n is the nearest that fits, if the offset is too large. Levels of slog are four apart.
	slogLevel := 4*int64(level) + n
	return hclog.Level(min(max(slogLevel>>2, int64(hclog.Trace)), int64(hclog.Error)))
}

// textPatterns match the beginning of a line of text with a level. They are compiled when
// they are needed, because plugins do not need them.
type textPatterns struct {
	bracket *regexp.Regexp // of package log, with a level in brackets, as hclog and others have it
	slog    *regexp.Regexp // of slog's default handler
	keys    *regexp.Regexp // of slog's TextHandler
}

var levelPatterns = sync.OnceValue(func() textPatterns {
	const (
		date  = `\d{4}/\d\d/\d\d `
		clock = `\d\d:\d\d:\d\d(?:\.\d+)? `
		level = `(TRACE|DEBUG|INFO|WARN|ERROR)`
	)
	return textPatterns{
		bracket: regexp.MustCompile(`^(?:` + date + `)?(?:` + clock + `)?\[` + level + `\] ?`),
		slog:    regexp.MustCompile(`^` + date + clock + `((?:DEBUG|INFO|WARN|ERROR)(?:[+-]\d+)?) `),
		keys:    regexp.MustCompile(`^(?:time=\S+ )?level=(\S+) (?:source=\S+ )?msg=`),
	}
})

// textLevel returns the level at the beginning of a line, and the line without the
// date, time and level that the record will have.
func textLevel(line []byte) (hclog.Level, []byte) {
	patterns := levelPatterns()
	if match := patterns.bracket.FindSubmatch(line); match != nil {
		return parseLevel(string(match[1])), line[len(match[0]):]
	}
	if match := patterns.slog.FindSubmatch(line); match != nil {
		return parseLevel(string(match[1])), line[len(match[0]):]
	}
	if match := patterns.keys.FindSubmatch(line); match != nil {
		return parseLevel(string(match[1])), line
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
