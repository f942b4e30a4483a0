package gateway

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/internal/build"
	"github.com/orrery-ml/orrery/registry"
)

// Service answers the Open Inference Protocol by routing.
type Service struct {
	oip.NoSharedMemory

	g *Gateway
}

// Service returns the protocol's service.
func (g *Gateway) Service() *Service { return &Service{g: g} }

func fault(err error) error {
	wait := time.Duration(0)
	if c := registry.CodeOf(err); c == registry.Exhausted || c == registry.Unavailable {
		wait = time.Second
	}
	return oip.Status(string(registry.CodeOf(err)), err, wait)
}

// ServerLive implements the protocol.
func (s *Service) ServerLive(context.Context, *inference.ServerLiveRequest) (*inference.ServerLiveResponse, error) {
	return &inference.ServerLiveResponse{Live: true}, nil
}

// ServerReady implements the protocol: a gateway is ready once it knows a route, from the registry or from disk.
func (s *Service) ServerReady(context.Context, *inference.ServerReadyRequest) (*inference.ServerReadyResponse, error) {
	position, synced := s.g.Position()
	return &inference.ServerReadyResponse{Ready: synced || position > 0}, nil
}

// ServerMetadata implements the protocol.
func (s *Service) ServerMetadata(context.Context, *inference.ServerMetadataRequest) (*inference.ServerMetadataResponse, error) {
	return &inference.ServerMetadataResponse{
		Name: "orrery", Version: build.Version(), Extensions: oip.Extensions,
	}, nil
}

// resolve returns the model and the version that a name and version pin, 0 when they pin none.
func (g *Gateway) resolve(name, version string) (served, int, error) {
	m, pinned, err := g.table.Load().find(name)
	if err != nil || version == "" {
		return m, pinned, err
	}
	n, err := strconv.Atoi(version)
	if err != nil || n < 1 {
		return m, 0, registry.Errorf(registry.Invalid, "version %q: want a positive number", version)
	}
	if _, ok := m.versions[n]; !ok {
		return m, 0, registry.Errorf(registry.NotFound, "model %q has no version %d that is ready; it has %v", m.model.Name, n, slices.Sorted(maps.Keys(m.versions)))
	}
	return m, n, nil
}

// described returns the version whose signature stands for a request: the pinned one, else the stable arm's.
func (g *Gateway) described(name, version string) (served, registry.Version, error) {
	m, pinned, err := g.resolve(name, version)
	if err != nil {
		return m, registry.Version{}, err
	}
	if pinned == 0 {
		pinned = m.route.StableVersion()
	}
	v, ok := m.versions[pinned]
	if !ok {
		return m, v, registry.Errorf(registry.Unavailable, "model %q serves nothing yet: set a route", m.model.Name)
	}
	return m, v, nil
}

// ModelReady implements the protocol: ready means that a worker has the version loaded and warm.
func (s *Service) ModelReady(_ context.Context, r *inference.ModelReadyRequest) (*inference.ModelReadyResponse, error) {
	_, v, err := s.g.described(r.GetName(), r.GetVersion())
	if registry.CodeOf(err) == registry.Unavailable {
		return &inference.ModelReadyResponse{}, nil
	}
	if err != nil {
		return nil, fault(err)
	}
	w, _ := s.g.fleet.pick(v.Model, v.Number, nil)
	return &inference.ModelReadyResponse{Ready: w != nil}, nil
}

// ModelMetadata implements the protocol.
func (s *Service) ModelMetadata(_ context.Context, r *inference.ModelMetadataRequest) (*inference.ModelMetadataResponse, error) {
	m, v, err := s.g.described(r.GetName(), r.GetVersion())
	if err != nil {
		return nil, fault(err)
	}
	a := &inference.ModelMetadataResponse{Name: r.GetName(), Platform: "onnxruntime_onnx", Inputs: tensors(v.Signature.Inputs), Outputs: tensors(v.Signature.Outputs)}
	for _, n := range slices.Sorted(maps.Keys(m.versions)) {
		a.Versions = append(a.Versions, strconv.Itoa(n))
	}
	return a, nil
}

