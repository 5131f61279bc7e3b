package plugin

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// This file finds the binaries of plugins.

// Discover returns the absolute paths, sorted, of the executable files in dir that
// match the pattern glob of [path.Match]. On Windows, files ending in .exe, .com,
// .bat and .cmd are executable. If dir does not exist, there are none. A malformed
// pattern is an error.
func Discover(glob, dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("plugin: discovering plugins like %q: %w", glob, err)
	}
	files := os.DirFS(dir)
	names, err := fs.Glob(files, filepath.ToSlash(glob))
	if err != nil {
		return nil, fmt.Errorf("plugin: discovering plugins like %q: %w", glob, err)
	}
	var found []string
	for _, name := range names {
		info, err := fs.Stat(files, name)
		if err == nil && executable(info) { // it may have been removed
			found = append(found, filepath.Join(dir, name))
		}
	}
	slices.Sort(found) // Glob sorts within each directory
	return found, nil
}

func executable(info fs.FileInfo) bool {
	if !info.Mode().IsRegular() {
		return false
	}
	if runtime.GOOS != "windows" {
		return info.Mode().Perm()&0o111 != 0
	}
	extension := strings.ToLower(filepath.Ext(info.Name()))
	return slices.Contains([]string{".exe", ".com", ".bat", ".cmd"}, extension)
}
