package plugin_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log"
	"log/slog"
	"net/rpc"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	hclog "github.com/hashicorp/go-hclog" // named, because godoc before Go 1.26 takes it for go-hclog
	"github.com/muxplug/plugin"
)

// examplePlugins are the examples by the cookies of their plugins.
var examplePlugins = map[string]func(){
	"greeter":  Example,
	"filter":   ExampleFor,
	"shelf":    ExampleInvoke,
	"store":    ExampleInvokeSeq,
	"account":  ExampleRemote_Close,
	"byhand":   ExamplePlugin,
	"brewer":   ExampleSupervisor,
	"logging":  ExampleNewSlogLogger,
	"sleeper":  ExampleCall,
	"numberer": ExampleMuxBroker,
	"shop":     ExampleRegisterError,
	"adder":    ExampleHandshakeConfig_versions,
}

// init makes the test binary the plugin of an example: it runs the example, which godoc shows
// as a main function.
func init() {
	if main := examplePlugins[os.Getenv("EXAMPLE_PLUGIN")]; main != nil {
		main()
		os.Exit(0)
	}
}

// Greeter is implemented by the plugin and called by the host.
type Greeter interface {
	Greet(ctx context.Context, name string) (string, error)
}

// GreeterClient is the Greeter in the host.
type GreeterClient struct{ remote *plugin.Remote }

func (c GreeterClient) Greet(ctx context.Context, name string) (string, error) {
	return plugin.Invoke[string](ctx, c.remote, "Greet", name)
}

// NewGreeterPlugin returns a plugin that serves impl. The host passes nil.
func NewGreeterPlugin(impl Greeter) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Greeter { return GreeterClient{r} })
}

// English is the Greeter in the plugin.
type English struct{}

func (English) Greet(_ context.Context, name string) (string, error) {
	slog.Info("greeting", "name", name)
	return "Hello, " + name + "!", nil
}

// The host and its plugin are one program here, which starts itself. Most
// hosts and plugins are two programs and import a package that both share.
func Example() {
	handshake := plugin.HandshakeConfig{
		ProtocolVersion:  1,
		MagicCookieKey:   "EXAMPLE_PLUGIN",
		MagicCookieValue: "greeter",
	}
	if os.Getenv(handshake.MagicCookieKey) == handshake.MagicCookieValue {
		// A host has started this process: it is the plugin.
		slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)))
		plugin.Serve(&plugin.ServeConfig{
			HandshakeConfig: handshake,
			Plugins:         plugin.PluginSet{"greeter": NewGreeterPlugin(English{})},
		})
		return
	}

	self, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{"greeter": NewGreeterPlugin(nil)},
		Cmd:             exec.Command(self),
		Logger:          hclog.New(&hclog.LoggerOptions{Name: "host"}), // gets what the plugin logs
	})
	defer client.Kill()

	conn, err := client.Client() // starts the plugin
	if err != nil {
		log.Fatal(err)
	}
	greeter, err := plugin.Dispense[Greeter](conn, "greeter")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(greeter.Greet(context.Background(), "Gopher"))
	// Output: Hello, Gopher! <nil>
}

// The other examples use these two functions:

// config returns a configuration with which this program starts itself as the
// plugin. In the plugin it serves p and does not return.
func config(name string, p plugin.Plugin) *plugin.ClientConfig {
	handshake := plugin.HandshakeConfig{
		ProtocolVersion:  1,
		MagicCookieKey:   "EXAMPLE_PLUGIN",
		MagicCookieValue: name,
	}
	plugins := plugin.PluginSet{name: p}
	if os.Getenv(handshake.MagicCookieKey) == name {
		slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil))) // for the Logger of the host
		plugin.Serve(&plugin.ServeConfig{HandshakeConfig: handshake, Plugins: plugins})
		os.Exit(0)
	}
	self, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	return &plugin.ClientConfig{HandshakeConfig: handshake, Plugins: plugins, Cmd: exec.Command(self)}
}

