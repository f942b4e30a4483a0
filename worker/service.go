package worker

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/internal/build"
	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/registry"
)

// service answers the Open Inference Protocol from the cache.
type service struct {
	oip.NoSharedMemory

	cache   *cache
	trace   telemetry.Tracer
	timeout time.Duration // of a request that brings no deadline
	ready   func() bool
}

func fault(err error) error { return oip.Status(string(registry.CodeOf(err)), err, retryAfter(err)) }

// retryAfter is when it makes sense to come back: as the queue says, or in a second.
func retryAfter(err error) time.Duration {
	if c := registry.CodeOf(err); c == registry.Exhausted || c == registry.Unavailable {
		return cmp.Or(engine.RetryAfter(err), time.Second)
	}
	return 0
}

// ServerLive implements the protocol.
func (s *service) ServerLive(context.Context, *inference.ServerLiveRequest) (*inference.ServerLiveResponse, error) {
	return &inference.ServerLiveResponse{Live: true}, nil
}

// ServerReady implements the protocol: a worker is ready while it is attached or has been, and is not leaving.
func (s *service) ServerReady(context.Context, *inference.ServerReadyRequest) (*inference.ServerReadyResponse, error) {
	return &inference.ServerReadyResponse{Ready: s.ready()}, nil
}

// ServerMetadata implements the protocol.
func (s *service) ServerMetadata(context.Context, *inference.ServerMetadataRequest) (*inference.ServerMetadataResponse, error) {
	return &inference.ServerMetadataResponse{
		Name: "orrery-worker", Version: build.Version(), Extensions: oip.Extensions,
	}, nil
}

func parseVersion(version string) (int, error) {
	if version == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(version)
	if err != nil || n < 1 {
		return 0, registry.Errorf(registry.Invalid, "version %q: want a positive number", version)
	}
	return n, nil
}

// ModelReady implements the protocol.
func (s *service) ModelReady(_ context.Context, r *inference.ModelReadyRequest) (*inference.ModelReadyResponse, error) {
	version, err := parseVersion(r.GetVersion())
	if err != nil {
		return nil, fault(err)
	}
	e, err := s.cache.find(r.GetName(), version)
	if err != nil {
		return nil, fault(err)
	}
	select {
	case <-e.ready:
		return &inference.ModelReadyResponse{Ready: true}, nil
	default:
		return &inference.ModelReadyResponse{}, nil
	}
}

// ModelMetadata implements the protocol.
func (s *service) ModelMetadata(_ context.Context, r *inference.ModelMetadataRequest) (*inference.ModelMetadataResponse, error) {
	version, err := parseVersion(r.GetVersion())
	if err != nil {
		return nil, fault(err)
	}
	e, err := s.cache.find(r.GetName(), version)
	if err != nil {
		return nil, fault(err)
	}
	return &inference.ModelMetadataResponse{
		Name: r.GetName(), Versions: []string{strconv.Itoa(e.version)}, Platform: "onnxruntime_onnx",
		Inputs: tensorMetadata(e.signature.Inputs), Outputs: tensorMetadata(e.signature.Outputs),
	}, nil
}

func tensorMetadata(ts []registry.Tensor) []*inference.ModelMetadataResponse_TensorMetadata {
	out := make([]*inference.ModelMetadataResponse_TensorMetadata, len(ts))
	for i, t := range ts {
		out[i] = &inference.ModelMetadataResponse_TensorMetadata{Name: t.Name, Datatype: string(t.Datatype), Shape: t.Shape}
	}
	return out
}

// ModelInfer implements the protocol.
func (s *service) ModelInfer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	ctx, cancel, err := oip.WithDeadline(ctx, r, s.timeout)
	if err != nil {
		return nil, fault(registry.Errorf(registry.Invalid, "%w", err))
	}
	defer cancel()
	a, err := s.infer(ctx, r)
	if err != nil {
		return nil, fault(err)
	}
	return a, nil
}

// ModelStreamInfer implements the protocol.
func (s *service) ModelStreamInfer(stream inference.GRPCInferenceService_ModelStreamInferServer) error {
	return oip.Stream(stream, s.ModelInfer)
}

