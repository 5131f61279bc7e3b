// Package build builds the programs that the tests and the benchmark run.
// What is written against go-plugin's API can be built with either library:
// the replace directive that a user would write makes the difference.
package build

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Library is what a program's import of github.com/hashicorp/go-plugin means.
type Library string

const (
	// GoPlugin is go-plugin itself, in the version of this module's go.mod.
	GoPlugin Library = "go-plugin"
	// Ours is the library in the directory above.
	Ours Library = "muxplug"
)

const replaced = "github.com/hashicorp/go-plugin"

// Builder builds programs of this module into a directory. Its methods may be
// called concurrently.
type Builder struct {
	dir  string // where binaries and the second go.mod go
	root string // of this module
}

// New returns a Builder that writes to dir, which must exist.
func New(dir string) (*Builder, error) {
	mod, err := run("", "go", "env", "GOMOD")
	if err != nil {
		return nil, err
	}
	b := &Builder{dir: dir, root: filepath.Dir(mod)}
	return b, b.writeModfile()
}

// modfile is the go.mod with which a program is built with our library.
func (b *Builder) modfile() string { return filepath.Join(b.dir, "drop-in.mod") }

// writeModfile writes a go.mod with the requirements of our library and no
// others, so that the build shows what a user gets who leaves go-plugin.
func (b *Builder) writeModfile() error {
	ours := filepath.Dir(b.root)
	mod, err := os.ReadFile(filepath.Join(ours, "go.mod"))
	if err != nil {
		return err
	}
	sum, err := os.ReadFile(filepath.Join(ours, "go.sum"))
	if err != nil {
		return err
	}
	version, err := b.Version(replaced)
	if err != nil {
		return err
	}
	text := regexp.MustCompile(`(?m)^module .*$`).ReplaceAllString(string(mod), "module github.com/muxplug/plugin/interop")
	text += fmt.Sprintf("\nrequire %s %s\n\nreplace %s => %q\n", replaced, version, replaced, ours)
	return errors.Join(
		os.WriteFile(b.modfile(), []byte(text), 0o666),
		os.WriteFile(strings.TrimSuffix(b.modfile(), "mod")+"sum", sum, 0o666),
	)
}

// Version returns the version of a module that this module uses.
func (b *Builder) Version(module string) (string, error) {
	return run(b.root, "go", "list", "-m", "-f", "{{.Version}}", module)
}

// Program builds the package ./pkg and returns the binary's path. There are no
// flags that a user would not give, and all programs get the same. They do
// without cgo, as programs that are built for other systems do, unless
// CGO_ENABLED says otherwise.
func (b *Builder) Program(pkg string, lib Library) (string, error) {
	path := filepath.Join(b.dir, strings.ReplaceAll(pkg, "/", "-")+"-"+string(lib))
	_, err := run(b.root, "go", b.args(lib, "build", "-o", path, "./"+pkg)...)
	return path, err
}

// Linked returns the packages that ./pkg is linked from, the standard library's
// included, and the modules, itself not included.
func (b *Builder) Linked(pkg string, lib Library) (packages, modules []string, err error) {
	out, err := run(b.root, "go", b.args(lib, "list", "-deps", "-f", "{{.ImportPath}} {{with .Module}}{{if not .Main}}{{.Path}}{{end}}{{end}}", "./"+pkg)...)
	seen := make(map[string]bool)
	for line := range strings.Lines(out) {
		name, module, _ := strings.Cut(strings.TrimSpace(line), " ")
		packages = append(packages, name)
		if module != "" && !seen[module] {
			seen[module] = true
			modules = append(modules, module)
		}
	}
	return packages, modules, err
}

func (b *Builder) args(lib Library, command string, rest ...string) []string {
	args := []string{command}
	if lib == Ours {
		args = append(args, "-modfile="+b.modfile())
	}
	return append(args, rest...)
}

func run(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append([]string{"CGO_ENABLED=0"}, os.Environ()...) // the last one counts
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}
