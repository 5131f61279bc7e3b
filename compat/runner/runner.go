// Package runner has the names of github.com/hashicorp/go-plugin/runner that
// reattaching needs.
package runner

import "github.com/muxplug/plugin"

// AttachedRunner is a running plugin that its host has found by its own means.
type AttachedRunner = plugin.AttachedRunner

// ReattachFunc finds a running plugin; see [plugin.ReattachConfig].
type ReattachFunc = func() (AttachedRunner, error)
