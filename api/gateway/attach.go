package gateway

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
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
	g.fleet.ring()
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
