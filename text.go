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
	"unicode"
	"unicode/utf8"
)

// This file has what makes texts for logs and errors.

// pluginName returns the name of a plugin for logs and errors.
func pluginName(path string) string {
	return strings.TrimSuffix(filepath.Base(path), ".exe")
}

// printable escapes characters that a terminal or log file could interpret, except tabs
// and line feeds.
func printable(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		valid := r != utf8.RuneError || size > 1
		if valid && isPrintable(r) {
			b.WriteString(s[:size])
		} else {
			b.WriteString(strings.Trim(strconv.Quote(s[:size]), `"`))
		}
		s = s[size:]
	}
	return b.String()
}

// isPrintable reports whether a terminal shows a character and does nothing else. Some
// scripts and emoji need joiners.
func isPrintable(r rune) bool {
	const nonJoiner, joiner = '\u200c', '\u200d'
	return unicode.IsGraphic(r) || r == '\t' || r == '\n' || r == nonJoiner || r == joiner
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
