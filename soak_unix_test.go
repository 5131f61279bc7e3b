//go:build unix

package plugin_test

import (
	"syscall"
	"time"
)

func init() {
	soakEnds = append(soakEnds,
		soakEnd{name: "SIGTERM", do: func(l *soakLife) { signalTo(l, l.pid(), syscall.SIGTERM) }},
		soakEnd{name: "Kill while stopped", asked: true, do: func(l *soakLife) {
			signalTo(l, l.pid(), syscall.SIGSTOP)
			l.client.Kill()
		}})
	soakPauses = append(soakPauses, func(l *soakLife) {
		signalTo(l, l.pid(), syscall.SIGSTOP)
		l.pass(50 * time.Millisecond)
		signalTo(l, l.pid(), syscall.SIGCONT)
		l.counts.add("pauses", 1)
	})
}

// pid returns the pid of the plugin.
func (l *soakLife) pid() int { return pidOf(l, l.client) }