// start starts the plugin and dispenses it.
func start[T any](name string, p plugin.Plugin) (T, *plugin.Client) {
	client := plugin.NewClient(config(name, p))
	conn, err := client.Client()
	if err != nil {
		log.Fatal(err)
	}
	v, err := plugin.Dispense[T](conn, name)
	if err != nil {
		log.Fatal(err)
	}
	return v, client
}

// Filter is implemented by the plugin and called by the host.
type Filter interface {
	Filter(ctx context.Context, prefix string, in io.Reader, out io.Writer, progress Progress) (Stats, error)
}

// Progress is called after each line.
type Progress = func(lines int) error

type Stats struct{ Lines, Bytes int }

// FilterClient is the Filter in the host.
type FilterClient struct{ remote *plugin.Remote }

func (c FilterClient) Filter(
	ctx context.Context, prefix string, in io.Reader, out io.Writer, progress Progress,
) (Stats, error) {
	return plugin.Invoke[Stats](ctx, c.remote, "Filter", prefix, in, out, progress)
}

func NewFilterPlugin(impl Filter) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Filter { return FilterClient{r} })
}

// Prefixer is the Filter in the plugin.
type Prefixer struct{}

func (Prefixer) Filter(
	ctx context.Context, prefix string, in io.Reader, out io.Writer, progress Progress,
) (stats Stats, err error) {
	text := bufio.NewScanner(in)
	for text.Scan() {
		n, err := fmt.Fprintln(out, prefix+text.Text())
		stats.Lines++
		stats.Bytes += n
		if err == nil {
			err = progress(stats.Lines)
		}
		if err != nil {
			return stats, err
		}
	}
	return stats, text.Err()
}

// The plugin reads from a reader of the host, writes to the host's stdout, and
// calls a function of the host.
func ExampleFor() {
	filter, client := start[Filter]("filter", NewFilterPlugin(Prefixer{}))
	defer client.Kill()

	poem := strings.NewReader("Roses are red,\nviolets are blue.\n")
	var reported []int
	progress := func(lines int) error {
		reported = append(reported, lines)
		return nil
	}
	stats, err := filter.Filter(context.Background(), "> ", poem, os.Stdout, progress)
	fmt.Println(stats.Lines, "lines", reported, err)
	// Output:
	// > Roses are red,
	// > violets are blue.
	// 2 lines [1 2] <nil>
}

// Shelf is implemented by the plugin and called by the host.
type Shelf interface {
	Open(ctx context.Context, title string) (io.ReadCloser, error)
}

// ShelfClient is the Shelf in the host.
type ShelfClient struct{ remote *plugin.Remote }

func (c ShelfClient) Open(ctx context.Context, title string) (io.ReadCloser, error) {
	return plugin.Invoke[io.ReadCloser](ctx, c.remote, "Open", title)
}

func NewShelfPlugin(impl Shelf) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Shelf { return ShelfClient{r} })
}

// Poems are the Shelf in the plugin.
type Poems map[string]string

func (p Poems) Open(_ context.Context, title string) (io.ReadCloser, error) {
	text, ok := p[title]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return io.NopCloser(strings.NewReader(text)), nil
}

// The result of a method is a stream, which the host reads and closes. An error
// keeps its identity.
func ExampleInvoke() {
	poems := Poems{"roses": "Roses are red.\n"}
	shelf, client := start[Shelf]("shelf", NewShelfPlugin(poems))
	defer client.Kill()

	for _, title := range []string{"roses", "violets"} {
		poem, err := shelf.Open(context.Background(), title)
		if err != nil {
			fmt.Println(title, errors.Is(err, fs.ErrNotExist))
			continue
		}
		_, err = io.Copy(os.Stdout, poem)
		fmt.Println(err, poem.Close())
	}
	// Output:
	// Roses are red.
	// <nil> <nil>
	// violets true
}

// Store is implemented by the plugin and called by the host.
type Store interface {
	Watch(ctx context.Context, prefix string) iter.Seq2[Event, error]
	Import(ctx context.Context, rows iter.Seq2[Row, error]) (int, error)
}

