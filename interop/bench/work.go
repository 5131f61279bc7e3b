package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/muxplug/plugin/interop/bench/job"
	"github.com/muxplug/plugin/interop/internal/build"
)

// effort is how much is done for the figures of one round.
type effort struct {
	turns    int           // a figure is the median of so many
	calls    time.Duration // how long calls go on in one turn
	stream   int64         // bytes through a stream in one turn
	together int           // plugins started at once
	values   int           // small structs in one turn
	counted  int           // calls for an average of allocations
	hosted   int           // plugins that a host's costs are divided by
}

var (
	usual = effort{turns: 7, calls: 30 * time.Millisecond, stream: 32 << 20, values: 20_000, together: 50, counted: 2000, hosted: 10}
	quick = effort{turns: 1, calls: 10 * time.Millisecond, stream: 2 << 20, values: 1000, together: 5, counted: 100, hosted: 2}
)

// work is one row of the table.
type work struct {
	name   string
	unit   unit
	static bool // it is the same in every round, so it is measured in one
	long   bool // it takes long, or is exact, so one turn a round must do
	// measure returns a figure, or errAbsent. i is nil where it starts its own.
	measure func(e effort, b *build.Builder, p *peer, i *instance) (float64, error)
}

// errAbsent is returned for what a peer does not have.
var errAbsent = errors.New("this peer has no such thing")

var works = []work{
	{name: "small call, one caller", unit: seconds, measure: repeat(1, func(i *instance) func() error { return i.small })},
	{name: "small calls, 64 callers on one client", unit: perSecond, measure: repeat(64, func(i *instance) func() error { return i.small })},
	{name: "64 KiB echo", unit: seconds, measure: repeat(1, echo(64<<10))},
	{name: "1 MiB echo", unit: seconds, measure: repeat(1, echo(1<<20))},
	{name: "stream to the plugin, 64 KiB writes", unit: bytesPerSecond, measure: stream(func(i *instance) func(int64) error { return i.sink })},
	{name: "stream from the plugin, 64 KiB writes", unit: bytesPerSecond, measure: stream(func(i *instance) func(int64) error { return i.source })},
	{name: "values from the plugin, structs of 64 bytes", unit: perSecond, long: true, measure: values},
	{name: "ten such values, from the call to the end", unit: seconds, measure: repeat(1, fewValues(10))},
	{name: "one such value, from the call to the end", unit: seconds, measure: repeat(1, fewValues(1))},
	{name: "open, use, close a stream", unit: seconds, measure: repeat(1, func(i *instance) func() error { return i.session })},
	{name: "open, call over, close a stream", unit: seconds, measure: repeat(1, func(i *instance) func() error { return i.callback })},
	{name: "dispense, call, close an instance", unit: seconds, measure: repeat(1, func(i *instance) func() error { return i.dispense })},
	{name: "start to first reply", unit: seconds, measure: startAndKill(false)},
	{name: "exec to exit, without a host (net/rpc: the floor of a start)", unit: seconds, measure: execToExit},
	{name: "kill", unit: seconds, measure: startAndKill(true)},
	{name: "plugins started together (50, or 5 with -quick)", unit: seconds, long: true, measure: together},
	{name: "allocations of a small call, both sides", unit: count, long: true, measure: allocations},
	{name: "host: goroutines per plugin", unit: count, long: true, measure: hosting(func(c hostCosts) float64 { return c.Goroutines })},
	{name: "host: resident memory per plugin", unit: bytes, long: true, measure: hosting(func(c hostCosts) float64 { return c.Resident })},
	{name: "host: descriptors per plugin", unit: count, long: true, measure: hosting(func(c hostCosts) float64 { return c.Descriptors })},
	{name: "plugin: resident memory", unit: bytes, measure: residentPlugin},
	{name: "plugin: resident memory after all of the above", unit: bytes, measure: residentAfter},
	{name: "plugin: binary", unit: bytes, static: true, long: true, measure: binarySize},
	{name: "plugin: modules linked, the library included", unit: count, static: true, long: true, measure: linked(func(_, modules []string) int { return len(modules) })},
	{name: "plugin: packages linked, the standard library's included", unit: count, static: true, long: true, measure: linked(func(packages, _ []string) int { return len(packages) })},
}

// repeat measures what is done again and again by so many at once: the time
// that one takes, or how many are done in a second.
func repeat(callers int, what func(*instance) func() error) func(effort, *build.Builder, *peer, *instance) (float64, error) {
	return func(e effort, _ *build.Builder, _ *peer, i *instance) (float64, error) {
		f := what(i)
		if f == nil {
			return 0, errAbsent
		}
		counts, errs := make([]int, callers), make([]error, callers)
		var running sync.WaitGroup
		start := time.Now()
		for c := range callers {
			running.Go(func() {
				for errs[c] == nil && time.Since(start) < e.calls {
					errs[c] = f()
					counts[c]++
				}
			})
		}
		running.Wait()
		took, total := time.Since(start).Seconds(), 0
		for _, n := range counts {
			total += n
		}
		if callers > 1 {
			return float64(total) / took, errors.Join(errs...)
		}
		return took / float64(total), errors.Join(errs...)
	}
}

func echo(size int) func(*instance) func() error {
	b := make([]byte, size)
	return func(i *instance) func() error { return func() error { return i.echo(b) } }
}

func stream(what func(*instance) func(int64) error) func(effort, *build.Builder, *peer, *instance) (float64, error) {
	return func(e effort, _ *build.Builder, _ *peer, i *instance) (float64, error) {
		f := what(i)
		if f == nil {
			return 0, errAbsent
		}
		start := time.Now()
		err := f(e.stream)
		return float64(e.stream) / time.Since(start).Seconds(), err
	}
}

