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
)

// This file has what makes texts for logs and errors.

// reattachedName begins the name of a plugin that this host has not started. Its path is
// not known, so its address follows.
const reattachedName = "at "

// pluginName returns the name of a plugin for logs and errors. path is that of its binary,
// or the name of a reattached plugin.
func pluginName(path string) string {
	if strings.HasPrefix(path, reattachedName) {
		return path
	}
	return strings.TrimSuffix(filepath.Base(path), ".exe")
}

// peerName returns the beginning of the errors about a plugin, as pluginName names it. If the
// cause of an unanswered call begins with it, the error of the call does not repeat it.
func peerName(path string) string { return "plugin " + pluginName(path) }

// harmless has the escapes of strconv.QuoteToGraphic for what need not be escaped. Some
// scripts and emoji need joiners, U+200C and U+200D.
var harmless = strings.NewReplacer(
	`\\`, `\`, `\"`, `"`, `\t`, "\t", `\n`, "\n", `\u200c`, "\u200c", `\u200d`, "\u200d",
)

// printable escapes characters that a terminal or log file could interpret, except tabs
// and line feeds.
func printable(s string) string {
	quoted := strconv.QuoteToGraphic(s)
	return harmless.Replace(quoted[1 : len(quoted)-1])
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

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