type (
	Event struct{ Key string }
	Row   struct{ Key, Value string }
)

// StoreClient is the Store in the host.
type StoreClient struct{ remote *plugin.Remote }

func (c StoreClient) Watch(ctx context.Context, prefix string) iter.Seq2[Event, error] {
	return plugin.InvokeSeq[Event](ctx, c.remote, "Watch", prefix)
}

func (c StoreClient) Import(ctx context.Context, rows iter.Seq2[Row, error]) (int, error) {
	return plugin.Invoke[int](ctx, c.remote, "Import", rows)
}

// Busy is the Store in the plugin, in which something happens all the time.
type Busy struct{}

func (Busy) Watch(ctx context.Context, prefix string) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		for n := 1; ; n++ {
			if !yield(Event{Key: fmt.Sprint(prefix, n)}, nil) {
				return // the host has left its loop
			}
		}
	}
}

func (Busy) Import(ctx context.Context, rows iter.Seq2[Row, error]) (n int, err error) {
	for row, err := range rows {
		if err != nil {
			return n, fmt.Errorf("after %d rows: %w", n, err)
		}
		if row.Key != "" {
			n++
		}
	}
	return n, nil
}

// The result of a method is a sequence of values, which the host ranges over, and a
// parameter is one that the plugin ranges over.
func ExampleInvokeSeq() {
	newPlugin := func(r *plugin.Remote) Store { return StoreClient{r} }
	store, client := start[Store]("store", plugin.For[Store](Busy{}, newPlugin))
	defer client.Kill()

	ctx := context.Background()
	for event, err := range store.Watch(ctx, "users/") {
		fmt.Println(event.Key, err)
		if event.Key == "users/3" {
			break // ends Watch in the plugin
		}
	}

	rows := func(yield func(Row, error) bool) {
		for _, key := range []string{"a", "b"} {
			if !yield(Row{Key: key}, nil) {
				return
			}
		}
		yield(Row{}, io.ErrUnexpectedEOF) // the file is cut off, say
	}
	_, err := store.Import(ctx, rows)
	fmt.Println(err, errors.Is(err, io.ErrUnexpectedEOF))
	// Output:
	// users/1 <nil>
	// users/2 <nil>
	// users/3 <nil>
	// after 2 rows: unexpected EOF true
}

// Account is implemented by the plugin and called by the host.
type Account interface {
	Deposit(amount int) (balance int, err error)
	Close() error
}

// AccountClient is the Account in the host.
type AccountClient struct{ remote *plugin.Remote }

func (c AccountClient) Deposit(amount int) (int, error) {
	return plugin.Invoke[int](context.Background(), c.remote, "Deposit", amount)
}

// Close calls the Close of the plugin, and then releases the instance.
func (c AccountClient) Close() error {
	_, err := plugin.Invoke[struct{}](context.Background(), c.remote, "Close")
	return errors.Join(err, c.remote.Close())
}

// Savings are the Account in the plugin.
type Savings struct{ balance int }

func (s *Savings) Deposit(amount int) (int, error) {
	s.balance += amount
	return s.balance, nil
}

func (s *Savings) Close() error {
	if s.balance > 0 {
		return fmt.Errorf("%d are left", s.balance)
	}
	return nil
}

// An interface with a Close of its own calls both: that of the implementation, and that
// of the Remote.
func ExampleRemote_Close() {
	newPlugin := func(r *plugin.Remote) Account { return AccountClient{r} }
	account, client := start[Account]("account", plugin.For[Account](&Savings{}, newPlugin))
	defer client.Kill()

	fmt.Println(account.Deposit(100))
	fmt.Println(account.Close())
	_, err := account.Deposit(100)
	fmt.Println(errors.Is(err, rpc.ErrShutdown))
	// Output:
	// 100 <nil>
	// 100 are left
	// true
}

