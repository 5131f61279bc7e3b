package plugin

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// logged returns what is logged of a plugin's stderr: the records as text, and
// the log. The output comes in pieces.
func logged(t testing.TB, limit int, stderr ...string) (records []string, text string) {
	t.Helper()
	var out bytes.Buffer
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: &out, Level: hclog.Trace})
	recorded := new(recordTexts)
	logger.RegisterSink(recorded)
	l := &stderrLog{logger: logger}
	w := &lineWriter{max: limit, emit: l.line}
	for _, s := range stderr {
		_, err := io.WriteString(w, s)
		check(t, err)
	}
	check(t, w.Close())
	return *recorded, out.String()
}

// recordTexts collects the records of a logger.
type recordTexts []string

func (r *recordTexts) Accept(_ string, level hclog.Level, msg string, args ...any) {
	*r = append(*r, recordText(level, msg, args))
}

// stderrLines are lines that a plugin may write to its stderr, and their
// records.
var stderrLines = []struct{ line, record string }{
	// hclog
	{`{"@level":"info","@message":"hello","@module":"m","@timestamp":"2024-05-06T07:08:09.123456Z",` +
		`"zebra":1,"apple":"two","mango":true}`,
		`info: hello | module="m" zebra=1 apple="two" mango=true timestamp=2024-05-06T07:08:09.123Z`},
	{`{"@level":"trace","@message":"x"}`, `trace: x`},
	{`{"@level":"debug","@message":"x"}`, `debug: x`},
	{`{"@message":"x","@level":"warn"}`, `warn: x`},
	{`{"@level":"error","@message":"x","id":12345678901234567890}`, `error: x | id=12345678901234567890`},
	{`{"@level":"info","@message":"x","list":["a", 1],"o":{"p":{}},"null":null}`,
		`info: x | list=["a", 1] o={"p":{}} null=null`},
	{`{"@level":"info","@message":"x","@timestamp":"noon"}`, `info: x | timestamp="noon"`},
	{`{"1st":1,"@level":"info","@message":"x","level":"error","msg":"y","time":"noon"}`,
		`info: x | 1st=1 level="error" msg="y" time="noon"`},

	// slog's JSON and its levels
	{`{"time":"2024-05-06T07:08:09.123456789+02:00","level":"WARN","msg":"careful","z":"1","a":"2"}`,
		`warn: careful | z="1" a="2" timestamp=2024-05-06T07:08:09.123+0200`},
	{`{"level":"DEBUG-4","msg":"x"}`, `trace: x`},
	{`{"level":"DEBUG","msg":"x"}`, `debug: x`},
	{`{"level":"INFO-1","msg":"x"}`, `debug: x`},
	{`{"level":"INFO","msg":"x"}`, `info: x`},
	{`{"level":"INFO+2","msg":"x"}`, `info: x`},
	{`{"level":"ERROR","msg":"x"}`, `error: x`},
	{`{"level":"ERROR+8","msg":"x"}`, `error: x`},
	{`{"level":"ERROR-4","msg":"x"}`, `warn: x`},
	{`{"level":"INFO+17179869180","msg":"x"}`, `error: x`},
	{`{"level":"ERROR-17179869180","msg":"x"}`, `trace: x`},
	{`{"level":"ERROR+9223372036854775807","msg":"x"}`, `error: x`},
	{`{"level":"INFO+99999999999999999999","msg":"x"}`, `error: x`},

	// Of two equal keys the first is the one of the logger.
	{`{"time":"2024-05-06T07:08:09Z","level":"ERROR","msg":"x","level":3,"msg":"y","time":"noon"}`,
		`error: x | level=3 msg="y" time="noon" timestamp=2024-05-06T07:08:09.000Z`},
	{`{"level":"ERROR","msg":"x","level":"INFO","k":1,"k":2}`, `error: x | level="INFO" k=1 k=2`},
	{`{"@level":"error","@message":"x","@level":"info","@caller":"a.go:1","@@":1,"@":2}`,
		`error: x | level="info" caller="a.go:1" =1 =2`},

	// logrus, zap and zerolog
	{`{"level":"warning","msg":"x","time":"noon"}`, `warn: x | timestamp="noon"`},
	{`{"level":"fatal","ts":1700000000.5,"msg":"x"}`, `error: x | ts=1700000000.5`},
	{`{"level":"panic","msg":"x"}`, `error: x`},
	{`{"level":"dpanic","msg":"x"}`, `error: x`},
	{`{"level":"info","a":1,"time":"2024-05-06T07:08:09Z","message":"x"}`,
		`info: x | a=1 timestamp=2024-05-06T07:08:09.000Z`},
	{`{"level":"info","message":"an attribute","msg":"x"}`, `info: x | message="an attribute"`},
	{`{"@timestamp":"2024-05-06T07:08:09Z","level":"info","message":"x"}`,
		`info: x | timestamp=2024-05-06T07:08:09.000Z`},
	{`time="2024-05-06T07:08:09Z" level=warning msg=x`,
		`warn: time="2024-05-06T07:08:09Z" level=warning msg=x`},

	// package log, and slog's default handler
	{`[TRACE] x`, `trace: x`},
	{`[DEBUG] x`, `debug: x`},
	{`[INFO] x`, `info: x`},
	{`[WARN]x`, `warn: x`},
	{`[ERROR] [x]`, `error: [x]`},
	{`2024/05/06 07:08:09 [WARN] x`, `warn: x`},
	{`2024/05/06 07:08:09.123456 [ERROR] x`, `error: x`},
	{`07:08:09 [INFO] x`, `info: x`},
	{`2024/05/06 [INFO] x`, `info: x`},
	{`2026/11/25 00:05:20 INFO counting who=count`, `info: counting who=count`},
	{`2026/11/25 00:05:20.123 WARN+1 x`, `warn: x`},
	{`2026/11/25 00:05:20 DEBUG-4 x`, `trace: x`},
	{`2026/11/25 00:05:20 ERROR x`, `error: x`},

	// slog's TextHandler
	{`time=2026-11-25T00:05:20.123Z level=INFO msg=counting who=count`,
		`info: time=2026-11-25T00:05:20.123Z level=INFO msg=counting who=count`},
	{`level=ERROR+1 msg="x y"`, `error: level=ERROR+1 msg="x y"`},
	{`level=WARN source=/a/b.go:1 msg=x`, `warn: level=WARN source=/a/b.go:1 msg=x`},

	// what a terminal would obey, or a reader of the log would take for a record
	{"hello\r", `debug: hello`},
	{"hidden\rshown", `debug: hidden\rshown`},
	{"a\x00b\xff\xfe", `debug: a\x00b\xff\xfe`},
	{"\x1b[31mred", `debug: \x1b[31mred`},
	// and letters that a terminal shows
	{"1\u00a0000 \u3000 \u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469 \ufffd \"q\"",
		"debug: 1\u00a0000 \u3000 \u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469 \ufffd \"q\""},
	{"1\u00a0000 \"q\" \u202e\u2028\x1b", "debug: 1\u00a0000 \"q\" " + `\u202e\u2028\x1b`},
	{`{"@level":"info","@message":"\u001b[2J","a\u0007":"b"}`, `info: \x1b[2J | a\a="b"`},
	{`{"@level":"info","@message":"x","a":[["\u001b"]]}`, `info: x | a=[["\u001b"]]`},
	{`{"@level":"info","@message":"x\n2026-01-01T00:00:00.000Z [ERROR] y"}`,
		`info: x\n2026-01-01T00:00:00.000Z [ERROR] y`},
	{`{"@level":"info","@message":"x","k\n2026-01-01T00:00:00.000Z [ERROR] y":1}`,
		`info: x | k\n2026-01-01T00:00:00.000Z [ERROR] y=1`},
	{`{"@level":"info","@message":"x","k":"v\n2026-01-01T00:00:00.000Z [ERROR] y"}`,
		`info: x | k="v\n2026-01-01T00:00:00.000Z [ERROR] y"`},
}

