package plugin_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/doc"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"log"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	hclog "github.com/hashicorp/go-hclog" // named, because godoc before Go 1.26 takes it for go-hclog
	"github.com/muxplug/plugin"
)

// Greeter is what the plugin can do.
type Greeter interface {
	Greet() string
}

// GreeterRPC is the Greeter that the host calls. It asks the plugin.
type GreeterRPC struct{ client *rpc.Client }

func (g *GreeterRPC) Greet() string {
	var reply string
	if err := g.client.Call("Plugin.Greet", new(interface{}), &reply); err != nil {
		return err.Error()
	}
	return reply
}

// GreeterRPCServer answers those calls in the plugin.
type GreeterRPCServer struct{ Impl Greeter }

func (s *GreeterRPCServer) Greet(args interface{}, reply *string) error {
	*reply = s.Impl.Greet()
	return nil
}

// GreeterPlugin joins the two.
type GreeterPlugin struct{ Impl Greeter }

func (p *GreeterPlugin) Server(*plugin.MuxBroker) (interface{}, error) {
	return &GreeterRPCServer{p.Impl}, nil
}

func (*GreeterPlugin) Client(_ *plugin.MuxBroker, c *rpc.Client) (interface{}, error) {
	return &GreeterRPC{c}, nil
}

// English is the implementation. It runs in the plugin's process.
type English struct{ logger hclog.Logger }

func (e English) Greet() string {
	e.logger.Debug("somebody wants to be greeted", "language", "en")
	return "Hello!"
}

// handshake is what the host and the plugin have to agree on.
var handshake = plugin.HandshakeConfig{
	ProtocolVersion:  1,
	MagicCookieKey:   "EXAMPLE_PLUGIN",
	MagicCookieValue: "greeter",
}

// The host and its plugin are one program here, which starts itself again. As
// a rule they are two, with a package that both import.
func Example() {
	if os.Getenv(handshake.MagicCookieKey) == handshake.MagicCookieValue {
		// This process is the plugin: a host has started it.
		logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, JSONFormat: true})
		plugin.Serve(&plugin.ServeConfig{
			HandshakeConfig: handshake,
			Plugins:         plugin.PluginSet{"greeter": &GreeterPlugin{Impl: English{logger}}},
		})
		return
	}

	// This process is the host.
	self, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{"greeter": &GreeterPlugin{}},
		Cmd:             exec.Command(self),
		Logger:          hclog.New(&hclog.LoggerOptions{Name: "host", Level: hclog.Debug}),
	})
	defer client.Kill()

	// This starts the plugin and connects to it.
	conn, err := client.Client()
	if err != nil {
		log.Fatal(err)
	}
	greeter, err := plugin.Dispense[Greeter](conn, "greeter")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(greeter.Greet())
	// Output: Hello!
}

// The examples below need no more of the above than this:

// config describes a plugin that is this same program, started again. In the
// process that is the plugin, it serves the plugin and does not return.
func config(name string, p plugin.Plugin) *plugin.ClientConfig {
	handshake := plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "EXAMPLE_PLUGIN", MagicCookieValue: name}
	plugins := plugin.PluginSet{name: p}
	if os.Getenv(handshake.MagicCookieKey) == name {
		plugin.Serve(&plugin.ServeConfig{HandshakeConfig: handshake, Plugins: plugins})
		os.Exit(0)
	}
	self, err := os.Executable()
	if err != nil {
		log.Fatal(err)
	}
	return &plugin.ClientConfig{HandshakeConfig: handshake, Plugins: plugins, Cmd: exec.Command(self)}
}

// start starts the plugin that config describes and dispenses it.
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

// keepAlive starts a plugin and hands its connection to use, and does so again
// whenever the plugin dies, after a pause that grows, until ctx ends.
func keepAlive(ctx context.Context, config *plugin.ClientConfig, use func(plugin.ClientProtocol)) error {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Minute) {
		client := plugin.NewClient(config)
		stop := context.AfterFunc(ctx, client.Kill)
		conn, err := client.Client()
		if err != nil {
			return err
		}
		use(conn)
		<-client.Done()
		stop()
		var exit *plugin.ExitError
		if !errors.As(client.Err(), &exit) {
			return nil // it was killed because ctx has ended
		}
		fmt.Println("it died:", strings.Split(exit.Panic, "\n")[0])
		time.Sleep(pause)
	}
}

// Worker is a plugin whose Work panics at the first two attempts.
type Worker struct{}

func (Worker) Server(*plugin.MuxBroker) (any, error)                  { return Worker{}, nil }
func (Worker) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return c, nil }