// GreeterPlugin has an Impl in the plugin.
type GreeterPlugin struct{ Impl Greeter }

func (p GreeterPlugin) Server(*plugin.MuxBroker) (any, error) {
	return &GreeterRPCServer{p.Impl}, nil
}

func (GreeterPlugin) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &GreeterRPC{c}, nil
}

// GreeterRPC runs in the host.
type GreeterRPC struct{ client *rpc.Client }

func (g *GreeterRPC) Greet(ctx context.Context, name string) (greeting string, err error) {
	err = plugin.Call(ctx, g.client, "Plugin.Greet", name, &greeting)
	return greeting, err
}

// GreeterRPCServer runs in the plugin.
type GreeterRPCServer struct{ impl Greeter }

func (s *GreeterRPCServer) Greet(ctx context.Context, name string, greeting *string) (err error) {
	*greeting, err = s.impl.Greet(ctx, name)
	return err
}

// A Plugin written by hand, as programs for go-plugin have it, and not with For.
func ExamplePlugin() {
	greeter, client := start[Greeter]("byhand", GreeterPlugin{Impl: English{}})
	defer client.Kill()

	fmt.Println(greeter.Greet(context.Background(), "Gopher"))
	// Output: Hello, Gopher! <nil>
}

// Brewer is implemented by the plugin and called by the host.
type Brewer interface {
	Brew(ctx context.Context, cup, attempt int) (string, error)
}

// BrewerClient is the Brewer in the host.
type BrewerClient struct{ remote *plugin.Remote }

func (c BrewerClient) Brew(ctx context.Context, cup, attempt int) (string, error) {
	return plugin.Invoke[string](ctx, c.remote, "Brew", cup, attempt)
}

func NewBrewerPlugin(impl Brewer) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Brewer { return BrewerClient{r} })
}

// Kettle is the Brewer in the plugin. It has a fault.
type Kettle struct{}

func (Kettle) Brew(_ context.Context, cup, attempt int) (string, error) {
	if cup == 3 && attempt == 0 {
		panic("out of water")
	}
	return fmt.Sprint("cup ", cup), nil
}

// A host serves many requests with one plugin. When the plugin dies, the requests that it
// was working on are tried again, and the first of them starts it again.
func ExampleSupervisor() {
	settings := config("brewer", NewBrewerPlugin(Kettle{}))
	settings.Logger = hclog.NewNullLogger() // it would show the panic
	brewers := plugin.NewSupervisor[Brewer](settings, "brewer")
	defer brewers.Kill()

	serve := func(ctx context.Context, cup int) (string, error) {
		var died *plugin.ExitError
		for attempt := range 2 {
			brewer, err := brewers.Get(ctx) // starts the plugin, if it does not run
			if err != nil {
				return "", err
			}
			result, err := brewer.Brew(ctx, cup, attempt)
			if !errors.As(err, &died) {
				return result, err
			}
		}
		return "", died
	}

	var requests sync.WaitGroup
	var served [5]string
	for i := range served {
		requests.Go(func() {
			result, err := serve(context.Background(), i+1)
			served[i] = fmt.Sprint(result, " ", err)
		})
	}
	requests.Wait()
	fmt.Println(strings.Join(served[:], "\n"))
	// Output:
	// cup 1 <nil>
	// cup 2 <nil>
	// cup 3 <nil>
	// cup 4 <nil>
	// cup 5 <nil>
}

// What a plugin logs comes out of a handler of slog in the host.
func ExampleNewSlogLogger() {
	handler := slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		Level: slog.LevelInfo,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == "logger" {
				return slog.Attr{} // they differ from run to run
			}
			return a
		},
	})
	settings := config("logging", NewGreeterPlugin(English{}))
	settings.Logger = plugin.NewSlogLogger(handler)
	greeters := plugin.NewSupervisor[Greeter](settings, "logging")

	greeter, err := greeters.Get(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	greeting, err := greeter.Greet(context.Background(), "Gopher")
	greeters.Kill() // and with it, all of the log has arrived
	fmt.Println(greeting, err)
	// Output:
	// level=INFO msg=greeting name=Gopher
	// Hello, Gopher! <nil>
}

