package oip

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// RevisionParameter is the response parameter that carries the route's revision.
const RevisionParameter = "orrery_revision"

// Handler serves the REST surface of the protocol over an implementation of the gRPC service. Request headers reach
// the service as gRPC metadata. Bodies over limit bytes are refused.
func Handler(service inference.GRPCInferenceServiceServer, limit int64) http.Handler {
	h := &handler{service: service, limit: limit}
	mux := http.NewServeMux()
	for pattern, f := range map[string]restFunc{
		"GET /v2":                h.serverMetadata,
		"GET /v2/{$}":            h.serverMetadata,
		"GET /v2/health/live":    h.live,
		"GET /v2/health/ready":   h.ready,
		"GET /v2/models/{model}": h.modelMetadata,
		"GET /v2/models/{model}/versions/{version}":            h.modelMetadata,
		"GET /v2/models/{model}/ready":                         h.modelReady,
		"GET /v2/models/{model}/versions/{version}/ready":      h.modelReady,
		"POST /v2/models/{model}/infer":                        h.infer,
		"POST /v2/models/{model}/versions/{version}/infer":     h.infer,
		"GET /v2/models/{model}/config":                        h.modelConfig,
		"GET /v2/models/{model}/versions/{version}/config":     h.modelConfig,
		"GET /v2/models/stats":                                 h.statistics,
		"GET /v2/models/{model}/stats":                         h.statistics,
		"GET /v2/models/{model}/versions/{version}/stats":      h.statistics,
		"GET /v2/systemsharedmemory/status":                    noRegions,
		"GET /v2/cudasharedmemory/status":                      noRegions,
		"POST /v2/systemsharedmemory/unregister":               noRegions,
		"POST /v2/cudasharedmemory/unregister":                 noRegions,
		"POST /v2/systemsharedmemory/region/{region}/register": noSharedMemory,
		"POST /v2/cudasharedmemory/region/{region}/register":   noSharedMemory,
		"POST /v2/repository/index":                            h.index,
		"POST /v2/repository/models/{model}/load":              h.load,
		"POST /v2/repository/models/{model}/unload":            h.unload,
	} {
		mux.HandleFunc(pattern, h.serve(f))
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, status.Errorf(codes.NotFound, "no %s %s in the Open Inference Protocol v2", r.Method, r.URL.Path))
	})
	return mux
}

type handler struct {
	service inference.GRPCInferenceServiceServer
	limit   int64
}

// restFunc answers a request with a JSON value, or by itself when it returns nil and no error.
type restFunc func(w http.ResponseWriter, r *http.Request) (any, error)

func (h *handler) serve(f restFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		md := make(metadata.MD, len(r.Header))
		for k, v := range r.Header {
			md[strings.ToLower(k)] = v
		}
		answer, err := f(w, r.WithContext(metadata.NewIncomingContext(r.Context(), md)))
		switch {
		case err != nil:
			writeError(w, err)
		case answer != nil:
			writeJSON(w, http.StatusOK, answer)
		}
	}
}

