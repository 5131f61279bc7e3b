package plugin

import (
	"context"
	"fmt"
	"io"
	"log"
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
	wrap := func(sub hclog.Logger) hclog.Logger { return &slogLogger{Logger: sub, handler: h} }
	return wrap(hclog.New(&hclog.LoggerOptions{
		Level:         hclog.Trace,
		Output:        io.Discard,
		SubloggerHook: wrap, // for With, Named and ResetNamed
	}))
}

// slogLogger logs to a handler. The logger of hclog in it has the name, the level and the
// arguments of With.
type slogLogger struct {
	hclog.Logger
	handler slog.Handler
}

func (l *slogLogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *slogLogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *slogLogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *slogLogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *slogLogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

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

// StandardLogger returns a logger of package log that logs to this one.
func (l *slogLogger) StandardLogger(opts *hclog.StandardLoggerOptions) *log.Logger {
	return l.withSink().StandardLogger(opts)
}

// StandardWriter returns a writer that logs what is written to it.
func (l *slogLogger) StandardWriter(opts *hclog.StandardLoggerOptions) io.Writer {
	return l.withSink().StandardWriter(opts)
}

// withSink returns a logger of hclog that logs nothing, but has this one as a sink. It
// parses what package log writes.
func (l *slogLogger) withSink() hclog.InterceptLogger {
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Level: hclog.Off, Output: io.Discard})
	logger.RegisterSink(l)
	return logger
}

// Accept logs a record. It is the method of a sink.
func (l *slogLogger) Accept(_ string, level hclog.Level, msg string, args ...any) {
	l.Log(level, msg, args...)
}
