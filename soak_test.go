//go:build unix

package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/rpc"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// soakFor is how long TestSoak runs.
var soakFor = flag.Duration("soak", 2*time.Second, "how long TestSoak runs")

// ---- What hosts do with a plugin ----

// soaked is a plugin that activities use, through a connection of its own kind.
type soaked struct {
	protocol plugin.ClientProtocol
	test     *testClient
	kit      *plugin.Remote
	adopted  bool         // nothing reads the process's own stderr, whose host is gone
	streamed atomic.Int64 // bytes
}

func init() {
	// Uses its plugin until that is gone.
	modes["busy"] = func() {
		hosted.client = plugin.NewClient(hosted.cfg)
		s := must(newSoaked(must(hosted.client.Client())))
		r := rand.New(rand.NewPCG(rand.Uint64(), 0))
		note("busy", "")
		for !hosted.client.Exited() {
			activity := processActivities[r.IntN(len(processActivities))]
			if err := activity.do(context.Background(), s, r); errors.Is(err, errWrong) {
				note("wrong", fmt.Sprintf("%s: %v", activity.name, err))
			}
		}
	}
}

// errWrong is the error of a reply that is not what it should be.
var errWrong = errors.New("a wrong reply")

// newSoaked dispenses what activities use.
func newSoaked(p plugin.ClientProtocol) (*soaked, error) {
	test, err := plugin.Dispense[*testClient](p, "test")
	if err != nil {
		return nil, err
	}
	k, err := plugin.Dispense[Kit](p, "kit")
	if err != nil {
		return nil, err
	}
	return &soaked{protocol: p, test: test, kit: k.(kitClient).remote}, nil
}

// activity is something that hosts do with a plugin.
type activity struct {
	name string
	do   func(ctx context.Context, s *soaked, r *rand.Rand) error
}

// activities are what hosts do with a plugin, again and again. Each one sends random
// data, and returns an error, or errWrong if something else has come back. What else
// can cross a connection is another line here.
var activities = []activity{
	{"value", echoText},
	{"value in an interface", echoBox},
	{"reader and writer", copyByHand},
	{"reader and writer of an interface", copyByInterface},
	{"callback", callBackByHand},
	{"callback of an interface", callBackByInterface},
	{"result that is a reader", readResult},
	{"result that is a writer", writeResult},
	{"reader of the plugin", readServed},
	{"sequence", importRows},
	{"sequence of the plugin", doubleRows},
	{"wait", waitForContext},
	{"dispense", dispenseAgain},
	{"ping", func(_ context.Context, s *soaked, _ *rand.Rand) error { return s.protocol.Ping() }},
}

func init() {
	// In the process of a test, this would be the output of the test.
	processActivities = append(slices.Clone(activities), activity{"output", printText})
}

// processActivities are those with a plugin that is a process.
var processActivities []activity

// randomData returns up to 200 kB, and mostly little.
func randomData(r *rand.Rand) []byte { return noise(r.IntN(200_000)>>r.IntN(17), r.Uint64()) }

// sameOrWrong returns err, or errWrong if what has come is not what was sent.
func sameOrWrong(err error, got, want []byte) error {
	if err == nil && !bytes.Equal(got, want) {
		return fmt.Errorf("%w: of %d bytes, %d", errWrong, len(want), len(got))
	}
	return err
}

func echoText(ctx context.Context, s *soaked, r *rand.Rand) error {
	want, got := string(randomData(r)), ""
	err := plugin.Call(ctx, s.test.Client, "Plugin.Echo", want, &got)
	return sameOrWrong(err, []byte(got), []byte(want))
}

func echoBox(ctx context.Context, s *soaked, r *rand.Rand) error {
	want, got := randomData(r), Box{}
	err := plugin.Call(ctx, s.test.Client, "Plugin.Box", Box{[]any{string(want), len(want)}}, &got)
	if err != nil {
		return err
	}
	list, _ := got.V.([]any)
	if len(list) != 2 || list[0] != string(want) || list[1] != len(want) {
		return errWrong
	}
	return nil
}

