package plugin_test

import (
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

func init() {
	modes["overflow"] = func() {
		debug.SetMaxStack(1 << 20)
		fmt.Println(overflow(0))
	}
}

// overflow calls itself until the stack is full.
func overflow(n int) int {
	if n < 0 { // never before that
		return 0
	}
	return overflow(n+1) + 1
}

// However a plugin panics, that is one record at Error, with the trace as a value. The
// lines are logged at Debug as they come.
func TestLogOfPanic(t *testing.T) {
	for mode, message := range map[string]string{
		"panic":    "panic: boom",
		"fatal":    "fatal error: sync: unlock of unlocked mutex",
		"overflow": "fatal error: stack overflow",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig("plugin")
			logger, records := recorder()
			cfg.Logger = logger
			c, p := startPlugin(t, cfg)
			_ = dispense(t, p).Call("Plugin.Do", mode, new(string))
			receive(t, "Done", c.Done())

			below := func(r logRecord) bool { return r.level < hclog.Warn }
			atError := slices.DeleteFunc(records.find(""), below)
			if len(atError) != 1 || atError[0].msg != "the process has ended" {
				t.Fatalf("logged above Info: %.1000q", atError)
			}
			end := atError[0].value("reason")
			exit, ok := end.(*plugin.ExitError)
			if !ok || exit != c.Err() || !strings.Contains(exit.Error(), message) {
				t.Errorf("the reason is %v", end)
			}
			trace, _ := atError[0].value("trace").(string)
			if !strings.HasPrefix(trace, message+"\n") || !strings.Contains(trace, "\ngoroutine ") {
				t.Errorf("the trace is %.1000q", trace)
			}
			lines := records.find(message)
			if len(lines) != 1 || lines[0].level != hclog.Debug {
				t.Errorf("its first line is logged as %q", lines)
			}
		})
	}
}

// value returns the value of a record with that key, or nil.
func (r logRecord) value(key string) any {
	for i := 0; i+1 < len(r.args); i += 2 {
		if r.args[i] == key {
			return r.args[i+1]
		}
	}
	return nil
}

// What a process writes to its stderr is logged under the plugin's name, cut at
// PluginLogBufferSize, and every byte goes to Stderr.
func TestLogOfPlugin(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 2<<20/16)
	printed := strings.Join([]string{
		`{"@level":"info","@message":"from hclog","@timestamp":"2024-05-06T07:08:09.123456Z","key":"value"}`,
		`{"time":"2024-05-06T07:08:09.123456789Z","level":"WARN","msg":"from slog","key":1}`,
		`2024/05/06 07:08:09 [ERROR] from package log`,
		`plain text`,
		"",
		long,
		"panic: boom",
		"",
		"goroutine 1 [running]:",
	}, "\n") + "\n"
	for limit, real := range map[int]int{0: 64 << 10, 1000: 1000} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			t.Parallel()
			var raw syncBuffer
			cfg := testConfig("plugin")
			logger, records := recorder()
			cfg.Logger, cfg.Stderr, cfg.PluginLogBufferSize = logger, &raw, limit
			c, p := startPlugin(t, cfg)
			mustCall[struct{}](t, dispense(t, p).Client, "Print", Output{Raw: printed})
			c.Kill()
			var got []string
			for _, r := range records.find("") {
				if r.name == pluginName(cfg.Cmd.Path) {
					got = append(got, r.String())
				}
			}
			want := []string{
				`info: from hclog | key="value" timestamp=2024-05-06T07:08:09.123Z`,
				`warn: from slog | key=1 timestamp=2024-05-06T07:08:09.123Z`,
				`error: from package log`,
				`debug: plain text`,
				`debug: `,
				fmt.Sprintf("debug: %s [%d more bytes]", long[:real], len(long)-real),
				`debug: panic: boom`,
				`debug: `,
				`debug: goroutine 1 [running]:`,
			}
			first := max(slices.Index(got, want[0]), 0)
			if got := got[first:min(first+len(want), len(got))]; !slices.Equal(got, want) {
				t.Errorf("logged:\n%.200q\nand not:\n%.200q", got, want)
			}
			if !strings.Contains(raw.String(), printed) {
				t.Errorf("of %d bytes, Stderr has %d", len(printed), len(raw.String()))
			}
		})
	}
}