// Sleeper is a plugin that can be told to sleep.
type Sleeper struct{ awake chan error }

func (s Sleeper) Server(*plugin.MuxBroker) (any, error)                { return s, nil }
func (Sleeper) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return c, nil }

// Sleep takes a context, which ends with the one that the host passes to Call.
func (s Sleeper) Sleep(ctx context.Context, d time.Duration, _ *struct{}) error {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	s.awake <- context.Cause(ctx)
	return ctx.Err()
}

// Why returns why the last Sleep ended.
func (s Sleeper) Why(_ struct{}, why *string) error {
	*why = fmt.Sprint(<-s.awake)
	return nil
}

// A call that takes too long is cancelled, and so is the method in the plugin.
func ExampleCall() {
	sleeper, client := start[*rpc.Client]("sleeper", Sleeper{make(chan error, 1)})
	defer client.Kill()

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	err := plugin.Call(ctx, sleeper, "Plugin.Sleep", time.Hour, nil)
	fmt.Println("host:", errors.Is(err, context.DeadlineExceeded))

	var why string
	err = plugin.Call(context.Background(), sleeper, "Plugin.Why", struct{}{}, &why)
	fmt.Println(why, err)
	// Output:
	// host: true
	// plugin: the caller cancelled the call: context deadline exceeded <nil>
}

// Numberer is the client in the host of a NumbererServer in the plugin.
type Numberer struct {
	broker *plugin.MuxBroker
	client *rpc.Client
}

// NumberArgs are the numbers under which the host serves two streams and a service.
type NumberArgs struct{ From, To, Progress uint32 }

// Number copies the lines of src to dst and numbers them. It calls progress after each.
func (n *Numberer) Number(
	ctx context.Context, dst io.Writer, src io.Reader, progress func(lines int),
) (lines int, err error) {
	from, stopReading := n.broker.ServeReader(src)
	defer stopReading()
	to, stopWriting := n.broker.ServeWriter(dst)
	defer stopWriting()
	calls, stopCalls := n.broker.ServeRPC(ProgressServer{progress})
	defer stopCalls()
	err = plugin.Call(ctx, n.client, "Plugin.Number", NumberArgs{from, to, calls}, &lines)
	return lines, err
}

// ProgressServer answers the plugin's calls in the host.
type ProgressServer struct{ progress func(lines int) }

func (s ProgressServer) Report(lines int, _ *struct{}) error {
	s.progress(lines)
	return nil
}

type NumbererServer struct{ broker *plugin.MuxBroker }

func (s *NumbererServer) Number(ctx context.Context, args NumberArgs, lines *int) error {
	from, err := s.broker.DialReader(args.From)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := s.broker.DialWriter(args.To)
	if err != nil {
		return err
	}
	defer to.Close()
	progress, err := s.broker.DialRPC(args.Progress)
	if err != nil {
		return err
	}
	defer progress.Close()
	text := bufio.NewScanner(from)
	for text.Scan() {
		*lines++
		_, err := fmt.Fprintf(to, "%d: %s\n", *lines, text.Text())
		if err == nil {
			err = plugin.Call(ctx, progress, "Plugin.Report", *lines, nil)
		}
		if err != nil {
			return err
		}
	}
	if text.Err() != nil {
		return text.Err()
	}
	return to.Close() // waits until the host has everything
}

type NumbererPlugin struct{}

func (NumbererPlugin) Server(b *plugin.MuxBroker) (any, error) { return &NumbererServer{b}, nil }
func (NumbererPlugin) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &Numberer{b, c}, nil
}