// ModelConfig implements the protocol as a worker that has the version answers it.
func (s *Service) ModelConfig(ctx context.Context, r *inference.ModelConfigRequest) (*inference.ModelConfigResponse, error) {
	_, v, err := s.g.described(r.GetName(), r.GetVersion())
	if err != nil {
		return nil, fault(err)
	}
	ctx, cancel := withTimeout(ctx, describeLimit)
	defer cancel()
	w, err := s.g.awaitWorker(ctx, v.Model, v.Number, nil)
	if err != nil {
		return nil, fault(err)
	}
	a, err := w.client.ModelConfig(ctx, &inference.ModelConfigRequest{Name: v.Model, Version: strconv.Itoa(v.Number)})
	if err == nil {
		a.Config.Name = r.GetName()
	}
	return a, err
}

// describeLimit bounds calls that describe and bring no deadline.
const describeLimit = 5 * time.Second

// ModelStatistics implements the protocol by adding up what the workers say.
func (s *Service) ModelStatistics(ctx context.Context, r *inference.ModelStatisticsRequest) (*inference.ModelStatisticsResponse, error) {
	model, version := "", 0
	if r.GetName() != "" {
		m, pinned, err := s.g.resolve(r.GetName(), r.GetVersion())
		if err != nil {
			return nil, fault(err)
		}
		model, version = m.model.Name, pinned
	}
	ctx, cancel := withTimeout(ctx, describeLimit)
	defer cancel()
	ask := &inference.ModelStatisticsRequest{Name: model}
	if version > 0 {
		ask.Version = strconv.Itoa(version)
	}
	sums := map[string]*inference.ModelStatistics{}
	for _, w := range s.g.fleet.with(model, version) {
		a, err := w.client.ModelStatistics(ctx, ask)
		if status.Code(err) == codes.NotFound {
			continue // unloaded in this moment
		}
		if err != nil {
			return nil, err
		}
		for _, st := range a.GetModelStats() {
			k := st.GetName() + "\x00" + st.GetVersion()
			if into, ok := sums[k]; ok {
				oip.AddStatistics(into, st)
			} else {
				sums[k] = st
			}
		}
	}
	a := &inference.ModelStatisticsResponse{}
	for _, k := range slices.Sorted(maps.Keys(sums)) {
		if model != "" {
			sums[k].Name = r.GetName()
		}
		a.ModelStats = append(a.ModelStats, sums[k])
	}
	return a, nil
}

// ModelStreamInfer implements the protocol.
func (s *Service) ModelStreamInfer(stream inference.GRPCInferenceService_ModelStreamInferServer) error {
	return oip.Stream(stream, s.ModelInfer)
}

// Health is gRPC's health service over the gateway's readiness.
func (s *Service) Health() oip.Health {
	return oip.Health{Ready: func(ctx context.Context) bool {
		a, err := s.ServerReady(ctx, &inference.ServerReadyRequest{})
		return err == nil && a.GetReady()
	}}
}

func tensors(ts []registry.Tensor) []*inference.ModelMetadataResponse_TensorMetadata {
	out := make([]*inference.ModelMetadataResponse_TensorMetadata, len(ts))
	for i, t := range ts {
		out[i] = &inference.ModelMetadataResponse_TensorMetadata{Name: t.Name, Datatype: string(t.Datatype), Shape: t.Shape}
	}
	return out
}

// RepositoryIndex implements the protocol over all READY versions of the models that the caller may know of.
func (s *Service) RepositoryIndex(ctx context.Context, r *inference.RepositoryIndexRequest) (*inference.RepositoryIndexResponse, error) {
	a := &inference.RepositoryIndexResponse{}
	t := s.g.table.Load()
	for _, name := range slices.Sorted(maps.Keys(t.models)) {
		if !covered(ctx, name) {
			continue
		}
		for _, n := range slices.Sorted(maps.Keys(t.models[name].versions)) {
			state, reason := "READY", ""
			if w, fault := s.g.fleet.pick(name, n, nil); w == nil {
				state, reason = "UNAVAILABLE", fault
			}
			if state == "READY" || !r.GetReady() {
				a.Models = append(a.Models, &inference.RepositoryIndexResponse_ModelIndex{Name: name, Version: strconv.Itoa(n), State: state, Reason: reason})
			}
		}
	}
	return a, nil
}

