package plugin

import (
	"bytes"
	"encoding/json"
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

// lineWriter splits what is written to it into lines. Its methods must not be called
// concurrently.
type lineWriter struct {
	max  int                        // the length at which lines are cut
	emit func(line []byte, cut int) // gets a line, and how many bytes were cut off
	line []byte
	cut  int
}

// Write never fails.
func (w *lineWriter) Write(p []byte) (int, error) {
	for part := range bytes.Lines(p) {
		text, ended := bytes.CutSuffix(part, []byte{'\n'})
		kept := min(len(text), w.max-len(w.line))
		w.line = append(w.line, text[:kept]...)
		w.cut += len(text) - kept
		if ended {
			w.endLine()
		}
	}
	return len(p), nil
}

// Close emits the last line if it has no line feed.
func (w *lineWriter) Close() error {
	if len(w.line) > 0 {
		w.endLine()
	}
	return nil
}

func (w *lineWriter) endLine() {
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
		level, message, args := parseRecord(line)
		if level != hclog.NoLevel {
			l.crash = crashTrace{} // the program has survived it
			l.logger.Log(level, message, args...)
			return
		}
	}
	level, text := textLevel(line)
	if level == hclog.NoLevel {
		l.crash.add(text)
		level = hclog.Debug
	} else {
		l.crash = crashTrace{} // as above
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
		*c = crashTrace{}
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

// ofExit returns the message and the trace if they are of a process that exited with that
// status, or "". With GOTRACEBACK=none there is no trace, but a Go program exits with 2.
func (c *crashTrace) ofExit(status int) string {
	if !c.traced && status != 2 {
		return ""
	}
	return strings.TrimSpace(string(c.text))
}

// parseRecord parses a JSON record of hclog, slog and loggers like it. It returns
// hclog.NoLevel for anything else.
func parseRecord(line []byte) (level hclog.Level, message string, args []any) {
	fields := parseObject(line)
	levelText, hasLevel := fields.takeText("@level")
	message, hasMessage := fields.takeText("@message")
	at, hasTime := fields.takeText("@timestamp")
	if !hasLevel && !hasMessage {
		levelText, hasLevel = fields.takeText("level")
		message, hasMessage = fields.takeText("msg")
		if !hasMessage {
			message, hasMessage = fields.takeText("message") // zerolog's
		}
		if !hasTime {
			at, _ = fields.takeText("time")
		}
	}
	if !hasLevel || !hasMessage {
		return hclog.NoLevel, "", nil
	}
	for _, f := range fields {
		// JSON loggers of the host have fields of their own that begin with @.
		args = append(args, oneLine(strings.TrimLeft(f.key, "@")), f.value)
	}
	if at != "" {
		args = append(args, "timestamp", parseTime(at))
	}
	return parseLevel(levelText), oneLine(message), args
}

// jsonFields are a record, in its order. Keys may be there twice.
type jsonFields []jsonField

type jsonField struct {
	key   string
	value any // a string or a rawJSON
}

// rawJSON is a value of a record that is not a string. JSON escapes control
// characters.
type rawJSON struct{ json.RawMessage }

func (r rawJSON) String() string { return printable(string(r.RawMessage)) }

// takeText removes the first field with that key and returns it, if it is a string.
func (fields *jsonFields) takeText(key string) (text string, ok bool) {
	i := slices.IndexFunc(*fields, func(f jsonField) bool { return f.key == key })
	if i < 0 {
		return "", false
	}
	text, ok = (*fields)[i].value.(string)
	if ok {
		*fields = slices.Delete(*fields, i, i+1)
	}
	return text, ok
}

// parseObject parses a JSON object. Unlike a map, the result has all fields. It is empty
// for anything else.
func parseObject(line []byte) (fields jsonFields) {
	if !json.Valid(line) {
		return nil
	}
	decoder := json.NewDecoder(bytes.NewReader(line))
	start, err := decoder.Token()
	if err != nil || start != json.Delim('{') {
		return nil
	}
	for decoder.More() {
		key, err := decoder.Token()
		if err != nil {
			return nil
		}
		value, err := decodeField(decoder)
		if err != nil {
			return nil
		}
		fields = append(fields, jsonField{key: key.(string), value: value}) // keys are strings
	}
	return fields
}

// decodeField decodes the value of a field.
func decodeField(decoder *json.Decoder) (any, error) {
	var raw json.RawMessage
	err := decoder.Decode(&raw)
	if err != nil || raw[0] != '"' {
		return rawJSON{raw}, err
	}
	var text string
	err = json.Unmarshal(raw, &text)
	return text, err
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
	name := strings.TrimRight(text, "+-0123456789")
	level := levelNames[strings.ToLower(name)]
	if level == hclog.NoLevel {
		return level
	}
	// The offset is the nearest that fits, or 0 if there is none. Levels of slog are four
	// apart, so it counts quarters of a level of hclog.
	offset, _ := strconv.ParseInt(text[len(name):], 10, 32)
	quarters := 4*int64(level) + offset
	return hclog.Level(min(max(quarters>>2, int64(hclog.Trace)), int64(hclog.Error)))
}

// levelPatterns match the beginning of a line of text with a level. The first group is cut
// off, because the record will have it; the second is the level. The patterns are compiled
// when they are needed, because plugins do not need them.
var levelPatterns = sync.OnceValue(func() []*regexp.Regexp {
	const (
		date  = `\d{4}/\d\d/\d\d `
		clock = `\d\d:\d\d:\d\d(?:\.\d+)? `
	)
	return []*regexp.Regexp{
		// of package log, with a level in brackets, as hclog and others have it
		regexp.MustCompile(`^((?:` + date + `)?(?:` + clock + `)?\[(TRACE|DEBUG|INFO|WARN|ERROR)\] ?)`),
		// of slog's default handler
		regexp.MustCompile(`^(` + date + clock + `((?:DEBUG|INFO|WARN|ERROR)(?:[+-]\d+)?) )`),
		// of slog's TextHandler, whose lines stay whole
		regexp.MustCompile(`^()(?:time=\S+ )?level=(\S+) (?:source=\S+ )?msg=`),
	}
})

// textLevel returns the level at the beginning of a line, and the line without the
// date, time and level that the record will have.
func textLevel(line []byte) (hclog.Level, []byte) {
	for _, pattern := range levelPatterns() {
		match := pattern.FindSubmatch(line)
		if match != nil {
			return parseLevel(string(match[2])), line[len(match[1]):]
		}
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