func writeError(w http.ResponseWriter, err error) {
	code, retryAfter := HTTPStatus(err)
	if retryAfter != "" {
		w.Header().Set("Retry-After", retryAfter)
	}
	writeJSON(w, code, map[string]string{"error": status.Convert(err).Message()})
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		code, raw = http.StatusInternalServerError, []byte(`{"error":"the answer has no JSON form"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	w.WriteHeader(code)
	_, _ = w.Write(raw) // the client left; there is nobody to tell
}

func (h *handler) live(_ http.ResponseWriter, r *http.Request) (any, error) {
	a, err := h.service.ServerLive(r.Context(), &inference.ServerLiveRequest{})
	if err != nil {
		return nil, err
	}
	return map[string]bool{"live": a.GetLive()}, nil
}

func (h *handler) ready(w http.ResponseWriter, r *http.Request) (any, error) {
	a, err := h.service.ServerReady(r.Context(), &inference.ServerReadyRequest{})
	if err != nil {
		return nil, err
	}
	if !a.GetReady() {
		writeJSON(w, http.StatusServiceUnavailable, map[string]any{"ready": false, "live": true})
		return nil, nil //nolint:nilnil // answered
	}
	return map[string]bool{"ready": true, "live": true}, nil
}

func (h *handler) modelReady(w http.ResponseWriter, r *http.Request) (any, error) {
	name := r.PathValue("model")
	a, err := h.service.ModelReady(r.Context(), &inference.ModelReadyRequest{Name: name, Version: r.PathValue("version")})
	if err != nil {
		return nil, err
	}
	if !a.GetReady() {
		writeJSON(w, http.StatusServiceUnavailable, map[string]any{"name": name, "ready": false})
		return nil, nil //nolint:nilnil // answered
	}
	return map[string]any{"name": name, "ready": true}, nil
}

func (h *handler) serverMetadata(_ http.ResponseWriter, r *http.Request) (any, error) {
	a, err := h.service.ServerMetadata(r.Context(), &inference.ServerMetadataRequest{})
	if err != nil {
		return nil, err
	}
	return map[string]any{"name": a.GetName(), "version": a.GetVersion(), "extensions": a.GetExtensions()}, nil
}

func (h *handler) modelMetadata(_ http.ResponseWriter, r *http.Request) (any, error) {
	a, err := h.service.ModelMetadata(r.Context(), &inference.ModelMetadataRequest{Name: r.PathValue("model"), Version: r.PathValue("version")})
	if err != nil {
		return nil, err
	}
	tensors := func(ts []*inference.ModelMetadataResponse_TensorMetadata) []restTensor {
		out := make([]restTensor, len(ts))
		for i, t := range ts {
			out[i] = restTensor{Name: t.GetName(), Datatype: t.GetDatatype(), Shape: t.GetShape()}
		}
		return out
	}
	return map[string]any{
		"name": a.GetName(), "versions": a.GetVersions(), "platform": a.GetPlatform(),
		"inputs": tensors(a.GetInputs()), "outputs": tensors(a.GetOutputs()),
	}, nil
}

func (h *handler) modelConfig(_ http.ResponseWriter, r *http.Request) (any, error) {
	a, err := h.service.ModelConfig(r.Context(), &inference.ModelConfigRequest{Name: r.PathValue("model"), Version: r.PathValue("version")})
	if err != nil {
		return nil, err
	}
	return plain(a.GetConfig().ProtoReflect()), nil
}

func (h *handler) statistics(_ http.ResponseWriter, r *http.Request) (any, error) {
	a, err := h.service.ModelStatistics(r.Context(), &inference.ModelStatisticsRequest{Name: r.PathValue("model"), Version: r.PathValue("version")})
	if err != nil {
		return nil, err
	}
	return plain(a.ProtoReflect()), nil
}

// noRegions answers for shared memory, of which there is none.
func noRegions(http.ResponseWriter, *http.Request) (any, error) { return []any{}, nil }

func noSharedMemory(http.ResponseWriter, *http.Request) (any, error) { return nil, ErrSharedMemory }

// ErrSharedMemory is what a request that wants shared memory ends in.
var ErrSharedMemory = status.Error(codes.Unimplemented, "shared memory is not supported: send tensors in the request")

func (h *handler) infer(w http.ResponseWriter, r *http.Request) (any, error) {
	body, err := readBody(r, h.limit)
	if errors.Is(err, errTooLarge) {
		writeJSON(w, http.StatusRequestEntityTooLarge, map[string]string{"error": err.Error()})
		return nil, nil //nolint:nilnil // answered
	}
	var q *inference.ModelInferRequest
	if err == nil && r.Header.Get(HeaderLength) == "0" {
		if q, err = h.rawRequest(r, body); status.Code(err) != codes.Unknown && err != nil {
			return nil, err // the model is not there
		}
	} else if err == nil {
		q, err = decodeRequest(body, r.Header.Get(HeaderLength))
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	q.ModelName, q.ModelVersion = r.PathValue("model"), r.PathValue("version")
	a, err := h.service.ModelInfer(r.Context(), q)
	if err != nil {
		return nil, err
	}
	head, tail, err := encodeResponse(q, a)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	w.Header().Set("X-Orrery-Version", a.GetModelVersion())
	if p, ok := a.GetParameters()[RevisionParameter]; ok {
		w.Header().Set("X-Orrery-Revision", strconv.FormatInt(p.GetInt64Param(), 10))
	}
	if timing := serverTiming(a); timing != "" {
		w.Header().Set("Server-Timing", timing)
	}
	_ = writeBody(w, r, head, tail) // the client left; there is nobody to tell
	return nil, nil                 //nolint:nilnil // answered
}

func (h *handler) index(_ http.ResponseWriter, r *http.Request) (any, error) {
	var q struct {
		Ready bool `json:"ready"`
	}
	if err := decodeOptional(r, h.limit, &q); err != nil {
		return nil, err
	}
	a, err := h.service.RepositoryIndex(r.Context(), &inference.RepositoryIndexRequest{Ready: q.Ready})
	if err != nil {
		return nil, err
	}
	type entry struct {
		Name    string `json:"name"`
		Version string `json:"version,omitempty"`
		State   string `json:"state,omitempty"`
		Reason  string `json:"reason,omitempty"`
	}
	out := make([]entry, len(a.GetModels()))
	for i, m := range a.GetModels() {
		out[i] = entry{m.GetName(), m.GetVersion(), m.GetState(), m.GetReason()}
	}
	return out, nil
}

// decodeOptional reads a JSON body that may be empty.
func decodeOptional(r *http.Request, limit int64, into any) error {
	body, err := readBody(r, limit)
	if err == nil && len(strings.TrimSpace(string(body))) > 0 {
		err = json.Unmarshal(body, into)
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	return nil
}

type repositoryBody struct {
	Parameters map[string]any `json:"parameters"`
}

func (b repositoryBody) proto() map[string]*inference.ModelRepositoryParameter {
	out := map[string]*inference.ModelRepositoryParameter{}
	for k, v := range b.Parameters {
		switch v := v.(type) {
		case bool:
			out[k] = &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_BoolParam{BoolParam: v}}
		case float64:
			out[k] = &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_Int64Param{Int64Param: int64(v)}}
		case string:
			out[k] = &inference.ModelRepositoryParameter{ParameterChoice: &inference.ModelRepositoryParameter_StringParam{StringParam: v}}
		}
	}
	return out
}

func (h *handler) load(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b repositoryBody
	if err := decodeOptional(r, h.limit, &b); err != nil {
		return nil, err
	}
	_, err := h.service.RepositoryModelLoad(r.Context(), &inference.RepositoryModelLoadRequest{ModelName: r.PathValue("model"), Parameters: b.proto()})
	return map[string]any{}, err
}

func (h *handler) unload(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b repositoryBody
	if err := decodeOptional(r, h.limit, &b); err != nil {
		return nil, err
	}
	_, err := h.service.RepositoryModelUnload(r.Context(), &inference.RepositoryModelUnloadRequest{ModelName: r.PathValue("model"), Parameters: b.proto()})
	return map[string]any{}, err
}
