package plugin_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

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
				`info: from hclog | key="value" timestamp="2024-05-06T07:08:09.123Z"`,
				`warn: from slog | key=1 timestamp="2024-05-06T07:08:09.123Z"`,
				`error: from package log`,
				`debug: plain text`,
				`debug: `,
				fmt.Sprintf("debug: %s [%d more bytes]", long[:real], len(long)-real),
				`error: panic: boom`,
				`error: `,
				`error: goroutine 1 [running]:`,
			}
			first := max(slices.Index(got, want[0]), 0)
			if got := got[first:min(first+len(want), len(got))]; !slices.Equal(got, want) {
				t.Errorf("logged:\n%.200q\nand not:\n%.200q", got, want)
			}
			if !strings.Contains(raw.String(), printed) {
				t.Errorf("Stderr has %d bytes, and not the %d that were printed", len(raw.String()), len(printed))
			}
		})
	}
}
