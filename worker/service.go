package worker

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/internal/build"
	"github.com/orrery-ml/orrery/registry"
)

// service answers the Open Inference Protocol from the cache.
type service struct {
	inference.UnimplementedGRPCInferenceServiceServer

	cache   *cache
	timeout time.Duration // of a request that brings no deadline
	ready   func() bool
}

func fault(err error) error { return oip.Status(string(registry.CodeOf(err)), err, retryAfter(err)) }

func retryAfter(err error) time.Duration {
	if c := registry.CodeOf(err); c == registry.Exhausted || c == registry.Unavailable {
		return time.Second
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
		Name: "orrery-worker", Version: build.Version(), Extensions: []string{"binary_tensor_data", "model_repository", "parameters"},
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
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.timeout)
		defer cancel()
	}
	a, err := s.infer(ctx, r)
	if err != nil {
		return nil, fault(err)
	}
	return a, nil
}

func (s *service) infer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	version, err := parseVersion(r.GetModelVersion())
	if err != nil {
		return nil, err
	}
	raws, err := oip.RawInputs(r)
	if err != nil {
		return nil, registry.Errorf(registry.Invalid, "%w", err)
	}
	inputs := make([]engine.Tensor, len(raws))
	for i, in := range r.GetInputs() {
		inputs[i] = engine.Tensor{Name: in.GetName(), Datatype: registry.Datatype(in.GetDatatype()), Shape: in.GetShape(), Data: raws[i]}
	}
	outputs := make([]string, len(r.GetOutputs()))
	for i, o := range r.GetOutputs() {
		outputs[i] = o.GetName()
	}
	model, number, err := s.cache.get(ctx, r.GetModelName(), version)
	if err != nil {
		return nil, err
	}
	results, err := model.Infer(ctx, inputs, outputs)
	if err != nil {
		return nil, err
	}
	a := &inference.ModelInferResponse{ModelName: r.GetModelName(), ModelVersion: strconv.Itoa(number), Id: r.GetId()}
	for _, t := range results {
		a.Outputs = append(a.Outputs, &inference.ModelInferResponse_InferOutputTensor{Name: t.Name, Datatype: string(t.Datatype), Shape: t.Shape})
		a.RawOutputContents = append(a.RawOutputContents, t.Data)
	}
	return a, nil
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