func copyByHand(ctx context.Context, s *soaked, r *rand.Rand) error {
	want := randomData(r)
	var got bytes.Buffer
	from, stopReader := s.test.broker.ServeReader(bytes.NewReader(want))
	to, stopWriter := s.test.broker.ServeWriter(&got)
	err := plugin.Call(ctx, s.test.Client, "Plugin.Copy", Transfer{Reader: from, Writer: to}, nil)
	stopReader()
	stopWriter() // and got is not written any more
	s.streamed.Add(int64(got.Len()))
	if !bytes.HasPrefix(want, got.Bytes()) {
		return errWrong
	}
	return sameOrWrong(err, got.Bytes(), want)
}

func copyByInterface(ctx context.Context, s *soaked, r *rand.Rand) error {
	want := randomData(r)
	var got bytes.Buffer // which nothing writes to when Invoke has returned
	_, err := plugin.Invoke[int64](ctx, s.kit, "Copy", bytes.NewReader(want), &got, int64(1<<40))
	s.streamed.Add(int64(got.Len()))
	if !bytes.HasPrefix(want, got.Bytes()) {
		return errWrong
	}
	return sameOrWrong(err, got.Bytes(), want)
}

func callBackByHand(ctx context.Context, s *soaked, r *rand.Rand) error {
	want, got := string(randomData(r)), ""
	id, stop := s.test.broker.ServeRPC(newTestServer())
	defer stop()
	callback := Callback{ID: id, Method: "Echo", Arg: want}
	err := plugin.Call(ctx, s.test.Client, "Plugin.CallBack", callback, &got)
	return sameOrWrong(err, []byte(got), []byte(want))
}

func callBackByInterface(ctx context.Context, s *soaked, r *rand.Rand) error {
	want := randomData(r)
	number := r.IntN(1000)
	got, err := plugin.Invoke[string](ctx, s.kit, "Call", func(_ context.Context, n int) (string, error) {
		if n != number {
			return "", errWrong
		}
		return string(want), nil
	}, number)
	return sameOrWrong(err, []byte(got), want)
}

func readResult(ctx context.Context, s *soaked, _ *rand.Rand) error {
	in, err := plugin.Invoke[io.ReadCloser](ctx, s.kit, "Open", "soak")
	if err != nil {
		return err
	}
	got, err := io.ReadAll(in)
	return sameOrWrong(errors.Join(err, in.Close()), got, []byte("content"))
}

func writeResult(ctx context.Context, s *soaked, r *rand.Rand) error {
	out, err := plugin.Invoke[io.WriteCloser](ctx, s.kit, "Create", "soak")
	if err != nil {
		return err
	}
	event := fmt.Sprint(r.Uint64())
	_, err = io.WriteString(out, event)
	if err := errors.Join(err, out.Close()); err != nil {
		return err
	}
	// The plugin has everything when Close has returned.
	_, err = plugin.Invoke[struct{}](ctx, s.kit, "Await", "written "+event)
	return err
}

func readServed(ctx context.Context, s *soaked, r *rand.Rand) error {
	var id uint32
	if err := plugin.Call(ctx, s.test.Client, "Plugin.Serve", "reader", &id); err != nil {
		return err
	}
	in, err := s.test.broker.DialReader(id)
	if err != nil {
		return err
	}
	if r.IntN(2) == 0 { // early
		return in.Close()
	}
	got, err := io.ReadAll(in)
	s.streamed.Add(int64(len(got)))
	return sameOrWrong(errors.Join(err, in.Close()), got, noise(1<<20, 0))
}

func importRows(ctx context.Context, s *soaked, r *rand.Rand) error {
	n := r.IntN(1000)
	sum, err := plugin.Invoke[int](ctx, s.kit, "Import", "", rowsTo(n, nil))
	if err == nil && sum != n*(n-1)/2 {
		return fmt.Errorf("%w: the sum of %d numbers is %d", errWrong, n, sum)
	}
	return err
}

