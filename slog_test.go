package plugin_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

// slogRecorder is a handler that keeps its records.
type slogRecorder struct {
	level slog.LevelVar

	mu  sync.Mutex // guards all
	all []slog.Record
}

func (r *slogRecorder) Enabled(_ context.Context, level slog.Level) bool {
	return level >= r.level.Level()
}
func (r *slogRecorder) WithAttrs([]slog.Attr) slog.Handler { panic("not used") }
func (r *slogRecorder) WithGroup(string) slog.Handler      { panic("not used") }

func (r *slogRecorder) Handle(_ context.Context, record slog.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, record.Clone())
	return nil
}

// take returns the records so far as "LEVEL message key=value", and forgets them.
func (r *slogRecorder) take() (texts []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, record := range r.all {
		text := record.Level.String() + " " + record.Message
		record.Attrs(func(a slog.Attr) bool {
			text += fmt.Sprintf(" %s=%v", a.Key, a.Value)
			return true
		})
		texts = append(texts, text)
	}
	r.all = nil
	return texts
}

func newSlogRecorder() (hclog.Logger, *slogRecorder) {
	r := new(slogRecorder)
	r.level.Set(slog.LevelDebug - 4)
	return plugin.NewSlogLogger(r), r
}

// checkTaken checks what was logged.
func checkTaken(t *testing.T, r *slogRecorder, want ...string) {
	t.Helper()
	if got := r.take(); !slices.Equal(got, want) {
		t.Errorf("logged\n%q, and not\n%q", got, want)
	}
}

// Each level, name and argument of hclog arrives as hclog's users know it.
func TestSlogLogger(t *testing.T) {
	errBoom := errors.New("boom")
	for _, test := range []struct {
		name string
		log  func(l hclog.Logger)
		want []string
	}{
		{"levels", func(l hclog.Logger) {
			l.Trace("t")
			l.Debug("d")
			l.Info("i")
			l.Warn("w")
			l.Error("e")
			l.Log(hclog.Warn, "x")
			l.Log(hclog.NoLevel, "nothing")
		}, []string{"DEBUG-4 t", "DEBUG d", "INFO i", "WARN w", "ERROR e", "WARN x"}},
		{"names", func(l hclog.Logger) {
			a := l.Named("a")
			a.Info("x")
			a.Named("b").Info("x")
			a.ResetNamed("c").Info("x", "k", 1)
			l.Info(a.Named("d").Name())
		}, []string{"INFO x logger=a", "INFO x logger=a.b", "INFO x logger=c k=1", "INFO a.d"}},
		{"With", func(l hclog.Logger) {
			w := l.With("b", 1, "a", 2).With("b", 3)
			w.Info("x", "c", 4)
			w.Named("n").Info("x")
			l.With("odd").Info("x")
			l.Info(fmt.Sprint(w.ImpliedArgs()))
		}, []string{
			"INFO x a=2 b=3 c=4", "INFO x logger=n a=2 b=3",
			"INFO x EXTRA_VALUE_AT_END=odd", "INFO [a 2 b 3]",
		}},
		{"arguments", func(l hclog.Logger) {
			l.Info("x", "k", "v", "odd")
			l.Info("x", 7, "v")
			l.Info("x", hclog.CapturedStacktrace("trace"))
			l.Info("x", "error", errBoom, "list", []int{1, 2}, "nil", nil)
		}, []string{
			"INFO x k=v EXTRA_VALUE_AT_END=odd", "INFO x 7=v", "INFO x stacktrace=trace",
			"INFO x error=boom list=[1 2] nil=<nil>",
		}},
		{"formats", func(l hclog.Logger) {
			l.Info("x", "f", hclog.Fmt("%d beans/%s", 3, "day"), "h", hclog.Hex(17), "o", hclog.Octal(8))
			l.Info("x", "b", hclog.Binary(5), "q", hclog.Quote("a\nb"))
		}, []string{"INFO x f=3 beans/day h=0x11 o=010", `INFO x b=0b101 q="a\nb"`}},
		{"package log", func(l hclog.Logger) {
			l.Named("n").StandardLogger(nil).Print("x")
			infer := &hclog.StandardLoggerOptions{InferLevels: true}
			l.StandardLogger(infer).Print("[WARN] x")
			fmt.Fprintln(l.With("k", 1).StandardWriter(infer), "[ERROR] x")
		}, []string{"INFO x logger=n", "WARN x", "ERROR x k=1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			logger, records := newSlogRecorder()
			test.log(logger)
			checkTaken(t, records, test.want...)
		})
	}
}

