// Package build builds the programs that the tests and the benchmark run.
// What is written against go-plugin's API can be built with this library and
// with each version of go-plugin: the go.mod makes the difference.
package build

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Library is what a program's import of github.com/hashicorp/go-plugin means.
// It is a build tag, too.
type Library string

const (
	// Ours is the library in the directory above, by way of compat. The go.mod
	// has what it requires and nothing else, as that of a user who leaves
	// go-plugin.
	Ours Library = "ours"
	// GoPlugin is go-plugin in the version of this module's go.mod.
	GoPlugin Library = "go-plugin"
	// V1_4 and V1_0 are older versions of go-plugin, with yamux as they require it.
	V1_4 Library = "v1.4.10"
	V1_0 Library = "v1.0.0"
)

// Builder builds programs of this module into a directory. Its methods may be
// called concurrently.
type Builder struct {
	dir  string // of the binaries
	root string // of this module
}

// New returns a Builder that writes to dir, which must exist.
func New(dir string) (*Builder, error) {
	mod, err := run("", "go", "env", "GOMOD")
	return &Builder{dir, filepath.Dir(mod)}, err
}

// Version returns the version of a module that this module uses.
func (b *Builder) Version(module string) (string, error) {
	return run(b.root, "go", "list", "-m", "-f", "{{.Version}}", module)
}

// Program builds the package ./pkg and returns the binary's path. There are no
// flags that change it, and all programs are built without cgo, as programs for
// other systems are, unless CGO_ENABLED says otherwise.
func (b *Builder) Program(pkg string, lib Library) (string, error) {
	path := filepath.Join(b.dir, strings.ReplaceAll(pkg, "/", "-")+"-"+string(lib))
	_, err := run(b.root, "go", lib.args("build", "-o", path, "./"+pkg)...)
	return path, err
}

// Linked returns the packages that ./pkg is linked from, the standard library's
// included, and the modules, itself and compat not included.
func (b *Builder) Linked(pkg string, lib Library) (packages, modules []string, err error) {
	lines, err := b.List(lib, "{{.ImportPath}} {{with .Module}}{{if not .Main}}{{.Path}}{{end}}{{end}}", "./"+pkg)
	seen := make(map[string]bool)
	for _, line := range lines {
		name, module, _ := strings.Cut(line, " ")
		if lib == Ours && module == "github.com/hashicorp/go-plugin" {
			continue
		}
		packages = append(packages, name)
		if module != "" && !seen[module] {
			seen[module] = true
			modules = append(modules, module)
		}
	}
	return packages, modules, err
}

// List runs go list for packages and all that they import.
func (b *Builder) List(lib Library, format string, packages ...string) ([]string, error) {
	out, err := run(b.root, "go", lib.args("list", append([]string{"-deps", "-export", "-f", format}, packages...)...)...)
	return strings.Split(out, "\n"), err
}

func (lib Library) args(command string, rest ...string) []string {
	args := []string{command, "-tags=" + string(lib)}
	if lib != GoPlugin {
		args = append(args, "-modfile=libraries/"+string(lib)+".mod")
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