func doubleRows(ctx context.Context, s *soaked, r *rand.Rand) error {
	n, taken := r.IntN(1000), 0
	last := r.IntN(2000) // after which the caller breaks, or never
	for row, err := range plugin.InvokeSeq[Number](ctx, s.kit, "Double", rowsTo(n, nil)) {
		if err != nil {
			return err
		}
		if row.N != 2*taken {
			return fmt.Errorf("%w: row %d is %d", errWrong, taken, row.N)
		}
		if taken == last {
			return nil
		}
		taken++
	}
	if taken != n {
		return fmt.Errorf("%w: of %d rows, %d", errWrong, n, taken)
	}
	return nil
}

func waitForContext(ctx context.Context, s *soaked, r *rand.Rand) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.IntN(10_000))*time.Microsecond)
	defer cancel()
	err := callIn(ctx, s.test.Client, "Wait")
	if err == nil {
		return errWrong
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

func printText(_ context.Context, s *soaked, r *rand.Rand) error {
	text := fmt.Sprintf("%x\n", randomData(r))
	output := Output{Stdout: text, Stderr: text}
	if !s.adopted {
		output.Raw = text
	}
	return s.test.Call("Plugin.Print", output, new(struct{}))
}

func dispenseAgain(ctx context.Context, s *soaked, r *rand.Rand) error {
	c, err := plugin.Dispense[*testClient](s.protocol, "test")
	if err != nil {
		return err
	}
	defer c.Close()
	return echoText(ctx, &soaked{test: c}, r)
}

// randomContext returns a context that ends at a random moment in most cases.
func randomContext(r *rand.Rand) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	soon := time.Duration(r.IntN(5000)>>r.IntN(12)) * time.Microsecond
	switch r.IntN(4) {
	case 0:
		time.AfterFunc(soon, cancel)
	case 1:
		go cancel() // ends at once
	case 2:
		inner, cancelInner := context.WithTimeout(ctx, soon)
		return inner, func() {
			cancelInner()
			cancel()
		}
	}
	return ctx, cancel
}

// endedWith reports whether err is that of a context that has ended.
func endedWith(ctx context.Context, err error) bool {
	return ctx.Err() != nil && errors.Is(err, ctx.Err())
}

// ---- Random cancels ----

// Of a call whose context ends at any moment, the answer is right or the error is
// that of the context, and the connection goes on.
func TestRandomCancels(t *testing.T) {
	leavesNothing(t)
	host, _ := plugin.TestPluginRPCConn(t, testPlugins(newTestState()), nil)
	s, err := newSoaked(host)
	check(t, err)
	seed := rand.Uint64()
	concurrently(t, len(activities), func(i int) {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		activity := activities[i]
		for range 50 {
			ctx, cancel := randomContext(r)
			err := activity.do(ctx, s, r)
			if err != nil && !endedWith(ctx, err) {
				t.Errorf("seed %d: %s: %T: %v", seed, activity.name, err, err)
			}
			cancel()
		}
	})
	echo(t, s.test.Client)
	check(t, host.Close())
}

// ---- Soak ----

// soakLife is a host and its plugin, from the start to the end.
type soakLife struct {
	*testing.T
	r      *rand.Rand
	lab    *lab
	cfg    *plugin.ClientConfig
	client *plugin.Client
	soaked *soaked
	ending atomic.Bool // what ends the plugin has begun
	counts *soakCounts
}

// soakEnd is a way in which a plugin ends.
type soakEnd struct {
	name  string
	do    func(l *soakLife)
	asked bool // the host has asked for it, so it is not an error
}

// soakEnds are the ways in which plugins end.
var soakEnds = []soakEnd{
	{name: "Kill", asked: true, do: func(l *soakLife) { l.client.Kill() }},
	{name: "Close", asked: true, do: func(l *soakLife) { _ = l.soaked.protocol.Close() }},
	{name: "kill -9", do: func(l *soakLife) { _ = l.cfg.Cmd.Process.Kill() }},
	{name: "panic", do: crashBy("panic")},
	{name: "fatal error", do: crashBy("fatal")},
	{name: "os.Exit(3)", do: crashBy("exit3")},
	{name: "os.Exit(0)", do: crashBy("exit0")},
	{name: "SIGTERM", do: func(l *soakLife) { signalTo(l, pidOf(l, l.client), syscall.SIGTERM) }},
	{name: "Kill while stopped", asked: true, do: func(l *soakLife) {
		signalTo(l, pidOf(l, l.client), syscall.SIGSTOP)
		l.client.Kill()
	}},
}