// Both the level of the logger, which its descendants share, and the handler decide.
func TestSlogLoggerLevel(t *testing.T) {
	logger, records := newSlogRecorder()
	sub := logger.Named("sub")
	for _, test := range []struct {
		logger  hclog.Level
		handler slog.Level
		enabled string
	}{
		{hclog.Trace, slog.LevelDebug - 4, "trace debug info warn error"},
		{hclog.Trace, slog.LevelInfo, "info warn error"},
		{hclog.Warn, slog.LevelDebug, "warn error"},
		{hclog.Debug, slog.LevelError, "error"},
		{hclog.Off, slog.LevelDebug, ""},
	} {
		logger.SetLevel(test.logger)
		records.level.Set(test.handler)
		checkEqual(t, "the level", sub.GetLevel(), test.logger)
		var enabled []string
		for _, level := range []struct {
			name string
			is   func() bool
			log  func(string, ...any)
		}{
			{"trace", sub.IsTrace, sub.Trace},
			{"debug", sub.IsDebug, sub.Debug},
			{"info", sub.IsInfo, sub.Info},
			{"warn", sub.IsWarn, sub.Warn},
			{"error", sub.IsError, sub.Error},
		} {
			if level.is() {
				enabled = append(enabled, level.name)
			}
			level.log("x")
			checkEqual(t, level.name+" is logged", len(records.take()) == 1, level.is())
		}
		checkEqual(t, "the enabled levels", strings.Join(enabled, " "), test.enabled)
	}
}

// Without a handler there is nothing to log to.
func TestSlogLoggerWithoutHandler(t *testing.T) {
	if panics(func() { plugin.NewSlogLogger(nil) }) == nil {
		t.Error("NewSlogLogger took nil")
	}
}

// What a plugin logs has its own time, which is not an attribute as well, and values.
func TestSlogLoggerOfPlugin(t *testing.T) {
	t.Parallel()
	var out syncBuffer
	cfg := testConfig("plugin")
	options := &slog.HandlerOptions{Level: slog.LevelDebug - 4}
	cfg.Logger = plugin.NewSlogLogger(slog.NewJSONHandler(&out, options))
	c, p := startPlugin(t, cfg)
	const at = "2024-05-06T07:08:09.123456789Z"
	printed := strings.Join([]string{
		`{"@level":"trace","@message":"hclog","@timestamp":"` + at + `","n":1,"list":["a",{"b":2}]}`,
		`{"time":"` + at + `","level":"ERROR","msg":"slog","timestamp":"mine","ok":true}`,
		`{"time":"noon","level":"INFO","msg":"no time"}`,
		`2024/05/06 07:08:09 [WARN] text`,
	}, "\n") + "\n"
	before := time.Now()
	mustCall[struct{}](t, dispense(t, p).Client, "Print", Output{Raw: printed})
	c.Kill()

	name := `"logger":"` + pluginName(cfg.Cmd.Path) + `"`
	for message, want := range map[string]string{
		"hclog":   `{"time":"` + at + `","level":"DEBUG-4",` + name + `,"n":1,"list":["a",{"b":2}]}`,
		"slog":    `{"time":"` + at + `","level":"ERROR",` + name + `,"timestamp":"mine","ok":true}`,
		"no time": `{"level":"INFO",` + name + `,"timestamp":"noon"}`,
		"text":    `{"level":"WARN",` + name + `}`,
	} {
		got := jsonRecord(t, out.String(), message)
		wanted := make(map[string]any)
		check(t, json.Unmarshal([]byte(want), &wanted))
		if wanted["time"] == nil {
			at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(got["time"]))
			if err != nil || at.Before(before.Add(-time.Second)) {
				t.Errorf("%s: the time is %v", message, got["time"])
			}
			delete(got, "time")
		}
		delete(got, "msg")
		if fmt.Sprint(got) != fmt.Sprint(wanted) {
			t.Errorf("%s: logged %v, and not %v", message, got, wanted)
		}
	}
}

// jsonRecord returns the record with that message.
func jsonRecord(t *testing.T, log, message string) map[string]any {
	t.Helper()
	for line := range strings.Lines(log) {
		record := make(map[string]any)
		check(t, json.Unmarshal([]byte(line), &record))
		if record["msg"] == message {
			return maps.Clone(record)
		}
	}
	t.Fatalf("there is no record %q in\n%s", message, log)
	return nil
}
