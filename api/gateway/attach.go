package gateway

import (
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/registry"
)

// attachService is what workers attach to.
type attachService struct {
	attach.UnimplementedAttachServiceServer

	g *Gateway
}

// AttachService returns the service that workers attach to.
func (g *Gateway) AttachService() attach.AttachServiceServer { return &attachService{g: g} }

func (g *Gateway) checkToken(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	for _, v := range md.Get("authorization") {
		if subtle.ConstantTimeCompare([]byte(strings.TrimPrefix(v, "Bearer ")), []byte(g.config.JoinToken)) == 1 {
			return nil
		}
	}
	return status.Error(codes.Unauthenticated, "the join token is missing or wrong")
}

// Attach implements the service.
func (s *attachService) Attach(stream attach.AttachService_AttachServer) error {
	g := s.g
	if err := g.checkToken(stream.Context()); err != nil {
		return err
	}
	hello, err := stream.Recv()
	if err != nil {
		return err
	}
	if hello.GetId() == "" || hello.GetAddress() == "" {
		return status.Error(codes.InvalidArgument, "a worker says its id and address first")
	}
	w, err := g.fleet.join(hello.GetId(), hello.GetNode(), hello.GetAddress())
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "worker address %q: %v", hello.GetAddress(), err)
	}
	g.log.Info("worker attached", "worker", w.id, "node", w.node, "address", w.address)
	defer func() {
		g.fleet.leave(w)
		g.log.Info("worker detached", "worker", w.id, "node", w.node)
	}()
	g.fleet.ringAll()
	left := make(chan error, 1)
	go func() { left <- g.hear(stream, w, hello) }() // ends with the stream
	return g.assign(stream, w, left)
}

// hear takes the worker's reports until the stream ends or the worker says it leaves.
func (g *Gateway) hear(stream attach.AttachService_AttachServer, w *attached, m *attach.AttachRequest) error {
	var renewed time.Time
	for {
		var state registry.WorkerState
		if err := json.Unmarshal(m.GetState(), &state); err != nil {
			return status.Errorf(codes.InvalidArgument, "worker state: %v", err)
		}
		g.forgetEvicted(state)
		if changed := g.fleet.report(w, state); changed || time.Since(renewed) > leaseTTL/4 {
			g.leaseWorker(stream.Context(), w, state)
			renewed = time.Now()
		}
		if m.GetLeaving() {
			g.fleet.leave(w)
			g.dropLease(stream.Context(), w.id)
			return nil
		}
		var err error
		if m, err = stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// forgetEvicted stops asking for versions that a worker unloaded to make room; the next request asks again.
func (g *Gateway) forgetEvicted(s registry.WorkerState) {
	for _, v := range s.Loaded {
		if v.Evicted {
			g.demandMu.Lock()
			delete(g.demand, demandKey{v.Model, v.Version})
			g.demandMu.Unlock()
		}
	}
}

func (g *Gateway) leaseWorker(ctx context.Context, w *attached, state registry.WorkerState) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	now := time.Now()
	err := g.store.PutLease(ctx, registry.Lease{
		ID: w.id, Kind: registry.WorkerLease, Node: w.node, Address: w.address, StartedAt: now, Expires: now.Add(leaseTTL), Worker: state,
	})
	if err != nil && ctx.Err() == nil {
		g.log.Warn("lease worker", "worker", w.id, "error", err)
	}
}

func (g *Gateway) dropLease(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	if err := g.store.DropLease(ctx, id); err != nil {
		g.log.Warn("drop lease", "lease", id, "error", err)
	}
}

// assign tells the worker what to hold whenever that changes.
func (g *Gateway) assign(stream attach.AttachService_AttachServer, w *attached, left <-chan error) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	var sent []*attach.HeldVersion
	var encoded heldCache
	for first := true; ; first = false {
		list, position := g.assignment(w.id, &encoded)
		changed, dropped := changes(sent, list)
		if first || len(changed)+len(dropped) > 0 {
			if err := stream.Send(&attach.AttachResponse{Held: changed, Dropped: dropped, Position: position}); err != nil {
				return err
			}
			sent = list
		}
		select {
		case err := <-left:
			return err
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-g.stopping:
			return status.Error(codes.Unavailable, "the server stops")
		case <-w.wake:
			if err := pause(stream.Context(), assignSpacing); err != nil { // what else changes meanwhile comes along
				return err
			}
		case <-ticker.C:
		}
	}
}

