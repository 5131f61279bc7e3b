package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// unit is what a figure is in.
type unit int

const (
	seconds unit = iota
	perSecond
	bytesPerSecond
	bytes
	count
)

// speed reports whether the figure is about speed: the ratio is then how many
// times as fast something is. Otherwise it is what something costs, and the
// ratio is how much of the other's cost.
func (u unit) speed() bool { return u < bytes }

// ratio compares a figure with that of the baseline.
func (u unit) ratio(figure, base float64) float64 {
	if u == seconds {
		return base / figure
	}
	return figure / base
}

func (u unit) text(v float64) string {
	scaled := func(step float64, names ...string) string {
		i := 0
		for ; v >= step && i < len(names)-1; i++ {
			v /= step
		}
		return digits(v) + " " + names[i]
	}
	switch u {
	case seconds:
		v *= 1e9
		return scaled(1000, "ns", "µs", "ms", "s")
	case perSecond:
		return scaled(1000, "/s", "k/s", "M/s")
	case bytesPerSecond:
		return scaled(1024, "B/s", "KiB/s", "MiB/s", "GiB/s")
	case bytes:
		return scaled(1024, "B", "KiB", "MiB", "GiB")
	}
	return digits(v)
}

// digits has three significant digits, and no more.
func digits(v float64) string {
	switch {
	case v == math.Trunc(v) || v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}

// figures is a peer's, for each round.
type figures []float64

// compared is the median of each round's ratio, with its spread.
func compared(u unit, own, base figures) string {
	ratios := make([]float64, len(own))
	for round := range own {
		ratios[round] = u.ratio(own[round], base[round])
	}
	text := fmt.Sprintf("%.2f", median(ratios))
	if low, high := slices.Min(ratios), slices.Max(ratios); fmt.Sprintf("%.2f", low) != fmt.Sprintf("%.2f", high) {
		text += fmt.Sprintf(" (%.2f–%.2f)", low, high)
	}
	return text
}

// result is what was measured: figures by work and peer.
type result map[string]map[string]figures

// add adds the figures of one round.
func (r result) add(w work, round map[string]float64) {
	if r[w.name] == nil {
		r[w.name] = make(map[string]figures)
	}
	for peer, figure := range round {
		r[w.name][peer] = append(r[w.name][peer], figure)
	}
}

// rows is the table, its header first.
func (r result) rows(speed bool) (rows [][]string) {
	header := []string{"work"}
	if !speed {
		header[0] = "cost"
	}
	for _, p := range peers {
		header = append(header, p.name)
	}
	rows = append(rows, header)
	for _, w := range works {
		if w.unit.speed() != speed || r[w.name] == nil {
			continue
		}
		row := []string{w.name}
		for _, p := range peers {
			own, base := r[w.name][p.name], r[w.name][baseline]
			switch {
			case own == nil:
				row = append(row, "–")
			case p.name == baseline:
				row = append(row, w.unit.text(median(own)))
			default:
				row = append(row, w.unit.text(median(own))+", "+compared(w.unit, own, base))
			}
		}
		rows = append(rows, row)
	}
	return rows
}

const (
	speedTitle = "Speed: the median, and how many times as fast as " + baseline + " that is, with the spread over the rounds."
	costTitle  = "Costs: the median, and how much of " + baseline + "'s that is."
)

// text is the tables for a terminal.
func (r result) text() string {
	var b strings.Builder
	for _, speed := range []bool{true, false} {
		b.WriteString("\n" + title(speed) + "\n\n")
		w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
		for _, row := range r.rows(speed) {
			fmt.Fprintln(w, strings.Join(row, "\t"))
		}
		_ = w.Flush() // to a strings.Builder, which never fails
	}
	return b.String()
}

// markdown is the same as Markdown.
func (r result) markdown() string {
	var b strings.Builder
	for _, speed := range []bool{true, false} {
		b.WriteString("\n" + title(speed) + "\n\n")
		for n, row := range r.rows(speed) {
			b.WriteString("| " + strings.Join(row, " | ") + " |\n")
			if n == 0 {
				b.WriteString("|" + strings.Repeat(" --- |", len(row)) + "\n")
			}
		}
	}
	return b.String()
}

func title(speed bool) string {
	if speed {
		return speedTitle
	}
	return costTitle
}