func (Worker) Work(attempt int, done *string) error {
	if attempt < 3 {
		panic("out of tea")
	}
	*done = fmt.Sprint("done at attempt ", attempt)
	return nil
}

// A plugin that dies is started again, with the same ClientConfig.
func ExampleClient_Done() {
	config := config("worker", Worker{})
	config.Logger = hclog.NewNullLogger() // it would show the panics, too
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	attempt := 0
	err := keepAlive(ctx, config, func(conn plugin.ClientProtocol) {
		worker, err := plugin.Dispense[*rpc.Client](conn, "worker")
		if err != nil {
			return // it has died already
		}
		attempt++
		var done string
		if worker.Call("Plugin.Work", attempt, &done) == nil {
			fmt.Println(done)
			cancel()
		}
	})
	fmt.Println(err)
	// Output:
	// it died: panic: out of tea
	// it died: panic: out of tea
	// done at attempt 3
	// <nil>
}

// Sleeper is in the host what SleeperServer is in the plugin.
type Sleeper struct{ client *rpc.Client }

func (s *Sleeper) Sleep(ctx context.Context, d time.Duration) error {
	return plugin.Call(ctx, s.client, "Plugin.Sleep", d, new(struct{}))
}

// WhyAwake returns why the last Sleep did not last.
func (s *Sleeper) WhyAwake() (why string, err error) {
	err = plugin.Call(context.Background(), s.client, "Plugin.WhyAwake", struct{}{}, &why)
	return why, err
}

type SleeperServer struct{ awake chan error }

// Sleep takes a context, which ends when that of the host's call does.
func (s *SleeperServer) Sleep(ctx context.Context, d time.Duration, _ *struct{}) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		s.awake <- context.Cause(ctx)
		return ctx.Err()
	}
}

func (s *SleeperServer) WhyAwake(_ struct{}, why *string) error {
	*why = (<-s.awake).Error()
	return nil
}

type SleeperPlugin struct{}

func (SleeperPlugin) Server(*plugin.MuxBroker) (any, error) {
	return &SleeperServer{make(chan error, 1)}, nil
}

func (SleeperPlugin) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &Sleeper{c}, nil
}

// A call that takes too long is given up, and the plugin stops working on it.
func ExampleCall() {
	sleeper, client := start[*Sleeper]("sleeper", SleeperPlugin{})
	defer client.Kill()

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	err := sleeper.Sleep(ctx, time.Hour)
	fmt.Println("host:", err)

	why, err := sleeper.WhyAwake()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(why)
	// Output:
	// host: context deadline exceeded
	// plugin: the caller gave the call up: context deadline exceeded
}

// Numberer is in the host what NumbererServer is in the plugin.
type Numberer struct {
	broker *plugin.MuxBroker
	client *rpc.Client
}

// NumberArgs are the numbers of the streams.
type NumberArgs struct{ From, To uint32 }

// Number copies the lines of src to dst, with numbers.
func (n *Numberer) Number(ctx context.Context, dst io.Writer, src io.Reader) (lines int, err error) {
	from, stopReading := n.broker.ServeReader(src)
	defer stopReading()
	to, stopWriting := n.broker.ServeWriter(dst)
	defer stopWriting()
	args := NumberArgs{From: from, To: to}
	err = plugin.Call(ctx, n.client, "Plugin.Number", args, &lines)
	return lines, err
}

type NumbererServer struct{ broker *plugin.MuxBroker }

func (s *NumbererServer) Number(args NumberArgs, lines *int) error {
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
	text := bufio.NewScanner(from)
	for text.Scan() {
		*lines++
		if _, err := fmt.Fprintf(to, "%d: %s\n", *lines, text.Text()); err != nil {
			return err
		}
	}
	if text.Err() != nil {
		return text.Err()
	}
	return to.Close() // returns when the host has all of it
}

type NumbererPlugin struct{}

func (NumbererPlugin) Server(b *plugin.MuxBroker) (any, error) { return &NumbererServer{b}, nil }
func (NumbererPlugin) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &Numberer{b, c}, nil
}

// The plugin reads a file that only the host has open, and writes to the
// host's stdout.
func ExampleMuxBroker_ServeReader() {
	numberer, client := start[*Numberer]("numberer", NumbererPlugin{})
	defer client.Kill()

	file, err := os.CreateTemp("", "poem-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if _, err := file.WriteString("Roses are red,\nviolets are blue.\n"); err != nil {
		log.Fatal(err)
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		log.Fatal(err)
	}

	lines, err := numberer.Number(context.Background(), os.Stdout, file)
	fmt.Println(lines, "lines", err)
	// Output:
	// 1: Roses are red,
	// 2: violets are blue.
	// 2 lines <nil>
}

