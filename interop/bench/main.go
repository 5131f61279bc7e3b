// Program bench measures this library against others and against what there
// is without any. Run it in the directory interop:
//
//	go run ./bench [-rounds N] [-quick] [-run REGEXP] [-md FILE]
//
// The peers are measured in turns within each round, so that what disturbs the
// machine disturbs all of them, and each is compared with the others of its
// own round. What is compared is printed, and written as Markdown if asked.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"

	"github.com/muxplug/plugin/interop/internal/build"
)

var (
	rounds    = flag.Int("rounds", 9, "how many rounds")
	fast      = flag.Bool("quick", false, "one round with little work, to see that all of it runs")
	markdown  = flag.String("md", "", "write the tables to this file, as Markdown")
	only      = flag.String("run", "", "only the rows that match this regular expression")
	hostOf    = flag.String("host", "", "used by this program itself")
	binaryOf  = flag.String("binary", "", "used by this program itself")
	pluginsOf = flag.Int("plugins", 0, "used by this program itself")
)

func main() {
	flag.Parse()
	if os.Getenv(handshake.MagicCookieKey) != "" {
		serveInvoke() // compareInvoke or sequences has started this program as its plugin
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if *hostOf != "" {
		for _, p := range peers {
			if p.name == *hostOf {
				p.binary = *binaryOf
				return hostSome(p, *pluginsOf)
			}
		}
		return fmt.Errorf("no such peer: %s", *hostOf)
	}
	pattern, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// Some leave their sockets behind.
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return err
	}
	builder, err := build.New(dir)
	if err != nil {
		return err
	}
	e, n := usual, *rounds
	if *fast {
		e, n = quick, 1
	}
	r, err := measure(builder, e, n, pattern)
	if err != nil {
		return err
	}
	about, err := conditions(builder, n)
	if err != nil {
		return err
	}
	if pattern.MatchString("Invoke") {
		compared, err := compareInvoke(e, n)
		if err != nil {
			return err
		}
		about += "\n" + compared
	}
	fmt.Println(about)
	fmt.Print(r.text())
	if *markdown == "" {
		return nil
	}
	return os.WriteFile(*markdown, []byte(about+"\n"+r.markdown()), 0o666)
}

// measure runs all rounds.
func measure(builder *build.Builder, e effort, rounds int, pattern *regexp.Regexp) (_ result, err error) {
	instances := make(map[*peer]*instance)
	defer func() {
		for _, i := range instances {
			i.kill()
		}
	}()
	for _, p := range peers {
		if p.binary, err = builder.Program(p.pkg, p.lib); err != nil {
			return nil, err
		}
		if instances[p], err = p.start(p.binary); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		for range 100 { // to be warm
			if err := instances[p].small(); err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	r := make(result)
	for round := range rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, rounds)
		for _, w := range works {
			if !pattern.MatchString(w.name) {
				continue
			}
			if w.static && round > 0 {
				continue
			}
			figures, err := takeTurns(builder, e, w, instances, round)
			if err != nil {
				return nil, err
			}
			r.add(w, figures)
		}
	}
	return r, nil
}

// takeTurns measures one work with all peers, of which nobody is always the
// first, and returns the figures of one round.
func takeTurns(builder *build.Builder, e effort, w work, instances map[*peer]*instance, round int) (map[string]float64, error) {
	turns := e.turns
	if w.long {
		turns = 1
	}
	all := make(map[string][]float64)
	for turn := range turns {
		for n := range peers {
			p := peers[(n+turn+round)%len(peers)]
			runtime.GC() // of what the one before has left
			figure, err := w.measure(e, builder, p, instances[p])
			if errors.Is(err, errAbsent) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", w.name, p.name, err)
			}
			all[p.name] = append(all[p.name], figure)
		}
	}
	figures := make(map[string]float64)
	for name, values := range all {
		figures[name] = median(values)
	}
	return figures, nil
}

// conditions says what was measured, on what.
func conditions(b *build.Builder, rounds int) (string, error) {
	versions := make([]any, 0, 3)
	for _, module := range []string{"github.com/hashicorp/go-plugin", "google.golang.org/grpc", "github.com/hashicorp/yamux"} {
		v, err := b.Version(module)
		if err != nil {
			return "", err
		}
		versions = append(versions, v)
	}
	kernel, _ := exec.Command("uname", "-sr").Output()
	command := "go run ./bench"
	if args := os.Args[1:]; len(args) > 0 {
		command += " " + strings.Join(args, " ")
	}
	return fmt.Sprintf("`%s` in interop; rounds: %d; %s, %d × %s, %s, %s/%s;\n", command, rounds,
		runtime.Version(), runtime.NumCPU(), cpu(), strings.TrimSpace(string(kernel)), runtime.GOOS, runtime.GOARCH) +
		fmt.Sprintf("go-plugin %s, grpc %s, yamux %s.", versions...), nil
}

// cpu is the processor's name, where Linux tells it.
func cpu() string {
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, after, _ := strings.Cut(string(info), "model name")
	line, _, _ := strings.Cut(after, "\n")
	if name := strings.TrimLeft(line, "\t: "); name != "" {
		return name
	}
	return "processors"
}