func init() {
	// These are logged at Debug as they are.
	for _, line := range []string{
		`hello`, ``, "a\tb", `größer 日本`, `a line with [ERROR] in it`, `[error] x`, `[FATAL] x`,
		`recovered panic: boom`,
		`INFO x`, `2026/11/25 00:05:20 INFORMED x`, `2026/11/25 00:05:20 x`, `level=LOUD msg=x`,
		`the level=ERROR msg=x`,
		`{"@message":1}`, `{"@level":3,"@message":"x"}`, `{"@message":"x"}`, `{"@level":"info"}`,
		`{"@level":"off","@message":"x"}`,
		`{"@level":"error","@message":"half a record"`, `{"@level":"error","@message":"x"} and more`,
		`{"@level":"error","@message":"x"}{}`,
		`{"a":1,"b":[2]}`, `null`, `{}`, `{`, `{"a":` + strings.Repeat(`[`, 20000),
	} {
		stderrLines = append(stderrLines, struct{ line, record string }{line, "debug: " + line})
	}
}

// Each line is one record, with the level that it has.
func TestLogLine(t *testing.T) {
	for _, test := range stderrLines {
		got, text := logged(t, defaultLogBufferSize, test.line+"\n")
		if !slices.Equal(got, []string{test.record}) {
			t.Errorf("%.100q is logged as\n%.200q, and should be\n%.200q", test.line, got, test.record)
		}
		checkLogIsSafe(t, text, 1)
	}
}