func (s *service) infer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	version, err := parseVersion(r.GetModelVersion())
	if err != nil {
		return nil, err
	}
	request, err := decode(r)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	ctx, span := s.trace.Start(ctx, "worker.infer", r.GetModelName())
	e, results, t, err := s.run(ctx, r.GetModelName(), version, request)
	span.Timing(began, t.Queue, t.Input+t.Infer+t.Output, t.Rows)
	span.End(err)
	if e != nil {
		e.observer.ended(t, time.Since(began), err)
	}
	if err != nil {
		return nil, err
	}
	a := &inference.ModelInferResponse{
		ModelName: r.GetModelName(), ModelVersion: strconv.Itoa(e.version), Id: r.GetId(),
		Outputs: make([]*inference.ModelInferResponse_InferOutputTensor, len(results)), RawOutputContents: make([][]byte, len(results)),
	}
	for i, t := range results {
		a.Outputs[i] = &inference.ModelInferResponse_InferOutputTensor{Name: t.Name, Datatype: string(t.Datatype), Shape: t.Shape}
		a.RawOutputContents[i] = t.Data
	}
	if oip.WantsTiming(ctx) {
		for name, took := range map[string]time.Duration{oip.QueueTime: t.Queue, oip.InputTime: t.Input, oip.InferTime: t.Infer, oip.OutputTime: t.Output} {
			oip.SetInt(a, name, took.Microseconds())
		}
		oip.SetInt(a, oip.BatchRows, t.Rows)
	}
	return a, nil
}

// decode turns a request into the engine's.
func decode(r *inference.ModelInferRequest) (engine.Request, error) {
	raws, err := oip.RawInputs(r)
	if err != nil {
		return engine.Request{}, registry.Errorf(registry.Invalid, "%w", err)
	}
	priority, err := oip.Priority(r)
	if err != nil {
		return engine.Request{}, registry.Errorf(registry.Invalid, "%w", err)
	}
	out := engine.Request{Inputs: make([]engine.Tensor, len(raws)), Priority: priority}
	for i, in := range r.GetInputs() {
		out.Inputs[i] = engine.Tensor{Name: in.GetName(), Datatype: registry.Datatype(in.GetDatatype()), Shape: in.GetShape(), Data: raws[i]}
	}
	for _, o := range r.GetOutputs() {
		out.Outputs = append(out.Outputs, o.GetName())
	}
	return out, nil
}

// maxSwaps bounds how often a request follows a version that is loaded anew under it.
const maxSwaps = 3

// run runs a request on a version. One that is swapped for a newer serving config in that very moment is asked again.
func (s *service) run(ctx context.Context, model string, version int, r engine.Request) (e *entry, out []engine.Tensor, t engine.Timing, err error) {
	for range maxSwaps {
		if e, err = s.cache.get(ctx, model, version); err != nil {
			return nil, nil, t, err
		}
		if out, t, err = e.model.Infer(ctx, r); !errors.Is(err, engine.ErrDraining) {
			break
		}
	}
	return e, out, t, err
}

// ModelConfig implements the protocol.
func (s *service) ModelConfig(ctx context.Context, r *inference.ModelConfigRequest) (*inference.ModelConfigResponse, error) {
	m, err := s.ModelMetadata(ctx, &inference.ModelMetadataRequest{Name: r.GetName(), Version: r.GetVersion()})
	if err != nil {
		return nil, err
	}
	version, err := parseVersion(r.GetVersion())
	if err != nil {
		return nil, fault(err)
	}
	e, err := s.cache.find(r.GetName(), version)
	if err != nil {
		return nil, fault(err)
	}
	return &inference.ModelConfigResponse{Config: oip.Config(m, Serving(e.config, e.signature.Batched))}, nil
}

// Serving says how a serving config serves, in the protocol's terms.
func Serving(c registry.ServingConfig, batched bool) oip.Serving {
	return oip.Serving{
		Batched: batched, MaxBatch: c.MaxBatch, MaxDelayMicros: c.MaxDelayMicros, Runners: c.Runners, Provider: c.Provider, Cached: c.CacheBytes > 0,
		PriorityLevels: engine.Levels, DefaultPriority: engine.DefaultLevel,
		Parameters: map[string]string{"batching": cmp.Or(string(c.Batching), string(registry.BatchDeadline)), "provider": c.Provider, "threads": strconv.Itoa(c.Threads)},
	}
}

