package plugin

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// cutMark returns a mark for the end of a line that was cut, or "".
func cutMark(cut int) string {
	if cut == 0 {
		return ""
	}
	return fmt.Sprintf(" [%d more bytes]", cut)
}

// oneLine is printable for text that must stay in one record.
func oneLine(s string) string {
	return strings.NewReplacer("\n", `\n`, "\t", `\t`).Replace(printable(s))
}

// printable escapes characters that a terminal or log file could interpret, except tabs
// and line feeds.
func printable(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if strings.ContainsFunc(line, func(r rune) bool { return r == utf8.RuneError || r != '\t' && r != '\n' && !strconv.IsPrint(r) }) {
			quoted := strconv.Quote(strings.TrimSuffix(line, "\n"))
			line = quoted[1:len(quoted)-1] + line[len(strings.TrimSuffix(line, "\n")):]
		}
		b.WriteString(line)
	}
	return b.String()
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	return slices.Sorted(maps.Keys(m))
}

// nameList returns the sorted names, for an error.
func nameList[V any](m map[string]V) string {
	if len(m) == 0 {
		return "none"
	}
	return strings.Join(sortedKeys(m), ", ")
}

func inBrackets(state *os.ProcessState) string {
	if state == nil {
		return ""
	}
	return " (" + state.String() + ")"
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// pluginName returns the name of a plugin for logs and errors.
func pluginName(path string) string {
	return strings.TrimSuffix(filepath.Base(path), ".exe")
}