// checkLogIsSafe checks that a log has n records, and nothing that a terminal obeys.
func checkLogIsSafe(t testing.TB, text string, n int) {
	t.Helper()
	if got := len(regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\dT`).FindAllString(text, -1)); got != n {
		t.Errorf("%d records look like %d:\n%q", n, got, text)
	}
	isControl := func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r == 0x7f }
	if i := strings.IndexFunc(text, isControl); i >= 0 {
		t.Errorf("the log has %q in it:\n%q", text[i], text)
	}
}

// A line that is too long is cut. A record that is cut is not one, and what is
// behind the cut is no line.
func TestLongLogLine(t *testing.T) {
	const limit = 40
	long := strings.Repeat("x", limit)
	record := func(message string) string { return `{"@level":"error","@message":"` + message + `"}` }
	for _, test := range []struct {
		output string
		want   []string
	}{
		{long + "\n", []string{"debug: " + long}},
		{long + "y\nz\n", []string{"debug: " + long + " [1 more bytes]", "debug: z"}},
		{long + "[ERROR] e" + long, []string{"debug: " + long + " [49 more bytes]"}},
		{"[WARN] " + long, []string{"warn: " + long[7:] + " [7 more bytes]"}},
		{record("12345678"), []string{"error: 12345678"}},
		{record("12345678") + "junk", []string{"debug: " + record("12345678") + " [4 more bytes]"}},
		{record("123456789"), []string{"debug: " + record("123456789")[:limit] + " [1 more bytes]"}},
		{"a\n\nb\r\n", []string{"debug: a", "debug: ", "debug: b"}},
		{"no end", []string{"debug: no end"}},
		{"", nil},
	} {
		if got, _ := logged(t, limit, test.output); !slices.Equal(got, test.want) {
			t.Errorf("%q is logged as\n%q, and should be\n%q", test.output, got, test.want)
		}
		if got, _ := logged(t, limit, strings.SplitAfter(test.output, "")...); !slices.Equal(got, test.want) {
			t.Errorf("byte by byte, %q is logged as\n%q", test.output, got)
		}
	}
}

// testTrace is what the runtime prints behind the message of a panic.
const testTrace = `goroutine 1 [running]:
main.run(0x1, {0xc000012345, 0x2})
	/src/main.go:12 +0x1d
created by main.start in goroutine 7
	/src/main.go:20 +0x4c

goroutine 18 [chan receive, 2 minutes]:
main.wait(...)
	/src/main.go:30
`

// testCrashes are panics and fatal errors as the runtime prints them.
var testCrashes = map[string]string{
	"panic":       "panic: boom\n\n" + testTrace,
	"long":        "panic: boom\n\n" + strings.Repeat(testTrace, 20),
	"recovered":   "panic: boom [recovered]\n\tpanic: boom again\n\n" + testTrace,
	"two lines":   "panic: two\nlines\n\n" + testTrace,
	"long text":   "panic: many\n" + strings.Repeat("lines\n", 100) + "\n" + testTrace,
	"deadlock":    "fatal error: all goroutines are asleep - deadlock!\n\n" + testTrace,
	"nil pointer": "panic: runtime error: nil pointer\n[signal SIGSEGV: code=0x1]\n\n" + testTrace,
	"registers": "fatal error: unexpected signal\n\nruntime.throw({0x1?})\n\n" + testTrace +
		"\nrax    0x0\nrip    0x4b\n",
}

// crashOf returns what is kept of a panic that a process prints.
func crashOf(stderr ...string) string {
	l := &stderrLog{logger: hclog.NewNullLogger()}
	w := &lineWriter{max: defaultLogBufferSize, emit: l.line}
	for _, s := range stderr {
		_, _ = io.WriteString(w, s) // never fails
	}
	return l.crash.ofExit(-1)
}

// Without a trace, the message of a panic counts if the exit status is that of a panic.
func TestPanicWithoutTrace(t *testing.T) {
	l := &stderrLog{logger: hclog.NewNullLogger()}
	w := &lineWriter{max: defaultLogBufferSize, emit: l.line}
	_, _ = io.WriteString(w, "panic: boom\n") // never fails
	for status, want := range map[int]string{-1: "", 0: "", 1: "", 2: "panic: boom"} {
		if got := l.crash.ofExit(status); got != want {
			t.Errorf("of a crash with the exit status %d there is kept %q", status, got)
		}
	}
}

// The lines of a panic are logged at Debug as they come, and the last panic is kept.
func TestLogOfPanics(t *testing.T) {
	for name, crash := range testCrashes {
		records, _ := logged(t, defaultLogBufferSize, crash)
		for i, line := range strings.Split(strings.TrimSuffix(crash, "\n"), "\n") {
			if records[i] != "debug: "+line {
				t.Errorf("%s: %q is logged as %q", name, line, records[i])
			}
		}
		got := crashOf("before\n", "panic: the one before\n\n", testTrace, crash)
		if got != strings.TrimSpace(crash) {
			t.Errorf("%s: of a crash there is kept %q", name, got)
		}
		long := crashOf(crash, strings.Repeat("more of it\n", crashSize/8))
		if len(long) > crashSize || !strings.HasPrefix(long, crash) {
			t.Errorf("%s: of a long crash there are kept %d bytes", name, len(long))
		}
	}
}

// Without a trace, or if the program goes on, it is no panic.
func TestLogOfNoPanic(t *testing.T) {
	for _, stderr := range []string{
		"panic: it was only a drill\n" + strings.Repeat("as ever\n", 100),
		"goroutine 1 [running]:\n",
		"panic: boom\n\n" + testTrace + `{"level":"INFO","msg":"recovered"}` + "\n",
		"a panic: boom\n\n" + testTrace,
		"panic: boom\n\n" + testTrace + "[INFO] recovered\n",
		"panic: boom\n\n" + testTrace + "panic: it was only a drill\n",
		"panic: " + strings.Repeat("x", 2*crashSize) + "\n\n" + testTrace,
	} {
		if got := crashOf(stderr); got != "" {
			t.Errorf("of %.100q there is kept %.100q", stderr, got)
		}
	}
}

// The end of stderr is kept, in whole lines.
func TestLogTail(t *testing.T) {
	var kept tail
	for i := range 10000 {
		fmt.Fprintln(&kept, "line", i)
	}
	got := kept.String()
	if !strings.HasPrefix(got, "line ") || !strings.HasSuffix(got, "line 9998\nline 9999\n") {
		t.Errorf("there are kept %.20q to %q", got, got[max(0, len(got)-20):])
	}
	if len(got) > tailSize || len(got) < tailSize-20 {
		t.Errorf("there are kept %d bytes, from %.20q", len(got), got)
	}
	fmt.Fprint(&kept, strings.Repeat("x", 10*tailSize))
	if got := kept.String(); got != strings.Repeat("x", tailSize) {
		t.Errorf("of a long line there are kept %d bytes, from %.20q", len(got), got)
	}
}
