package api

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

func (s *Server) modelDTO(m registry.Model, r registry.Route) Model {
	return Model{
		Name: m.Name, Description: m.Description, Config: m.Config, ConfigRevision: m.ConfigRevision, Retrain: m.Retrain,
		Rollout: m.Rollout, CreatedAt: m.CreatedAt, CreatedBy: m.CreatedBy, Route: r,
	}
}

// ListModels implements the API.
func (s *Server) ListModels(ctx context.Context, _ ListModelsRequestObject) (ListModelsResponseObject, error) {
	snap, err := s.store.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	routes := map[string]registry.Route{}
	for _, r := range snap.Routes {
		routes[r.Model] = r
	}
	out := ListModels200JSONResponse{}
	for _, m := range snap.Models {
		if caller(ctx).Covers(m.Name) {
			r := routes[m.Name]
			r.Model = m.Name
			out = append(out, s.modelDTO(m, r))
		}
	}
	return out, nil
}

// CreateModel implements the API.
func (s *Server) CreateModel(ctx context.Context, r CreateModelRequestObject) (CreateModelResponseObject, error) {
	m := registry.Model{
		Name: r.Body.Name, Description: value(r.Body.Description), Config: registry.DefaultServingConfig(),
		Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy(), CreatedBy: actor(ctx),
	}
	if err := permit(caller(ctx), registry.Developer, m.Name); err != nil {
		return nil, err
	}
	if err := merge("config", r.Body.Config, &m.Config); err != nil {
		return nil, err
	}
	if err := merge("retrain", r.Body.Retrain, &m.Retrain); err != nil {
		return nil, err
	}
	if err := mergeRollout(r.Body.Rollout, &m.Rollout); err != nil {
		return nil, err
	}
	made, err := s.store.CreateModel(ctx, m)
	if err != nil {
		return nil, err
	}
	return CreateModel201JSONResponse(s.modelDTO(made, registry.Route{Model: made.Name})), nil
}