// Baker is in the host what BakerServer is in the plugin.
type Baker struct {
	broker *plugin.MuxBroker
	client *rpc.Client
}

// BakeArgs has the number of the service to which progress is reported.
type BakeArgs struct {
	Loaves   int
	Progress uint32
}

// Bake calls progress, in the host, as the plugin proceeds.
func (b *Baker) Bake(ctx context.Context, loaves int, progress func(percent int)) error {
	id, stop := b.broker.ServeRPC(ProgressServer{progress})
	defer stop()
	args := BakeArgs{Loaves: loaves, Progress: id}
	return plugin.Call(ctx, b.client, "Plugin.Bake", args, new(struct{}))
}

// ProgressServer answers the plugin's calls in the host.
type ProgressServer struct{ progress func(percent int) }

func (s ProgressServer) Report(percent int, _ *struct{}) error {
	s.progress(percent)
	return nil
}

type BakerServer struct{ broker *plugin.MuxBroker }

func (s *BakerServer) Bake(ctx context.Context, args BakeArgs, _ *struct{}) error {
	progress, err := s.broker.DialRPC(args.Progress)
	if err != nil {
		return err
	}
	defer progress.Close()
	for loaf := range args.Loaves {
		percent := 100 * (loaf + 1) / args.Loaves
		if err := plugin.Call(ctx, progress, "Plugin.Report", percent, new(struct{})); err != nil {
			return err
		}
	}
	return nil
}

type BakerPlugin struct{}

func (BakerPlugin) Server(b *plugin.MuxBroker) (any, error) { return &BakerServer{b}, nil }
func (BakerPlugin) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &Baker{b, c}, nil
}

// The plugin reports its progress to a function of the host's.
func ExampleMuxBroker_ServeRPC() {
	baker, client := start[*Baker]("baker", BakerPlugin{})
	defer client.Kill()

	err := baker.Bake(context.Background(), 4, func(percent int) {
		fmt.Printf("%d %%\n", percent)
	})
	fmt.Println(err)
	// Output:
	// 25 %
	// 50 %
	// 75 %
	// 100 %
	// <nil>
}

// ErrSoldOut is declared in the package that host and plugin share.
var ErrSoldOut = errors.New("sold out")

// Shop is in the host what ShopServer is in the plugin.
type Shop struct{ client *rpc.Client }

func (s *Shop) Buy(ctx context.Context, what string) error {
	return plugin.Call(ctx, s.client, "Plugin.Buy", what, new(struct{}))
}

type ShopServer struct{}

func (ShopServer) Buy(what string, _ *struct{}) error {
	return fmt.Errorf("buying %s: %w", what, ErrSoldOut)
}

type ShopPlugin struct{}

func (ShopPlugin) Server(*plugin.MuxBroker) (any, error)                  { return ShopServer{}, nil }
func (ShopPlugin) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return &Shop{c}, nil }

// An error of the plugin's is the same error in the host.
func ExampleRegisterError() {
	plugin.RegisterError(ErrSoldOut) // on both sides
	shop, client := start[*Shop]("shop", ShopPlugin{})
	defer client.Kill()

	err := shop.Buy(context.Background(), "bread")
	fmt.Println(err)
	fmt.Println(errors.Is(err, ErrSoldOut))
	// Output:
	// buying bread: sold out
	// true
}

// AdderV1 and AdderV2 are two versions of a plugin, which is what answers the
// calls, too. What is common to them is in Adder.
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

// Add takes any count of numbers in version 2.
func (AdderV2Server) Add(args []int, sum *int) error {
	for _, n := range args {
		*sum += n
	}
	return nil
}

// The plugin serves two versions of its interface. A host that knows only the
// first gets that; one that knows both gets the second.
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
		err = adder.Call("Plugin.Add", args, &sum)
		fmt.Printf("version %d: the sum of %v is %d %v\n", client.NegotiatedVersion(), args, sum, err)
		client.Kill()
	}
	// Output:
	// version 1: the sum of [1 2] is 3 <nil>
	// version 2: the sum of [1 2 3] is 6 <nil>
}

// ==== What the documentation shows is built and run ====

// examplePlugins are the examples by the cookies of their plugins.
var examplePlugins = map[string]func(){
	"greeter":  Example,
	"worker":   ExampleClient_Done,
	"sleeper":  ExampleCall,
	"numberer": ExampleMuxBroker_ServeReader,
	"baker":    ExampleMuxBroker_ServeRPC,
	"shop":     ExampleRegisterError,
	"adder":    ExampleHandshakeConfig_versions,
}

