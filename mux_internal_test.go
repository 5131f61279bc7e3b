package plugin

import (
	"context"
	"errors"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// A plugin whose connection has ended is not asked to quit, which would wait for the reason.
func TestQuitWithoutConnection(t *testing.T) {
	hostEnd, pluginEnd := TestConn(t)
	release := make(chan struct{})
	diagnose := func(bool) error {
		<-release
		return errors.New("test: lost")
	}
	host, err := newConnection(hostEnd, anyPeer, nil, hclog.NewNullLogger(), diagnose)
	check(t, err)
	check(t, pluginEnd.Close())
	receive(t, "the end of the session", host.session.ended())
	asked := make(chan error, 1)
	go func() { asked <- host.quit(context.Background()) }() // waited for below
	if receive(t, "quit", asked) == nil {
		t.Error("it was asked to quit")
	}
	close(release)
	_ = host.Close()
}