// GetModel implements the API.
func (s *Server) GetModel(ctx context.Context, r GetModelRequestObject) (GetModelResponseObject, error) {
	m, err := s.store.Model(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	route, err := s.store.Route(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	return GetModel200JSONResponse(s.modelDTO(m, route)), nil
}

// ConfigureModel implements the API.
func (s *Server) ConfigureModel(ctx context.Context, r ConfigureModelRequestObject) (ConfigureModelResponseObject, error) {
	m, err := s.store.Model(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	if err := merge("config", r.Body.Config, &m.Config); err != nil {
		return nil, err
	}
	if err := merge("retrain", r.Body.Retrain, &m.Retrain); err != nil {
		return nil, err
	}
	if err := mergeRollout(r.Body.Rollout, &m.Rollout); err != nil {
		return nil, err
	}
	if r.Body.Description != nil {
		m.Description = *r.Body.Description
	}
	expected := m.ConfigRevision
	if v := value(r.Body.Revision); v != 0 {
		expected = v
	}
	made, err := s.store.ConfigureModel(ctx, m, expected, actor(ctx))
	if err != nil {
		return nil, err
	}
	if r.Body.Rollout != nil {
		s.tell(ctx, r.Model, workflows.PolicyChangedSignal, nil)
	}
	route, err := s.store.Route(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	return ConfigureModel200JSONResponse(s.modelDTO(made, route)), nil
}

// HeadBlob implements the API.
func (s *Server) HeadBlob(ctx context.Context, r HeadBlobRequestObject) (HeadBlobResponseObject, error) {
	if err := registry.CheckDigest(r.Sha256); err != nil {
		return nil, err
	}
	if _, err := s.objects.Stat(ctx, registry.BlobKey(r.Sha256)); err != nil {
		return nil, err
	}
	return HeadBlob200Response{}, nil
}

// PutBlob implements the API.
func (s *Server) PutBlob(ctx context.Context, r PutBlobRequestObject) (PutBlobResponseObject, error) {
	if r.Params.ContentLength < 0 {
		return nil, registry.Errorf(registry.Invalid, "an upload announces its Content-Length")
	}
	if err := registry.PutBlob(ctx, s.objects, r.Sha256, r.Params.ContentLength, r.Body); err != nil {
		return nil, err
	}
	return PutBlob204Response{}, nil
}

func versionDTO(v registry.Version) Version {
	latency := v.Latency
	if latency == nil {
		latency = []registry.BatchLatency{}
	}
	return Version{
		Model: v.Model, Version: v.Number, Status: string(v.Status), Reason: &v.Reason, Digest: v.Digest, Size: v.Manifest.Size(),
		Description: &v.Description, Files: v.Manifest.Files, Signature: v.Signature, Latency: latency, Documents: v.Documents,
		CreatedAt: v.CreatedAt, CreatedBy: v.CreatedBy, Run: v.RunID,
	}
}

// ListVersions implements the API.
func (s *Server) ListVersions(ctx context.Context, r ListVersionsRequestObject) (ListVersionsResponseObject, error) {
	list, err := s.store.ListVersions(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	out := ListVersions200JSONResponse{}
	for _, v := range list {
		out = append(out, versionDTO(v))
	}
	return out, nil
}

// GetVersion implements the API.
func (s *Server) GetVersion(ctx context.Context, r GetVersionRequestObject) (GetVersionResponseObject, error) {
	v, err := s.store.Version(ctx, r.Model, r.Version)
	if err != nil {
		return nil, err
	}
	return GetVersion200JSONResponse(versionDTO(v)), nil
}

// ArchiveVersion implements the API.
func (s *Server) ArchiveVersion(ctx context.Context, r ArchiveVersionRequestObject) (ArchiveVersionResponseObject, error) {
	if err := s.store.ArchiveVersion(ctx, r.Model, r.Version, actor(ctx)); err != nil {
		return nil, err
	}
	return ArchiveVersion204Response{}, nil
}

// RegisterVersion implements the API.
func (s *Server) RegisterVersion(ctx context.Context, r RegisterVersionRequestObject) (RegisterVersionResponseObject, error) {
	manifest, err := registry.NewManifest(r.Body.Files)
	if err != nil {
		return nil, err
	}
	for _, f := range manifest.Files {
		if err := s.checkBlob(ctx, f.Path, f.SHA256, f.Size); err != nil {
			return nil, err
		}
	}
	training := value(r.Body.TrainingData)
	if training != "" {
		if err := s.checkBlob(ctx, "training data", training, -1); err != nil {
			return nil, err
		}
	}
	if err := s.pingTemporal(ctx); err != nil {
		return nil, err
	}
	run := registry.Run{ID: newRunID(), Kind: registry.KindRegister, Model: r.Model, Actor: actor(ctx)}
	v, err := s.store.CreateVersion(ctx, registry.Version{
		Model: r.Model, Manifest: manifest, Description: value(r.Body.Description), CreatedBy: actor(ctx),
		Documents: registry.Documents{TrainingData: training},
	}, run)
	if err != nil {
		return nil, err
	}
	run, err = s.store.Run(ctx, run.ID)
	if err != nil {
		return nil, err
	}
	s.start(ctx, run)
	dto := s.runDTO(run)
	dto.Version = v.Number
	return RegisterVersion202JSONResponse{accepted(dto)}, nil
}

// checkBlob ends in Invalid unless a blob is uploaded with the announced size (-1: any).
func (s *Server) checkBlob(ctx context.Context, name, sha string, size int64) error {
	if err := registry.CheckDigest(sha); err != nil {
		return err
	}
	o, err := s.objects.Stat(ctx, registry.BlobKey(sha))
	if registry.CodeOf(err) == registry.NotFound {
		return registry.Errorf(registry.Invalid, "%s: blob %s is not uploaded", name, sha)
	}
	if err == nil && size >= 0 && o.Size != size {
		return registry.Errorf(registry.Invalid, "%s: blob %s has %d bytes, not %d", name, sha, o.Size, size)
	}
	return err
}

// newRunID returns a UUIDv7: unique for ever and in order of time.
func newRunID() string { return uuid.Must(uuid.NewV7()).String() }

// input writes a workflow's input.
func input(v any) json.RawMessage {
	raw, err := json.Marshal(v)
	if err != nil { // plain structs always marshal
		return json.RawMessage(fmt.Sprintf("%q", err.Error()))
	}
	return raw
}

// workflowOf returns the workflow that carries a run out.
func workflowOf(run registry.Run) (name, id, queue string, in any) {
	switch run.Kind {
	case registry.KindRegister:
		return workflows.RegisterVersionName, workflows.RegisterVersionID(run.Model, run.Version), workflows.LifecycleQueue,
			workflows.RegisterVersionInput{RunID: run.ID, Model: run.Model, Version: run.Version}
	case registry.KindRollout:
		return workflows.RolloutName, workflows.RolloutID(run.Model), workflows.LifecycleQueue, run.Input
	case registry.KindBatch:
		return workflows.BatchScoreName, run.WorkflowID, workflows.LifecycleQueue, run.Input
	case registry.KindDrift:
		return workflows.DriftCheckName, run.WorkflowID, workflows.LifecycleQueue, run.Input
	default: // the others are started by workflows and schedules
		return "", "", "", nil
	}
}

// workflowID returns the id of a run's workflow; that of a registration follows from its version.
func workflowID(r registry.Run) string {
	if r.WorkflowID != "" {
		return r.WorkflowID
	}
	_, id, _, _ := workflowOf(r)
	return id
}
