package plugin

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file has the way from hclog, which this package logs with, to slog.

// NewSlogLogger returns a logger for [ClientConfig].Logger that logs to h: what this
// package logs, and what its plugins do. The name of the logger is the attribute "logger",
// and hclog's level Trace is slog.LevelDebug-4. A record of a plugin has the plugin's time.
//
// The logger has a level, Trace at first, so that h decides what is logged. SetLevel
// changes it. NewSlogLogger panics if h is nil.
func NewSlogLogger(h slog.Handler) hclog.Logger {
	if h == nil {
		panic("plugin: NewSlogLogger needs a handler")
	}
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{
		Level:         hclog.Trace,
		Output:        io.Discard,
		SubloggerHook: func(sub hclog.Logger) hclog.Logger { return &slogLogger{Logger: sub, handler: h} },
	})
	return logger.Named("") // which calls the hook, as With and ResetNamed do
}

// slogLogger logs to a handler. The Logger in it keeps the name, the level and the arguments
// of With, and logs nothing. NewSlogLogger wraps it in an InterceptLogger, whose methods
// Trace to Error all call Log: so Log is the only one here that logs.
type slogLogger struct {
	hclog.Logger
	handler slog.Handler
}

func (l *slogLogger) IsTrace() bool { return l.isEnabled(hclog.Trace) }
func (l *slogLogger) IsDebug() bool { return l.isEnabled(hclog.Debug) }
func (l *slogLogger) IsInfo() bool  { return l.isEnabled(hclog.Info) }
func (l *slogLogger) IsWarn() bool  { return l.isEnabled(hclog.Warn) }
func (l *slogLogger) IsError() bool { return l.isEnabled(hclog.Error) }

func (l *slogLogger) isEnabled(level hclog.Level) bool {
	return level >= l.GetLevel() && l.handler.Enabled(context.Background(), slogLevel(level))
}

// slogLevel returns a level of slog, which are four apart.
func slogLevel(level hclog.Level) slog.Level { return slog.Level(4 * (level - hclog.Info)) }

// Log logs a record.
func (l *slogLogger) Log(level hclog.Level, msg string, args ...any) {
	if !l.isEnabled(level) {
		return
	}
	record := slog.NewRecord(time.Now(), slogLevel(level), msg, 0)
	if name := l.Name(); name != "" {
		record.AddAttrs(slog.String("logger", name))
	}
	for pair := range slices.Chunk(inPairs(l.ImpliedArgs(), args), 2) {
		if at, isTime := pair[1].(pluginTime); isTime {
			record.Time = time.Time(at)
			continue
		}
		record.AddAttrs(slog.Attr{Key: fmt.Sprint(pair[0]), Value: slogValue(pair[1])})
	}
	_ = l.handler.Handle(context.Background(), record) // package slog ignores it, too
}

// inPairs returns arguments as keys and values. Like hclog, it gives a last value without
// a key one.
func inPairs(implied, args []any) []any {
	pairs := slices.Concat(implied, args)
	if len(pairs)%2 == 0 {
		return pairs
	}
	last := pairs[len(pairs)-1]
	key := hclog.MissingKey
	if _, isTrace := last.(hclog.CapturedStacktrace); isTrace {
		key = "stacktrace"
	}
	return append(pairs[:len(pairs)-1], key, last)
}

// slogValue returns a value as hclog shows it, if it is of a type of hclog's.
func slogValue(value any) slog.Value {
	switch v := value.(type) {
	case hclog.Format:
		return slog.StringValue(fmt.Sprintf(fmt.Sprint(v[0]), v[1:]...))
	case hclog.Hex:
		return slog.StringValue(fmt.Sprintf("%#x", uint(v)))
	case hclog.Octal:
		return slog.StringValue(fmt.Sprintf("%#o", uint(v)))
	case hclog.Binary:
		return slog.StringValue(fmt.Sprintf("%#b", uint(v)))
	case hclog.Quote:
		return slog.StringValue(strconv.Quote(string(v)))
	}
	return slog.AnyValue(value)
}