// changes tells one assignment from the one before it; both are in order. Encoded versions are kept, so equal pointers
// are equal versions.
func changes(before, after []*attach.HeldVersion) (changed []*attach.HeldVersion, dropped []*attach.VersionName) {
	for len(before)+len(after) > 0 {
		order := 0
		switch {
		case len(before) == 0:
			order = 1
		case len(after) == 0:
			order = -1
		default:
			order = compareHeld(before[0], after[0])
		}
		if order < 0 {
			dropped = append(dropped, &attach.VersionName{Model: before[0].GetModel(), Version: before[0].GetVersion()})
		} else if order > 0 || before[0] != after[0] {
			changed = append(changed, after[0])
		}
		if order <= 0 {
			before = before[1:]
		}
		if order >= 0 {
			after = after[1:]
		}
	}
	return changed, dropped
}

func compareHeld(a, b *attach.HeldVersion) int {
	return cmp.Or(strings.Compare(a.GetModel(), b.GetModel()), cmp.Compare(a.GetVersion(), b.GetVersion()))
}

// assignSpacing bounds how often a worker is told anew: with many models it takes long to work out what.
const assignSpacing = 5 * time.Millisecond

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// heldKey is what an encoded version depends on.
type heldKey struct {
	model    string
	version  int
	revision int64 // of the serving config
	leased   bool
}

// heldCache keeps encoded versions from one assignment to the next. It is one worker's.
type heldCache struct {
	now, before map[heldKey]*attach.HeldVersion
}

// next begins an assignment: what the last one did not use is forgotten.
func (c *heldCache) next() {
	c.now, c.before = make(map[heldKey]*attach.HeldVersion, len(c.now)), c.now
}

func (c *heldCache) get(v registry.Version, m registry.Model, leased bool) (*attach.HeldVersion, error) {
	k := heldKey{m.Name, v.Number, m.ConfigRevision, leased}
	h, ok := c.before[k]
	if !ok {
		var err error
		if h, err = encodeHeld(v, m.Config, leased); err != nil {
			return nil, err
		}
	}
	c.now[k] = h
	return h, nil
}

// assignment lists what a worker should hold: versions that are leased, and those that were asked for lately, as far
// as placement puts them on it.
func (g *Gateway) assignment(worker string, encoded *heldCache) (list []*attach.HeldVersion, position int64) {
	t, now, workers := g.table.Load(), time.Now(), g.fleet.candidates()
	encoded.next()
	for name, m := range t.models {
		for number, v := range m.versions {
			leased := m.leased(number, now)
			if leased {
				g.want(name, number)
			} else if !g.wanted(name, number, now, time.Duration(m.model.Config.KeepAliveSecs)*time.Second) {
				continue
			}
			if !place(workers, name, number, m.model.Config.Replicas, m.model.Config.WorkerLabels)[worker] {
				continue
			}
			h, err := encoded.get(v, m.model, leased)
			if err != nil {
				g.log.Error("encode a held version", "model", name, "version", number, "error", err)
				continue
			}
			list = append(list, h)
		}
	}
	slices.SortFunc(list, compareHeld)
	return list, t.position
}

func encodeHeld(v registry.Version, c registry.ServingConfig, leased bool) (*attach.HeldVersion, error) {
	manifest, err := json.Marshal(v.Manifest)
	if err != nil {
		return nil, err
	}
	signature, err := json.Marshal(v.Signature)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	return &attach.HeldVersion{
		Model: v.Model, Version: int64(v.Number), Digest: v.Digest, Manifest: manifest, Signature: signature, Config: config, Leased: leased,
	}, nil
}
