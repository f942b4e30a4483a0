package api

import (
	"context"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// dataPrefix is where uploads lie; results of runs lie below the other prefixes and can be read.
const dataPrefix = "data/"

// readable are the prefixes a viewer may download from: results, not artifacts and not records of traffic.
var readable = []string{dataPrefix, "batch/", "drift/", "runs/"}

// PutObject implements the API.
func (s *Server) PutObject(ctx context.Context, r PutObjectRequestObject) (PutObjectResponseObject, error) {
	if !strings.HasPrefix(r.Params.Key, dataPrefix) {
		return nil, registry.Errorf(registry.Invalid, "key %q: uploads lie below %s", r.Params.Key, dataPrefix)
	}
	if r.Params.ContentLength < 0 {
		return nil, registry.Errorf(registry.Invalid, "an upload announces its Content-Length")
	}
	if err := s.objects.Put(ctx, r.Params.Key, r.Body, r.Params.ContentLength); err != nil {
		return nil, err
	}
	return PutObject204Response{}, nil
}

// GetObject implements the API.
func (s *Server) GetObject(ctx context.Context, r GetObjectRequestObject) (GetObjectResponseObject, error) {
	allowed := false
	for _, prefix := range readable {
		allowed = allowed || strings.HasPrefix(r.Params.Key, prefix)
	}
	if !allowed {
		return nil, registry.Errorf(registry.Denied, "key %q: only %s can be read", r.Params.Key, strings.Join(readable, ", "))
	}
	o, err := s.objects.Stat(ctx, r.Params.Key)
	if err != nil {
		return nil, err
	}
	body, err := s.objects.Get(ctx, r.Params.Key)
	if err != nil {
		return nil, err
	}
	return GetObject200ApplicationoctetStreamResponse{Body: body, ContentLength: o.Size}, nil
}

// maxLabels bounds one request.
const maxLabels = 50_000

// AddLabels implements the API.
func (s *Server) AddLabels(ctx context.Context, r AddLabelsRequestObject) (AddLabelsResponseObject, error) {
	if _, err := s.store.Model(ctx, r.Model); err != nil {
		return nil, err
	}
	if len(*r.Body) == 0 || len(*r.Body) > maxLabels {
		return nil, registry.Errorf(registry.Invalid, "%d labels in one request: want 1 to %d", len(*r.Body), maxLabels)
	}
	labels := make(map[string]float64, len(*r.Body))
	for _, l := range *r.Body {
		if l.Id == "" {
			return nil, registry.Errorf(registry.Invalid, "a label needs the id of an inference")
		}
		labels[l.Id] = l.Label
	}
	if err := s.gateway.StoreLabels(ctx, s.objects, r.Model, labels); err != nil {
		return nil, err
	}
	return AddLabels204Response{}, nil
}

// Bounds of a batch job's partitions.
const (
	defaultPartition = 100_000
	leastPartition   = 100
)

func batchInput(model string, r NewBatch, actor string) (workflows.BatchScoreInput, error) {
	in := workflows.BatchScoreInput{
		Model: model, Version: value(r.Version), Input: r.Input, PerPart: value(r.RowsPerPartition), MaxFail: value(r.MaxFailedShare), Actor: actor,
	}
	if in.PerPart == 0 {
		in.PerPart = defaultPartition
	}
	switch {
	case !strings.HasPrefix(in.Input, dataPrefix) || registry.CheckRelativePath(in.Input) != nil:
		return in, registry.Errorf(registry.Invalid, "input %q: want the key of an uploaded file, below %s", in.Input, dataPrefix)
	case in.PerPart < leastPartition:
		return in, registry.Errorf(registry.Invalid, "rows_per_partition %d: want at least %d", in.PerPart, leastPartition)
	case in.MaxFail < 0 || in.MaxFail > 1:
		return in, registry.Errorf(registry.Invalid, "max_failed_share %v: want 0 to 1", in.MaxFail)
	}
	return in, nil
}

// StartBatch implements the API.
func (s *Server) StartBatch(ctx context.Context, r StartBatchRequestObject) (StartBatchResponseObject, error) {
	in, err := batchInput(r.Model, *r.Body, actor(ctx))
	if err != nil {
		return nil, err
	}
	if _, err := s.store.Model(ctx, r.Model); err != nil {
		return nil, err
	}
	if _, err := s.objects.Stat(ctx, in.Input); err != nil {
		return nil, err
	}
	in.RunID = newRunID()
	run, err := s.insertAndStart(ctx, registry.Run{
		ID: in.RunID, Kind: registry.KindBatch, Model: r.Model, Version: in.Version, WorkflowID: workflows.BatchScoreID(in.RunID), Input: input(in), Actor: in.Actor,
	})
	if err != nil {
		return nil, err
	}
	return StartBatch202JSONResponse{accepted(s.runDTO(run))}, nil
}

const day = 24 * time.Hour

func driftInput(model string, r NewDriftCheck, actor string) (workflows.DriftCheckInput, error) {
	in := workflows.DriftCheckInput{Model: model, Until: value(r.Until), WindowSeconds: value(r.WindowSeconds), Config: monitor.DefaultDrift(), Actor: actor}
	if in.WindowSeconds == 0 {
		in.WindowSeconds = int64(day / time.Second)
	}
	if in.WindowSeconds < 0 {
		return in, registry.Errorf(registry.Invalid, "window_seconds %d: want a positive number", in.WindowSeconds)
	}
	return in, merge("thresholds", r.Thresholds, &in.Config)
}

// StartDriftCheck implements the API.
func (s *Server) StartDriftCheck(ctx context.Context, r StartDriftCheckRequestObject) (StartDriftCheckResponseObject, error) {
	in, err := driftInput(r.Model, *r.Body, actor(ctx))
	if err != nil {
		return nil, err
	}
	if _, err := s.store.Model(ctx, r.Model); err != nil {
		return nil, err
	}
	in.RunID = newRunID()
	run, err := s.insertAndStart(ctx, registry.Run{
		ID: in.RunID, Kind: registry.KindDrift, Model: r.Model, WorkflowID: workflows.DriftCheckID(r.Model, in.RunID), Input: input(in), Actor: in.Actor,
	})
	if err != nil {
		return nil, err
	}
	return StartDriftCheck202JSONResponse{accepted(s.runDTO(run))}, nil
}