// loadHold is how long a version loaded through the protocol stays without being unloaded.
const loadHold = 24 * time.Hour

// apiHolder holds what was loaded through the protocol.
const apiHolder = "api"

func versionParameter(p map[string]*inference.ModelRepositoryParameter) string {
	if v, ok := p["version"]; ok {
		if s := v.GetStringParam(); s != "" {
			return s
		}
		return strconv.FormatInt(v.GetInt64Param(), 10)
	}
	return ""
}

// RepositoryModelLoad implements the protocol for registered versions: it holds the version and waits until a worker
// has it.
func (s *Service) RepositoryModelLoad(ctx context.Context, r *inference.RepositoryModelLoadRequest) (*inference.RepositoryModelLoadResponse, error) {
	for name := range r.GetParameters() {
		if name != "version" {
			return nil, fault(registry.Errorf(registry.Denied, "parameter %q: models come from the registry, so only \"version\" can be given", name))
		}
	}
	_, v, err := s.g.described(r.GetModelName(), versionParameter(r.GetParameters()))
	if err == nil {
		hold := registry.Hold{Model: v.Model, Version: v.Number, Holder: apiHolder, Until: time.Now().Add(loadHold)}
		err = s.g.store.SetHold(ctx, hold, Actor(ctx))
	}
	if err == nil {
		ctx, cancel := withTimeout(ctx, 30*time.Second)
		defer cancel()
		_, err = s.g.awaitWorker(ctx, v.Model, v.Number, nil)
	}
	if err != nil {
		return nil, fault(err)
	}
	return &inference.RepositoryModelLoadResponse{}, nil
}

// RepositoryModelUnload implements the protocol; it refuses a version that a route, an alias or another holder needs.
func (s *Service) RepositoryModelUnload(ctx context.Context, r *inference.RepositoryModelUnloadRequest) (*inference.RepositoryModelUnloadResponse, error) {
	m, v, err := s.g.described(r.GetModelName(), versionParameter(r.GetParameters()))
	if err != nil {
		return nil, fault(err)
	}
	others := m
	others.holds = slices.DeleteFunc(slices.Clone(m.holds), func(h registry.Hold) bool { return h.Holder == apiHolder })
	if others.leased(v.Number, time.Now()) {
		return nil, fault(registry.Errorf(registry.Conflict, "version %d of %s is held by its route, an alias or a run", v.Number, v.Model))
	}
	if err := s.g.store.SetHold(ctx, registry.Hold{Model: v.Model, Version: v.Number, Holder: apiHolder}, Actor(ctx)); err != nil {
		return nil, fault(err)
	}
	s.g.demandMu.Lock()
	delete(s.g.demand, demandKey{v.Model, v.Number})
	s.g.demandMu.Unlock()
	s.g.fleet.ring(v.Model)
	return &inference.RepositoryModelUnloadResponse{}, nil
}

type callerKey struct{}

// caller is who makes a request.
type caller struct {
	name   string
	covers func(model string) bool
}

// WithCaller returns a context that says who makes the request, and which models it may know of.
func WithCaller(ctx context.Context, name string, covers func(model string) bool) context.Context {
	return context.WithValue(ctx, callerKey{}, caller{name, covers})
}

// covered says whether who makes the request may know of a model.
func covered(ctx context.Context, model string) bool {
	c, ok := ctx.Value(callerKey{}).(caller)
	return !ok || c.covers(model)
}

// Actor returns who makes the request, "anonymous" when nobody said.
func Actor(ctx context.Context) string {
	if c, ok := ctx.Value(callerKey{}).(caller); ok && c.name != "" {
		return c.name
	}
	return "anonymous"
}