// init runs an example as the main function that it is where godoc shows it:
// the test binary stands in for its plugin.
func init() {
	if main := examplePlugins[os.Getenv("EXAMPLE_PLUGIN")]; main != nil {
		main()
		os.Exit(0)
	}
}

// TestGodocPrograms saves each example as godoc shows it as the
// main.go of a module, builds it, runs it, and compares what it prints.
func TestGodocPrograms(t *testing.T) {
	t.Parallel()
	dir := newModule(t)
	fset, examples := documentedExamples(t)
	if len(examples) != len(examplePlugins) {
		t.Errorf("godoc shows %d examples, and there are %d: one is not named after anything that is exported", len(examples), len(examplePlugins))
	}
	for _, ex := range examples {
		if ex.Play == nil {
			t.Fatalf("the example %q is not a whole program: it uses what its file does not declare", ex.Name)
		}
		var text bytes.Buffer
		if err := format.Node(&text, fset, ex.Play); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "Example"+ex.Name, "main.go"), text.Bytes())
	}
	bin := filepath.Join(dir, "bin") + string(filepath.Separator)
	runIn(t, dir, "go", "build", "-o", bin, "./...")
	for _, ex := range examples {
		t.Run("Example"+ex.Name, func(t *testing.T) {
			t.Parallel()
			got := runIn(t, dir, filepath.Join(bin, "Example"+ex.Name)+exe)
			if strings.TrimSpace(got) != strings.TrimSpace(ex.Output) {
				t.Errorf("it printed\n%s\nand not\n%s", got, ex.Output)
			}
		})
	}
}

// documentedExamples are the examples that godoc shows.
func documentedExamples(t *testing.T) (*token.FileSet, []*doc.Example) {
	t.Helper()
	fset, pkg := documentation(t)
	all := pkg.Examples
	for _, f := range pkg.Funcs {
		all = append(all, f.Examples...)
	}
	for _, typ := range pkg.Types {
		all = append(all, typ.Examples...)
		for _, f := range append(typ.Funcs, typ.Methods...) {
			all = append(all, f.Examples...)
		}
	}
	return fset, all
}

// TestDocLinks checks that what looks like a link in the documentation is one:
// a link to a name that was changed shows as text in brackets.
func TestDocLinks(t *testing.T) {
	_, pkg := documentation(t)
	texts := map[string]string{"package": pkg.Doc}
	addFuncs := func(funcs []*doc.Func) {
		for _, f := range funcs {
			texts[f.Recv+"."+f.Name] = f.Doc
		}
	}
	addFuncs(pkg.Funcs)
	values := append(pkg.Consts, pkg.Vars...)
	for _, typ := range pkg.Types {
		texts[typ.Name] = typ.Doc
		addFuncs(append(typ.Funcs, typ.Methods...))
		values = append(append(values, typ.Consts...), typ.Vars...)
	}
	for _, v := range values {
		texts[v.Names[0]] = v.Doc
	}
	bracketed := regexp.MustCompile(`\[\*?(\w+\.)?[A-Z]\w*[a-z]\w*(\.\w+)?\]`)
	for name, text := range texts {
		shown := strings.ReplaceAll(string(pkg.Markdown(text)), `\`, "")
		for _, link := range bracketed.FindAllString(shown, -1) {
			if !strings.Contains(shown, link+"(") {
				t.Errorf("in the documentation of %s, %s is no link", name, link)
			}
		}
	}
}

// documentation is what godoc shows.
func documentation(t *testing.T) (*token.FileSet, *doc.Package) {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	pkg, err := doc.NewFromFiles(fset, files, "github.com/muxplug/plugin")
	if err != nil {
		t.Fatal(err)
	}
	return fset, pkg
}

// TestReadmeProgram builds the files of the README's first program as the
// README says, and runs it.
func TestReadmeProgram(t *testing.T) {
	t.Parallel()
	readme := readFile(t, "README.md")
	dir := newModule(t)
	blocks := regexp.MustCompile("(?s)```go\n// ([a-z/]+\\.go)\n(.*?)```").FindAllStringSubmatch(readme, -1)
	if len(blocks) != 3 {
		t.Fatalf("the README has %d files, not three", len(blocks))
	}
	for _, block := range blocks {
		name, text := block[1], []byte(block[2])
		if formatted, err := format.Source(text); err != nil || !bytes.Equal(formatted, text) {
			t.Errorf("%s in the README is not formatted: %v", name, err)
		}
		writeFile(t, filepath.Join(dir, name), text)
	}
	for _, command := range []string{"go build -o hello-plugin ./plugin", "go run ."} {
		if !strings.Contains(readme, "\n"+command+"\n") {
			t.Errorf("the README does not say %q", command)
		}
		command = strings.Replace(command, "hello-plugin", "hello-plugin"+exe, 1)
		got := runIn(t, dir, strings.Fields(command)...)
		if want := "Hello, Gopher! <nil>"; command == "go run ." && (got != want+"\n" || !strings.Contains(readme, "`"+want+"`")) {
			t.Errorf("it printed %q; the README must say %q", got, want)
		}
	}
}

// TestReplaceLine builds and runs a program that imports go-plugin, with the
// line in its go.mod that the README gives to those who come from there.
func TestReplaceLine(t *testing.T) {
	t.Parallel()
	const theirs, ours = "github.com/hashicorp/go-plugin", "github.com/muxplug/plugin"
	dir := newModule(t)
	if line := "go mod edit -replace=" + theirs + "=../plugin"; !strings.Contains(readFile(t, "README.md"), "\n"+line+"\n") {
		t.Errorf("the README does not say %q", line)
	}
	mod := filepath.Join(dir, "go.mod")
	writeFile(t, mod, []byte(strings.ReplaceAll(readFile(t, mod), ours, theirs)))
	fset, examples := documentedExamples(t)
	for _, ex := range examples {
		if ex.Name == "" {
			var text bytes.Buffer
			if err := format.Node(&text, fset, ex.Play); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, "main.go"), bytes.ReplaceAll(text.Bytes(), []byte(ours), []byte(theirs)))
		}
	}
	if got := runIn(t, dir, "go", "run", "."); got != "Hello!\n" {
		t.Errorf("it printed %q", got)
	}
}

