package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/registry"
)

const (
	reportEvery   = time.Second          // when nothing changes
	reportSpacing = 5 * time.Millisecond // with many models each report is long
)

// attacher keeps the worker attached to one server until its context ends.
type attacher struct {
	server string
	token  string
	cache  *cache
	report func(leaving bool) *attach.AttachRequest
	change <-chan struct{}
	onHold func()
	log    *slog.Logger
}

func (a *attacher) run(ctx context.Context) {
	for wait := 50 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 2*time.Second) {
		began := time.Now()
		err := a.attach(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > 10*time.Second {
			wait = 50 * time.Millisecond
		}
		a.log.Warn("attachment lost", "server", a.server, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (a *attacher) attach(ctx context.Context) error {
	conn, err := grpc.NewClient(a.server,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}))
	if err != nil {
		return fmt.Errorf("dial %s: %w", a.server, err)
	}
	defer func() { _ = conn.Close() }() // given up either way
	// The stream outlives ctx by the one message that says the worker leaves.
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stream, err := attach.NewAttachServiceClient(conn).Attach(metadata.AppendToOutgoingContext(life, "authorization", "Bearer "+a.token))
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- a.receive(stream) }() // ends with the stream, which cancel ends
	ticker := time.NewTicker(reportEvery)
	defer ticker.Stop()
	for {
		if err := stream.Send(a.report(false)); err != nil {
			return <-failed
		}
		select {
		case <-ctx.Done():
			_ = stream.Send(a.report(true)) // best effort: the lease runs out anyway
			_ = stream.CloseSend()
			<-time.After(20 * time.Millisecond)
			return ctx.Err()
		case err := <-failed:
			return err
		case <-a.change:
			<-time.After(reportSpacing) // what else changes meanwhile comes along
		case <-ticker.C:
		}
	}
}

// receive holds what the server says: all of it at first, and then what changed.
func (a *attacher) receive(stream attach.AttachService_AttachClient) error {
	for first := true; ; first = false {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		list, dropped, err := decodeNews(m)
		if err != nil {
			a.log.Error("a held version does not decode", "server", a.server, "error", err)
		}
		if first {
			a.cache.hold(a.server, list)
		} else {
			a.cache.change(a.server, list, dropped)
		}
		a.onHold()
	}
}

// decodeNews reads what a server says. A version that does not decode is not to be held.
func decodeNews(m *attach.AttachResponse) (list []held, dropped []key, err error) {
	var errs []error
	for _, v := range m.GetDropped() {
		dropped = append(dropped, key{v.GetModel(), int(v.GetVersion())})
	}
	for _, v := range m.GetHeld() {
		h, err := decodeHeld(v)
		if err == nil {
			list = append(list, h)
			continue
		}
		dropped = append(dropped, h.key)
		errs = append(errs, fmt.Errorf("%s version %d: %w", h.model, h.version, err))
	}
	return list, dropped, errors.Join(errs...)
}

func decodeHeld(v *attach.HeldVersion) (held, error) {
	h := held{key: key{v.GetModel(), int(v.GetVersion())}, digest: v.GetDigest(), config: registry.DefaultServingConfig(), leased: v.GetLeased()}
	for into, raw := range map[any][]byte{&h.manifest: v.GetManifest(), &h.signature: v.GetSignature(), &h.config: v.GetConfig()} {
		if err := json.Unmarshal(raw, into); err != nil {
			return h, err
		}
	}
	if err := registry.CheckDigest(h.digest); err != nil {
		return h, err
	}
	if h.manifest.Digest() != h.digest {
		return h, registry.Errorf(registry.Corrupt, "manifest of %s version %d is not the one its digest names", h.model, h.version)
	}
	return h, nil
}