// crashBy has the plugin run a mode that ends it.
func crashBy(mode string) func(l *soakLife) {
	return func(l *soakLife) { _ = l.soaked.test.Call("Plugin.Do", mode, new(string)) }
}

// soakLives are the kinds of lives.
var soakLives = []struct {
	name string
	live func(l *soakLife)
}{
	{"plugin", (*soakLife).livePlugin},
	{"plugin", (*soakLife).livePlugin},
	{"plugin", (*soakLife).livePlugin},
	{"detached plugin", (*soakLife).liveDetached},
	{"killed host", (*soakLife).liveKilledHost},
	{"host that leaves its plugin", (*soakLife).liveLeavingHost},
}

// soakCounts are the figures of a soak.
type soakCounts struct {
	mu     sync.Mutex // guards counts
	counts map[string]int64
}

func (c *soakCounts) add(name string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[name] += n
}

func (c *soakCounts) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(c.counts)) {
		fmt.Fprintf(&text, "\n%10d %s", c.counts[name], name)
	}
	return text.String()
}

// Whatever hosts do with their plugins, and however both end: what comes back is
// right, an error is one of those that are promised, and nothing is left.
func TestSoak(t *testing.T) {
	leavesNothing(t)
	counts := &soakCounts{counts: make(map[string]int64)}
	seed := rand.Uint64()
	deadline := time.Now().Add(*soakFor)
	t.Run("lives", func(t *testing.T) {
		for worker := range 4 {
			t.Run(fmt.Sprint(worker), func(t *testing.T) {
				t.Parallel()
				r := rand.New(rand.NewPCG(seed, uint64(worker)))
				for time.Now().Before(deadline) && !t.Failed() {
					life := soakLives[r.IntN(len(soakLives))]
					t.Run(life.name, func(t *testing.T) {
						l := &soakLife{T: t, r: r, lab: newLab(t), counts: counts}
						life.live(l)
						counts.add("lives: "+life.name, 1)
					})
				}
			})
		}
	})
	t.Logf("seed %d, %v:%v", seed, *soakFor, counts)
}

// start starts a plugin in the lab, and dispenses what activities use.
func (l *soakLife) start(edit func(*plugin.ClientConfig)) {
	l.cfg = l.lab.config("plugin")
	l.cfg.AutoMTLS = l.r.IntN(4) == 0
	l.cfg.KillTimeout = time.Second
	edit(l.cfg)
	l.connect()
}

// connect starts the client and dispenses what activities use.
func (l *soakLife) connect() {
	c, p := startPlugin(l, l.cfg)
	s, err := newSoaked(p)
	check(l, err)
	l.client, l.soaked = c, s
}

// use runs activities in several goroutines until end has returned.
func (l *soakLife) use(end func()) {
	var all sync.WaitGroup
	for range 1 + l.r.IntN(4) {
		r := rand.New(rand.NewPCG(l.r.Uint64(), 0))
		all.Go(func() {
			for l.act(r) {
			}
		})
	}
	for range l.r.IntN(3) {
		l.pass(50 * time.Millisecond)
		if l.r.IntN(2) == 0 {
			l.pause()
		}
	}
	l.pass(100 * time.Millisecond)
	l.ending.Store(true)
	within(l, "the end of a plugin", hangs, end)
	within(l, "what hosts do at the end of a plugin", hangs, all.Wait)
	l.counts.add("bytes streamed", l.soaked.streamed.Load())
}

// pause stops the process of the plugin for a while.
func (l *soakLife) pause() {
	signalTo(l, pidOf(l, l.client), syscall.SIGSTOP)
	l.pass(50 * time.Millisecond)
	signalTo(l, pidOf(l, l.client), syscall.SIGCONT)
	l.counts.add("pauses", 1)
}