// The plugin reads from a reader of the host, writes to the host's stdout, and reports its
// progress to a function in the host. This is ExampleFor, written by hand.
func ExampleMuxBroker() {
	numberer, client := start[*Numberer]("numberer", NumbererPlugin{})
	defer client.Kill()

	poem := strings.NewReader("Roses are red,\nviolets are blue.\n")
	var reported []int
	progress := func(lines int) { reported = append(reported, lines) }
	lines, err := numberer.Number(context.Background(), os.Stdout, poem, progress)
	fmt.Println(lines, "lines", reported, err)
	// Output:
	// 1: Roses are red,
	// 2: violets are blue.
	// 2 lines [1 2] <nil>
}

// ErrSoldOut is declared in the package that host and plugin share.
var ErrSoldOut = errors.New("sold out")

// Shop is a plugin that has nothing left to sell.
type Shop struct{}

func (Shop) Server(*plugin.MuxBroker) (any, error)                  { return Shop{}, nil }
func (Shop) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return c, nil }

func (Shop) Buy(item string, _ *struct{}) error {
	return fmt.Errorf("buying %s: %w", item, ErrSoldOut)
}

// An error that a method returns is the same error in the host.
func ExampleRegisterError() {
	plugin.RegisterError(ErrSoldOut) // in both processes
	shop, client := start[*rpc.Client]("shop", Shop{})
	defer client.Kill()

	err := plugin.Call(context.Background(), shop, "Plugin.Buy", "bread", nil)
	fmt.Println(err)
	fmt.Println(errors.Is(err, ErrSoldOut))
	// Output:
	// buying bread: sold out
	// true
}

// AdderV1 and AdderV2 are two versions of a plugin, and have Adder in common.
type (
	Adder   struct{}
	AdderV1 struct{ Adder }
	AdderV2 struct{ Adder }
)

func (Adder) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return c, nil }

func (AdderV1) Server(*plugin.MuxBroker) (any, error) { return AdderV1Server{}, nil }
func (AdderV2) Server(*plugin.MuxBroker) (any, error) { return AdderV2Server{}, nil }

type (
	AdderV1Server struct{}
	AdderV2Server struct{}
)

// Add takes two numbers in version 1.
func (AdderV1Server) Add(args [2]int, sum *int) error {
	*sum = args[0] + args[1]
	return nil
}

// Add takes any number of numbers in version 2.
func (AdderV2Server) Add(args []int, sum *int) error {
	for _, n := range args {
		*sum += n
	}
	return nil
}

// The plugin serves two versions of its interface. A host that has only the
// first uses that; one that has both uses the second.
func ExampleHandshakeConfig_versions() {
	handshake := plugin.HandshakeConfig{MagicCookieKey: "EXAMPLE_PLUGIN", MagicCookieValue: "adder"}
	v1, v2 := plugin.PluginSet{"adder": AdderV1{}}, plugin.PluginSet{"adder": AdderV2{}}
	both := map[int]plugin.PluginSet{1: v1, 2: v2}

	if os.Getenv(handshake.MagicCookieKey) == handshake.MagicCookieValue {
		plugin.Serve(&plugin.ServeConfig{HandshakeConfig: handshake, VersionedPlugins: both})
		return
	}

	self, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	for _, known := range []map[int]plugin.PluginSet{{1: v1}, both} {
		client := plugin.NewClient(&plugin.ClientConfig{
			HandshakeConfig:  handshake,
			VersionedPlugins: known,
			Cmd:              exec.Command(self),
		})
		conn, err := client.Client()
		if err != nil {
			log.Fatal(err)
		}
		adder, err := plugin.Dispense[*rpc.Client](conn, "adder")
		if err != nil {
			log.Fatal(err)
		}
		var args any = [2]int{1, 2}
		if client.NegotiatedVersion() == 2 {
			args = []int{1, 2, 3}
		}
		var sum int
		err = plugin.Call(context.Background(), adder, "Plugin.Add", args, &sum)
		fmt.Printf("version %d: the sum of %v is %d %v\n", client.NegotiatedVersion(), args, sum, err)
		client.Kill()
	}
	// Output:
	// version 1: the sum of [1 2] is 3 <nil>
	// version 2: the sum of [1 2 3] is 6 <nil>
}
