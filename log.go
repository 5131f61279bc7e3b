package plugin

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
)

const (
	// tailSize is how much of the end of a plugin's stderr is kept, in bytes.
	tailSize = 8 << 10
	// crashSize is how much of a panic and its trace is kept, in bytes.
	crashSize = 64 << 10
	// noteTimeout is how long the host's logger may take for a note.
	noteTimeout = 500 * time.Millisecond
)

// notes is a logger of the host's for what this library itself has to say,
// with Debug, Warn and Error: whatever that logger does, it stops nobody. While
// it does not return, nothing more is noted. The other methods are its own.
type notes struct {
	hclog.Logger
	late atomic.Pointer[chan struct{}] // closed when a note that took too long is through
}

func newNotes(logger hclog.Logger) *notes {
	if n, ok := logger.(*notes); ok {
		return n
	}
	return &notes{Logger: logger}
}

func (n *notes) Debug(msg string, args ...any) { n.note(n.Logger.Debug, msg, args) }
func (n *notes) Warn(msg string, args ...any)  { n.note(n.Logger.Warn, msg, args) }
func (n *notes) Error(msg string, args ...any) { n.note(n.Logger.Error, msg, args) }

func (n *notes) note(log func(string, ...any), msg string, args []any) {
	if late := n.late.Load(); late != nil && !isClosed(*late) {
		return
	}
	done := make(chan struct{})
	go func() { // ends when the logger returns
		defer close(done)
		defer func() { _ = recover() }()
		log(msg, args...)
	}()
	if !waitFor(noteTimeout, done) {
		n.late.Store(&done)
	}
}

// frameTrace takes the frames of a session to its log.
type frameTrace chan tracedFrame

type tracedFrame struct {
	received bool
	header   [frameHeader]byte
}

// add adds a frame, unless the logger is too slow for it.
func (t frameTrace) add(header []byte, received bool) {
	select {
	case t <- tracedFrame{received, [frameHeader]byte(header)}:
	default:
	}
}

// log logs the frames until the session has ended. Nothing waits for it,
// because the logger is the caller's.
func (t frameTrace) log(logger hclog.Logger, ended <-chan struct{}) {
	defer func() { _ = recover() }()
	logger = logger.Named("wire")
	for {
		select {
		case f := <-t:
			f.log(logger)
		case <-ended:
			return
		}
	}
}

func (f *tracedFrame) log(logger hclog.Logger) {
	from, h := "host", f.header
	if f.received {
		from = "plugin"
	}
	name := func(names []string, i byte) string {
		if int(i) < len(names) {
			return names[i]
		}
		return fmt.Sprint(i)
	}
	logger.Trace("frame", "from", from,
		"type", name([]string{"data", "window", "ping", "goaway"}, h[1]),
		"flags", name([]string{"", "SYN", "ACK", "", "FIN", "", "", "", "RST"}, h[3]),
		"stream", binary.BigEndian.Uint32(h[4:]), "length", binary.BigEndian.Uint32(h[8:]))
}

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