// startAndKill measures one or the other.
func startAndKill(kill bool) func(effort, *build.Builder, *peer, *instance) (float64, error) {
	return func(_ effort, _ *build.Builder, p *peer, _ *instance) (float64, error) {
		start := time.Now()
		i, err := p.start(p.binary)
		if err != nil {
			return 0, err
		}
		err = i.small()
		started := time.Now()
		i.kill()
		if kill {
			return time.Since(started).Seconds(), err
		}
		return started.Sub(start).Seconds(), err
	}
}

// execToExit measures a plugin that is run by hand, so that it exits at once. No start can
// be shorter. The program that imports net/rpc and no library is the floor for all.
func execToExit(_ effort, _ *build.Builder, p *peer, _ *instance) (float64, error) {
	cmd := exec.Command(p.binary) // nothing is on stdin
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start).Seconds()
	if errors.As(err, new(*exec.ExitError)) {
		return took, nil // a plugin says that it is one, and fails
	}
	return took, err
}

// together measures until the last of many plugins has replied.
func together(e effort, _ *build.Builder, p *peer, _ *instance) (float64, error) {
	errs := make([]error, e.together)
	instances := make([]*instance, e.together)
	var running sync.WaitGroup
	start := time.Now()
	for n := range e.together {
		running.Go(func() {
			if instances[n], errs[n] = p.start(p.binary); errs[n] == nil {
				errs[n] = instances[n].small()
			}
		})
	}
	running.Wait()
	took := time.Since(start)
	for _, i := range instances {
		if i != nil {
			running.Go(i.kill)
		}
	}
	running.Wait()
	return took.Seconds(), errors.Join(errs...)
}

func allocations(e effort, _ *build.Builder, _ *peer, i *instance) (float64, error) {
	there, err := i.mallocs()
	if err != nil {
		return 0, err
	}
	here := job.Mallocs()
	for range e.counted {
		if err := i.small(); err != nil {
			return 0, err
		}
	}
	here = job.Mallocs() - here
	after, err := i.mallocs()
	return float64(here+after-there) / float64(e.counted), err
}

// residentPlugin measures a plugin that has answered one call.
func residentPlugin(_ effort, _ *build.Builder, p *peer, _ *instance) (float64, error) {
	i, err := p.start(p.binary)
	if err != nil {
		return 0, err
	}
	defer i.kill()
	if err := i.small(); err != nil {
		return 0, err
	}
	return resident(i.pid)
}

// residentAfter measures the plugin that the other rows have used.
func residentAfter(_ effort, _ *build.Builder, _ *peer, i *instance) (float64, error) {
	return resident(i.pid)
}

// resident is how much memory of a process is in RAM, by Linux's account.
func resident(pid int) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	line, _, _ := strings.Cut(after, "\n")
	kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(line), "kB")))
	return float64(kib) * 1024, err
}

// hostCosts is what a plugin costs its host.
type hostCosts struct{ Goroutines, Resident, Descriptors float64 }

// hosting measures in a process of its own, which this program is started
// as: see hostSome.
func hosting(which func(hostCosts) float64) func(effort, *build.Builder, *peer, *instance) (float64, error) {
	return func(e effort, _ *build.Builder, p *peer, _ *instance) (float64, error) {
		self, err := os.Executable()
		if err != nil {
			return 0, err
		}
		cmd := exec.Command(self, "-host", p.name, "-binary", p.binary, "-plugins", strconv.Itoa(e.hosted))
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return 0, err
		}
		var costs hostCosts
		err = json.Unmarshal(out, &costs)
		return which(costs), err
	}
}

// hostSome starts plugins and prints what each adds to this process. The first
// one does not count: it brings code into memory that all share.
func hostSome(p *peer, plugins int) error {
	var before hostCosts
	for n := range plugins + 1 {
		i, err := p.start(p.binary)
		if err != nil {
			return err
		}
		defer i.kill()
		if err := i.small(); err != nil {
			return err
		}
		if n == 0 {
			if before, err = costsNow(); err != nil {
				return err
			}
		}
	}
	after, err := costsNow()
	if err != nil {
		return err
	}
	each := func(before, after float64) float64 { return (after - before) / float64(plugins) }
	return json.NewEncoder(os.Stdout).Encode(hostCosts{
		each(before.Goroutines, after.Goroutines), each(before.Resident, after.Resident), each(before.Descriptors, after.Descriptors),
	})
}

func costsNow() (hostCosts, error) {
	// What has ended goes first.
	time.Sleep(50 * time.Millisecond)
	debug.FreeOSMemory()
	ram, err := resident(os.Getpid())
	fds, err2 := os.ReadDir("/proc/self/fd")
	return hostCosts{float64(runtime.NumGoroutine()), ram, float64(len(fds))}, errors.Join(err, err2)
}

func binarySize(_ effort, _ *build.Builder, p *peer, _ *instance) (float64, error) {
	info, err := os.Stat(p.binary)
	if err != nil {
		return 0, err
	}
	return float64(info.Size()), nil
}

func linked(which func(packages, modules []string) int) func(effort, *build.Builder, *peer, *instance) (float64, error) {
	return func(_ effort, b *build.Builder, p *peer, _ *instance) (float64, error) {
		packages, modules, err := b.Linked(p.pkg, p.lib)
		return float64(which(packages, modules)), err
	}
}
