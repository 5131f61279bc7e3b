package plugin

import (
	"context"
	"net/rpc"
	"time"
)

// What is served to the peer is offered as a new number, which only the peer is told. So the
// peer dials it once, and need not wait until that is acknowledged: it uses the stream at
// once. The acknowledgement is sent as for any other number.

// ServeRPC serves the methods of v to the peer, which passes id to [MuxBroker.DialRPC]
// within five seconds. [Plugin] describes the methods. If none can be called, that is
// logged, and calls return an error with the reason.
//
// stop ends the contexts of the methods that are running and waits for them to return,
// without a limit. So a method must not call it. After stop has returned, no method of v is
// called, and calls of the peer fail. It is safe to call stop more than once and at any
// time. Without stop, the service ends when the peer closes its client, or with the
// connection.
func (b *MuxBroker) ServeRPC(v any) (id uint32, stop func()) {
	svc := b.service(v)
	offer := b.offer(svc, &svc.calls, brokerTimeout)
	return offer.id, offer.stop
}

// DialRPC returns a client for the service that the peer serves as id with ServeRPC or
// AcceptAndServe. Call its methods as "Plugin.Name", and close it when it is no longer
// needed. The errors are those of [MuxBroker.Dial].
func (b *MuxBroker) DialRPC(id uint32) (*rpc.Client, error) {
	conn, err := b.Dial(id)
	if err != nil {
		return nil, err
	}
	return b.session.client(conn), nil
}

// offer is a service, reader or writer that the peer may dial and use.
type offer struct {
	broker  *MuxBroker
	id      uint32
	ctx     context.Context // ends with the offer
	cancel  context.CancelCauseFunc
	service *service
	uses    *group      // the calls of a service, or the Reads or Writes of a stream, that are running
	reads   bool        // it is a reader
	expiry  *time.Timer // of an offer with a limit
}

// offer offers svc to the peer, which must dial it in time.
func (b *MuxBroker) offer(svc *service, uses *group, timeout time.Duration) *offer {
	o := &offer{broker: b, id: b.NextId(), service: svc, uses: uses}
	o.ctx, o.cancel = context.WithCancelCause(b.session.calls)
	o.expiry = time.AfterFunc(timeout, o.end)
	b.expected.Store(o.id, o.serve)
	return o
}

// serve answers the calls of the peer. If the offer has ended, these fail.
func (o *offer) serve(st *stream) {
	defer o.cancel(nil)
	o.expiry.Stop()
	o.broker.session.answerCalls(o.ctx, st, o.service)
}

// end ends the offer without waiting for uses. None begins any more.
func (o *offer) end() {
	o.broker.expected.Delete(o.id)
	o.service.calls.close()
	o.uses.close()
	o.expiry.Stop()
	o.cancel(errStopped)
}

// stop ends the offer and waits for its uses.
func (o *offer) stop() {
	o.end()
	o.uses.Wait()
}

// dialService returns a client for a service that the peer offers as id.
func (b *MuxBroker) dialService(ctx context.Context, id uint32) (*rpc.Client, error) {
	conn, err := b.dial(ctx, id)
	if err != nil {
		return nil, err
	}
	return b.session.client(conn), nil
}