// end emits the line. A panic in emit, which calls the host's logger, costs
// that line.
func (w *lineWriter) end() {
	var err error
	defer recoverTo(&err)
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
// what may be needed to say why the plugin died. Its methods are called by one
// goroutine.
type stderrLog struct {
	logger hclog.Logger
	tail   tail

	crash      []byte // the panic or fatal error that was printed last, with its trace
	inCrash    bool   // the lines belong to it
	inTraces   bool   // its message is over
	crashLines int    // lines since it began
}

func (l *stderrLog) line(line []byte, left int) {
	level, message, args, ok := parseRecord(line)
	if ok && left == 0 {
		l.logger.Log(level, message, args...)
		return
	}
	switch { // of a record that was cut, the level may be known
	case left > 0 && level != hclog.NoLevel:
	case l.crashing(line):
		level = hclog.Error
	default:
		level = cmp.Or(textLevel(line), hclog.Debug)
	}
	l.logger.Log(level, printable(string(line))+cutMark(left))
}

// crashing reports whether a line belongs to a panic or a fatal error, and
// keeps it if so. Where no trace follows, somebody has only printed the word.
func (l *stderrLog) crashing(line []byte) bool {
	const longestMessage = 50
	switch {
	case bytes.HasPrefix(line, []byte("panic: ")), bytes.HasPrefix(line, []byte("fatal error: ")):
		if !l.inCrash {
			l.crash = nil
		}
		l.inCrash, l.inTraces, l.crashLines = true, false, 0
	case l.inCrash && bytes.HasPrefix(line, []byte("goroutine ")):
		l.inTraces = true
	case l.inCrash && l.inTraces && !isTrace(line), l.crashLines == longestMessage && !l.inTraces:
		l.inCrash = false
	}
	l.crashLines++
	if room := crashSize - len(l.crash); l.inCrash && len(line) < room {
		l.crash = append(append(l.crash, line...), '\n')
	}
	return l.inCrash
}

// isTrace reports whether a line can be part of what the Go runtime prints
// behind a panic's message.
func isTrace(line []byte) bool {
	for _, prefix := range []string{"\t", "goroutine ", "created by ", "panic", "[", "...", "runtime", "exit status"} {
		if bytes.HasPrefix(line, []byte(prefix)) {
			return true
		}
	}
	fields := bytes.Fields(line)
	return len(fields) == 0 || bytes.HasSuffix(line, []byte(")")) ||
		len(fields) == 2 && bytes.HasPrefix(fields[1], []byte("0x")) // a register
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
			level = parseLevel(p.value)
		case p.key == names.message && messageText == nil:
			messageText = p.value
		case p.key == names.time && timestamp == nil:
			timestamp = p.value
		default:
			args = append(args, oneLine(p.key), printableValue(p.value))
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
	dec.UseNumber()
	if _, err := dec.Token(); err != nil {
		return nil, false
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return pairs, false
		}
		var value any
		if dec.Decode(&value) != nil {
			return pairs, false
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

// printableValue is printable for all that is inside a value. hclog quotes
// plain strings itself.
func printableValue(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = printableInside(v[i])
		}
	case map[string]any:
		return printableInside(v)
	}
	return v
}

func printableInside(v any) any {
	switch v := v.(type) {
	case string:
		return oneLine(v)
	case []any:
		for i := range v {
			v[i] = printableInside(v[i])
		}
	case map[string]any:
		for key, value := range v {
			delete(v, key)
			v[oneLine(key)] = printableInside(value)
		}
	}
	return v
}

// parseLevel reads hclog's levels, and slog's, which may have an offset, as in
// DEBUG-4; slog's levels are four apart.
func parseLevel(v any) hclog.Level {
	text, _ := v.(string)
	name, offset := text, 0
	if i := strings.IndexAny(text, "+-"); i > 0 {
		n, err := strconv.Atoi(text[i:])
		if err != nil {
			return hclog.NoLevel
		}
		name, offset = text[:i], n
	}
	level := hclog.LevelFromString(name)
	if level == hclog.Off { // no record has that level
		return hclog.NoLevel
	}
	if level == hclog.NoLevel || offset == 0 {
		return level
	}
	steps := offset / 4
	if offset < 0 && offset%4 != 0 {
		steps-- // a level between two is the lower one
	}
	return max(hclog.Trace, min(hclog.Error, level+hclog.Level(steps)))
}

// textLevel is the level that is written at the front of a line, or behind the
// date and time of package log.
func textLevel(line []byte) hclog.Level {
	for _, layout := range []string{"0000/00/00 ", "00:00:00", ".000000", " "} {
		if matches(line, layout) {
			line = line[len(layout):]
		}
	}
	for level := hclog.Trace; level <= hclog.Error; level++ {
		if bytes.HasPrefix(line, []byte("["+strings.ToUpper(level.String())+"]")) {
			return level
		}
	}
	return hclog.NoLevel
}

// matches reports whether line begins like layout, where 0 is any digit.
func matches(line []byte, layout string) bool {
	if len(line) < len(layout) {
		return false
	}
	for i := range len(layout) {
		digit := '0' <= line[i] && line[i] <= '9'
		if line[i] != layout[i] && !(layout[i] == '0' && digit) {
			return false
		}
	}
	return true
}

// printable returns s with everything escaped that could do something to a
// terminal or a log file, except tabs and the ends of lines.
func printable(s string) string {
	bad := func(r rune) bool {
		return r == utf8.RuneError || r != '\t' && r != '\n' && !strconv.IsPrint(r)
	}
	if strings.IndexFunc(s, bad) < 0 {
		return s
	}
	var b strings.Builder
	for rest := s; len(rest) > 0; {
		r, size := utf8.DecodeRuneInString(rest)
		if bad(r) {
			quoted := strconv.Quote(rest[:size])
			b.WriteString(quoted[1 : len(quoted)-1])
		} else {
			b.WriteString(rest[:size])
		}
		rest = rest[size:]
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

// heedless writes to a writer of the host's, and goes on without it when that
// fails or panics: the plugin must not be stopped by it.
type heedless struct {
	w      io.Writer
	logger hclog.Logger
	failed bool
}

func (h *heedless) Write(p []byte) (int, error) {
	if h.failed {
		return len(p), nil
	}
	err := h.write(p)
	if h.failed = err != nil; h.failed {
		h.logger.Warn("the plugin's output cannot be written and is dropped from here on", "error", err)
	}
	return len(p), nil
}

func (h *heedless) write(p []byte) (err error) {
	defer recoverTo(&err)
	n, err := h.w.Write(p)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	return err
}