// ModelStatistics implements the protocol.
func (s *service) ModelStatistics(_ context.Context, r *inference.ModelStatisticsRequest) (*inference.ModelStatisticsResponse, error) {
	version, err := parseVersion(r.GetVersion())
	if err != nil {
		return nil, fault(err)
	}
	a := &inference.ModelStatisticsResponse{}
	for _, l := range s.cache.ready() {
		if (r.GetName() == "" || r.GetName() == l.model) && (version == 0 || version == l.version) {
			a.ModelStats = append(a.ModelStats, statistics(l))
		}
	}
	if len(a.GetModelStats()) == 0 && r.GetName() != "" {
		if _, err := s.cache.find(r.GetName(), version); err != nil {
			return nil, fault(err)
		}
	}
	return a, nil
}

func statistics(l loaded) *inference.ModelStatistics {
	sum := func(s engine.Sum) *inference.StatisticDuration {
		return &inference.StatisticDuration{Count: uint64(s.Count), Ns: uint64(s.Time)} //nolint:gosec // not negative
	}
	st := l.stats
	out := &inference.ModelStatistics{
		Name: l.model, Version: strconv.Itoa(l.version), InferenceCount: uint64(st.Rows), ExecutionCount: uint64(st.Executions), //nolint:gosec // not negative
		InferenceStats: &inference.InferStatistics{
			Success: sum(st.Success), Fail: sum(st.Fail), Queue: sum(st.Queue), ComputeInput: sum(st.Input), ComputeInfer: sum(st.Infer),
			ComputeOutput: sum(st.Output), CacheHit: sum(st.CacheHit), CacheMiss: sum(st.CacheMiss),
		},
	}
	if !st.Last.IsZero() {
		out.LastInference = uint64(st.Last.UnixMilli())
	}
	for _, rows := range slices.Sorted(maps.Keys(st.Batches)) {
		b := st.Batches[rows]
		out.BatchStats = append(out.BatchStats, &inference.InferBatchStatistics{
			BatchSize: uint64(rows), ComputeInput: sum(b.Input), ComputeInfer: sum(b.Infer), ComputeOutput: sum(b.Output), //nolint:gosec // not negative
		})
	}
	if st.Memory > 0 {
		out.MemoryUsage = append(out.MemoryUsage, &inference.MemoryUsage{Type: "CPU", ByteSize: uint64(st.Memory)})
	}
	return out
}

// RepositoryIndex implements the protocol.
func (s *service) RepositoryIndex(_ context.Context, r *inference.RepositoryIndexRequest) (*inference.RepositoryIndexResponse, error) {
	a := &inference.RepositoryIndexResponse{}
	for _, v := range s.cache.list() {
		state := map[registry.LoadState]string{registry.Loaded: "READY", registry.Draining: "UNLOADING", registry.Cold: "UNAVAILABLE"}[v.State]
		if state == "" {
			state = "LOADING"
		}
		if r.GetReady() && state != "READY" {
			continue
		}
		a.Models = append(a.Models, &inference.RepositoryIndexResponse_ModelIndex{
			Name: v.Model, Version: strconv.Itoa(v.Version), State: state, Reason: v.Error,
		})
	}
	return a, nil
}

// errNotHere says why a worker loads and unloads nothing on request.
var errNotHere = registry.Errorf(registry.Denied, "a worker holds what the registry says; load and unload through the server")

// RepositoryModelLoad implements the protocol by refusing: the registry decides.
func (s *service) RepositoryModelLoad(context.Context, *inference.RepositoryModelLoadRequest) (*inference.RepositoryModelLoadResponse, error) {
	return nil, fault(errNotHere)
}

// RepositoryModelUnload implements the protocol by refusing: the registry decides.
func (s *service) RepositoryModelUnload(context.Context, *inference.RepositoryModelUnloadRequest) (*inference.RepositoryModelUnloadResponse, error) {
	return nil, fault(errNotHere)
}

// errNoServers is what a worker without servers ends in.
var errNoServers = errors.New("a worker needs at least one server to attach to")

func trimmed(list []string) []string {
	var out []string
	for _, s := range list {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}