// TestReadmeCommands checks that what the README tells to run is what the
// checks before a merge run, and that the files it links to are there.
func TestReadmeCommands(t *testing.T) {
	readme, ci := readFile(t, "README.md"), readFile(t, ".ci/run")
	for _, command := range []string{"go test -v -run Example .", "go test ./..."} {
		if !strings.Contains(readme, "\n"+command+"\n") {
			t.Errorf("the README does not have the command %q", command)
		}
	}
	if !strings.Contains(ci, "\ngo test ./...\n") {
		t.Error(".ci/run does not run the README's go test ./...")
	}
	for _, link := range regexp.MustCompile(`\]\(([A-Za-z0-9._/-]+)\)`).FindAllStringSubmatch(readme, -1) {
		if _, err := os.Stat(link[1]); err != nil {
			t.Errorf("the README links to what is not there: %v", err)
		}
	}
}

// exe ends the name of a program.
var exe = map[bool]string{true: ".exe"}[runtime.GOOS == "windows"]

// newModule makes a module that requires this one, as it is here, and returns
// its directory.
func newModule(t *testing.T) string {
	t.Helper()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	mod := strings.Replace(readFile(t, "go.mod"), "module github.com/muxplug/plugin", "module example.com/greeter", 1)
	mod += "\nrequire github.com/muxplug/plugin v0.0.0\n\nreplace github.com/muxplug/plugin => " + here + "\n"
	writeFile(t, filepath.Join(dir, "go.mod"), []byte(mod))
	writeFile(t, filepath.Join(dir, "go.sum"), []byte(readFile(t, "go.sum")))
	return dir
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}

func writeFile(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
}

// runIn runs a command in a directory and returns its stdout.
func runIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	// Without symbols, as linking takes most of the time.
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod -ldflags=-s", "GOWORK=off")
	cmd.WaitDelay = 20 * time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// TestPackageDocProgram checks that the program in the package's documentation
// is the README's, which TestReadmeProgram builds and runs.
func TestPackageDocProgram(t *testing.T) {
	_, pkg := documentation(t)
	blocks := regexp.MustCompile("(?s)```go\n(// [a-z/]+\\.go\n.*?)```").FindAllStringSubmatch(readFile(t, "README.md"), -1)
	for _, block := range blocks {
		lines := strings.SplitAfter(block[1], "\n")
		for i, line := range lines {
			if line != "" && line != "\n" {
				lines[i] = "\t" + line
			}
		}
		if text := strings.Join(lines, ""); !strings.Contains(pkg.Doc, text) {
			t.Errorf("the package's documentation does not have this of the README:\n%s", text)
		}
	}
}
