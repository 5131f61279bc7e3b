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

// This file has what makes texts for logs and errors.

// pluginName returns the name of a plugin for logs and errors.
func pluginName(path string) string {
	return strings.TrimSuffix(filepath.Base(path), ".exe")
}

// printable escapes characters that a terminal or log file could interpret, except tabs
// and line feeds. A line with such characters is escaped like a Go string.
func printable(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		text, hasEnd := strings.CutSuffix(line, "\n")
		if strings.ContainsFunc(text, mustEscape) {
			quoted := strconv.Quote(text)
			text = quoted[1 : len(quoted)-1]
		}
		b.WriteString(text)
		if hasEnd {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// mustEscape reports whether a terminal or log file could interpret r.
func mustEscape(r rune) bool {
	return r == utf8.RuneError || r != '\t' && !strconv.IsPrint(r)
}

// oneLine is printable for text that must stay in one record.
func oneLine(s string) string {
	return strings.NewReplacer("\n", `\n`, "\t", `\t`).Replace(printable(s))
}

// cutMark returns a mark for the end of a line of which cut bytes are missing, or "".
func cutMark(cut int) string {
	if cut == 0 {
		return ""
	}
	return fmt.Sprintf(" [%d more bytes]", cut)
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// inBrackets returns how a process ended, for the end of an error.
func inBrackets(state *os.ProcessState) string {
	if state == nil {
		return ""
	}
	return " (" + state.String() + ")"
}

// nameList returns the sorted names, for an error.
func nameList[V any](m map[string]V) string {
	if len(m) == 0 {
		return "none"
	}
	return strings.Join(sortedKeys(m), ", ")
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	return slices.Sorted(maps.Keys(m))
}