// pass lets a random time pass, so that what follows happens at a random moment.
func (l *soakLife) pass(most time.Duration) {
	<-time.After(time.Duration(l.r.Int64N(int64(most))))
}

// act does one thing with the plugin, and reports whether the plugin lives.
func (l *soakLife) act(r *rand.Rand) bool {
	activity := processActivities[r.IntN(len(processActivities))]
	ctx, cancel := randomContext(r)
	defer cancel()
	err := activity.do(ctx, l.soaked, r)
	switch {
	case err == nil:
		l.counts.add("calls: "+activity.name, 1)
		return !l.ending.Load()
	case errors.Is(err, errWrong):
		l.Errorf("%s: %v", activity.name, err)
		return false
	case endedWith(ctx, err):
		l.counts.add("calls that were cancelled", 1)
		return !l.ending.Load()
	case l.ending.Load() && isEnd(err):
		l.counts.add("calls that ended with their plugin", 1)
		return false
	}
	l.Errorf("%s: while the plugin ends (%v): %T: %v", activity.name, l.ending.Load(), err, err)
	return false
}

// isEnd reports whether an error is one of those that calls return when their plugin
// ends. What a method returns at the end of its context is one, too.
func isEnd(err error) bool {
	return isA[*plugin.ExitError](err) || isA[rpc.ServerError](err) ||
		errors.Is(err, rpc.ErrShutdown) || errors.Is(err, io.ErrUnexpectedEOF)
}

// isOver checks a client whose plugin has ended.
func (l *soakLife) isOver(c *plugin.Client, asked bool) {
	l.Helper()
	receive(l, "Done", c.Done())
	within(l, "Kill", 4*time.Second, c.Kill)
	if !c.Exited() {
		l.Error("Exited is false at the end")
	}
	if err := c.Err(); (err == nil) != asked || err != nil && !isA[*plugin.ExitError](err) {
		l.Errorf("Err is %T: %v", err, err)
	}
}

// livePlugin is a plugin that ends in one of many ways.
func (l *soakLife) livePlugin() {
	l.start(func(c *plugin.ClientConfig) { c.Managed = l.r.IntN(2) == 0 })
	end := soakEnds[l.r.IntN(len(soakEnds))]
	l.use(func() { end.do(l) })
	l.isOver(l.client, end.asked)
	l.counts.add("ends: "+end.name, 1)
}

// liveDetached is a plugin that one client starts and another one ends.
func (l *soakLife) liveDetached() {
	l.start(func(c *plugin.ClientConfig) { c.Detach, c.AutoMTLS = true, false })
	first := l.client
	l.cfg = attachTo(first.ReattachConfig())
	l.connect()
	l.use(l.client.Kill)
	l.isOver(l.client, true)
	l.isOver(first, false)
}

// liveKilledHost is a host in its own process that is killed. Its plugin is gone
// soon.
func (l *soakLife) liveKilledHost() {
	host := l.lab.start("host busy", childEnv+"=plugin")
	if l.r.IntN(2) == 0 {
		l.lab.read("busy")
	} else { // earlier, nothing could remove the directory of the socket
		l.lab.read("plugin")
	}
	l.pass(100 * time.Millisecond)
	host.kill(l)
	l.lab.deserted(orphanTimeout + slack)
	if l.lab.noted("wrong") {
		l.Error(l.lab.read("wrong"))
	}
}

// liveLeavingHost is a host that leaves a plugin, which is reattached to and killed.
func (l *soakLife) liveLeavingHost() {
	receive(l, "the end of a host", l.lab.start("host detaching idle", childEnv+"=plugin").ended)
	l.cfg = attachTo(&plugin.ReattachConfig{
		ProtocolVersion: 3,
		Addr:            parseAddr(l.lab.read("address")),
		Pid:             l.lab.readPid("plugin"),
	})
	l.connect()
	l.soaked.adopted = true
	l.use(l.client.Kill)
	l.isOver(l.client, true)
}
