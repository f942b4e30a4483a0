package api

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// mergeRollout lays a roll-out policy's fields over the present ones. The policy must make a plan by itself.
func mergeRollout(raw *json.RawMessage, into *registry.RolloutPolicy) error {
	if err := merge("rollout", raw, into); err != nil {
		return err
	}
	_, err := workflows.PlanRollout(*into, workflows.RolloutRequest{})
	return err
}

// StartRollout implements the API.
func (s *Server) StartRollout(ctx context.Context, r StartRolloutRequestObject) (StartRolloutResponseObject, error) {
	alive := make(chan error, 1)
	go func() { alive <- s.pingTemporal(ctx) }() // ends by its own deadline, at the same time as what follows
	m, err := s.store.Model(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	request, candidate, err := rolloutRequest(*r.Body)
	if err != nil {
		return nil, err
	}
	plan, err := workflows.PlanRollout(m.Rollout, request)
	if err != nil {
		return nil, err
	}
	in := workflows.RolloutInput{
		RunID: newRunID(), Model: r.Model, Candidate: candidate, Plan: plan, Actor: actor(ctx), Reason: value(r.Body.Reason),
		ContinueAfter: s.config.ContinueAfter,
	}
	if _, err := s.store.Version(ctx, r.Model, in.Candidate); err != nil {
		return nil, err
	}
	run := registry.Run{
		ID: in.RunID, Kind: registry.KindRollout, Model: r.Model, Version: in.Candidate, WorkflowID: workflows.RolloutID(r.Model),
		Lock: workflows.RolloutID(r.Model), Input: input(in), Actor: in.Actor,
	}
	if err := <-alive; err != nil {
		return nil, err
	}
	made, err := s.insertRun(ctx, run)
	if registry.CodeOf(err) == registry.Conflict && value(r.Body.OnConflict) == "supersede" {
		made, err = s.supersede(ctx, run)
	}
	if err != nil {
		return nil, err
	}
	return StartRollout202JSONResponse{accepted(s.runDTO(made))}, nil
}

// supersedeLimit bounds how long a roll-out waits for the one it takes over from; that one only has to put its route
// back.
const supersedeLimit = 20 * time.Second

// supersede ends the roll-out that is under way and starts another one.
func (s *Server) supersede(ctx context.Context, run registry.Run) (registry.Run, error) {
	ctx, cancel := context.WithTimeout(ctx, supersedeLimit)
	defer cancel()
	open, err := s.store.ListRuns(ctx, registry.RunFilter{Kind: registry.KindRollout, Model: run.Model, Open: true})
	if err != nil {
		return run, err
	}
	for _, other := range open {
		_, err := s.temporal.UpdateWorkflow(ctx, client.UpdateWorkflowOptions{
			WorkflowID: other.WorkflowID, UpdateName: workflows.SupersedeUpdate, WaitForStage: client.WorkflowUpdateStageCompleted,
			Args: []any{workflows.Decision{Actor: run.Actor, Reason: "run " + run.ID}},
		})
		var missing *serviceerror.NotFound
		if errors.As(err, &missing) && other.State == registry.RunPending {
			err = s.endUnstarted(ctx, other, registry.Superseded, "superseded by run "+run.ID+" before it began")
		}
		if err != nil && ctx.Err() != nil {
			return run, registry.Errorf(registry.Unavailable, "run %s does not answer, so it cannot be superseded: %w", other.ID, err)
		}
	}
	for {
		made, err := s.insertRun(ctx, run)
		if err == nil || registry.CodeOf(err) != registry.Conflict {
			return made, err
		}
		select {
		case <-ctx.Done():
			return run, registry.Errorf(registry.Conflict, "%w; it did not end within %s", err, supersedeLimit)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// rolloutRequest reads the body; what it leaves out is the model's policy. The candidate of an experiment is its first
// variant.
func rolloutRequest(b NewRollout) (r workflows.RolloutRequest, candidate int, err error) {
	r = workflows.RolloutRequest{
		Strategy: registry.Strategy(value(b.Strategy)), StepPercent: float64(value(b.StepPercent)), SharePercent: float64(value(b.SharePercent)),
		Promote: b.Promote, BakeSeconds: b.BakeSeconds, BakeRequests: b.BakeRequests, MaxBakeSeconds: b.MaxBakeSeconds,
		WatchSeconds: b.WatchSeconds, ApprovalSeconds: b.ApprovalSeconds, RequireApproval: value(b.RequireApproval),
		OnInconclusive: registry.OnInconclusive(value(b.OnInconclusive)), Urgent: value(b.Urgent),
	}
	candidate = value(b.Version)
	if b.Judge != nil {
		r.Judge = *b.Judge
	}
	if b.HoldbackPercent != nil {
		percent := float64(*b.HoldbackPercent)
		r.HoldbackPercent = &percent
	}
	for _, s := range value(b.Steps) {
		r.Steps = append(r.Steps, float64(s))
	}
	if e := b.Experiment; e != nil {
		r.Goal, r.MetricMargin = monitor.Goal(value(e.Goal)), float64(value(e.Margin))
		r.Bandit, r.FloorPercent, r.EverySeconds = value(e.Bandit), float64(value(e.FloorPercent)), value(e.EverySeconds)
		for _, v := range e.Variants {
			r.Variants = append(r.Variants, workflows.VariantRequest{Version: v.Version, Percent: float64(v.Percent)})
		}
	}
	switch {
	case r.Strategy == registry.AB && b.Experiment == nil:
		return r, 0, registry.Errorf(registry.Invalid, "strategy ab needs an experiment with its variants")
	case r.Strategy != registry.AB && b.Experiment != nil:
		return r, 0, registry.Errorf(registry.Invalid, "an experiment needs the strategy ab")
	case r.Strategy == registry.AB && len(r.Variants) > 0:
		if candidate != 0 && candidate != r.Variants[0].Version {
			return r, 0, registry.Errorf(registry.Invalid, "version %d: an experiment names its versions as variants", candidate)
		}
		candidate = r.Variants[0].Version
	case candidate < 1:
		return r, 0, registry.Errorf(registry.Invalid, "name the version to roll out, a number from 1")
	}
	if c := value(b.OnConflict); c != "" && c != "fail" && c != "supersede" {
		return r, 0, registry.Errorf(registry.Invalid, "on_conflict %q: want fail or supersede", c)
	}
	return r, candidate, nil
}

// maxFeedback bounds one request.
const maxFeedback = 10_000

// AddFeedback implements the API.
func (s *Server) AddFeedback(_ context.Context, r AddFeedbackRequestObject) (AddFeedbackResponseObject, error) {
	if len(*r.Body) == 0 || len(*r.Body) > maxFeedback {
		return nil, registry.Errorf(registry.Invalid, "%d values in one request: want 1 to %d", len(*r.Body), maxFeedback)
	}
	values := make(map[string]float64, len(*r.Body))
	for i, f := range *r.Body {
		if f.Key == "" {
			return nil, registry.Errorf(registry.Invalid, "value %d: feedback needs its caller's key", i+1)
		}
		values[f.Key] = f.Value
	}
	counted, err := s.gateway.Feedback(r.Model, values)
	if err != nil {
		return nil, err
	}
	return AddFeedback200JSONResponse{Counted: counted}, nil
}

// decisionNeeds is the role that each action on a roll-out needs.
func decisionNeeds(action string) registry.KeyRole {
	if action == workflows.ApproveUpdate || action == workflows.RejectUpdate {
		return registry.Approver
	}
	return registry.Deployer
}
