package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/temporal"

	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

func accepted(run Run) AcceptedJSONResponse {
	location := "/api/v1/runs/" + run.Id
	return AcceptedJSONResponse{Body: run, Headers: AcceptedResponseHeaders{Location: &location}}
}

func (s *Server) runDTO(r registry.Run) Run {
	out := Run{
		Id: r.ID, Kind: string(r.Kind), Model: r.Model, Version: r.Version, WorkflowId: workflowID(r), Parent: r.Parent, State: string(r.State),
		Outcome: string(r.Outcome), Phase: r.Phase, Message: r.Message, Progress: r.Progress, Actor: r.Actor,
		CreatedAt: r.CreatedAt, StartedAt: optional(r.StartedAt), EndedAt: optional(r.EndedAt),
	}
	if s.config.TemporalUI != "" && out.WorkflowId != "" {
		link := fmt.Sprintf("%s/namespaces/%s/workflows/%s", s.config.TemporalUI, s.config.Namespace, url.PathEscape(out.WorkflowId))
		out.TemporalUrl = &link
	}
	if len(r.Input) > 0 {
		out.Input = &r.Input
	}
	if len(r.Result) > 0 {
		out.Result = &r.Result
	}
	return out
}

// pingTemporal ends in Unavailable when Temporal does not answer, before anything is written.
func (s *Server) pingTemporal(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := s.temporal.CheckHealth(ctx, &client.CheckHealthRequest{}); err != nil {
		return registry.Errorf(registry.Unavailable, "Temporal does not answer; inference and rollback go on without it")
	}
	return nil
}

// insertAndStart inserts a run and starts its workflow. When the start fails after the insert, the reconciler starts
// it later: the run is PENDING until then.
func (s *Server) insertAndStart(ctx context.Context, run registry.Run) (registry.Run, error) {
	if err := s.pingTemporal(ctx); err != nil {
		return run, err
	}
	return s.insertRun(ctx, run)
}

// insertRun is insertAndStart for who has seen that Temporal answers.
func (s *Server) insertRun(ctx context.Context, run registry.Run) (registry.Run, error) {
	made, err := s.store.InsertRun(ctx, run)
	if err != nil {
		return run, err
	}
	s.start(ctx, made)
	return made, nil
}

// refusedFor is how long Temporal may refuse to start a run before it is ended: search attributes that were just made
// are not known everywhere yet.
const refusedFor = 2 * time.Minute

// start starts a run's workflow unless it runs already. One that is not started is left to the reconciler; if Temporal
// refuses it the run says so, and after a while it ends.
func (s *Server) start(ctx context.Context, run registry.Run) {
	name, id, queue, in := workflowOf(run)
	if name == "" {
		return
	}
	starting, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	options := client.StartWorkflowOptions{
		ID: id, TaskQueue: queue, WorkflowIDConflictPolicy: enums.WORKFLOW_ID_CONFLICT_POLICY_FAIL,
		WorkflowExecutionErrorWhenAlreadyStarted: true,
		WorkflowIDReusePolicy:                    enums.WORKFLOW_ID_REUSE_POLICY_ALLOW_DUPLICATE,
		TypedSearchAttributes:                    workflows.Attributes(run.Kind, run.Model, run.Version, run.Actor, run.ID),
		StaticSummary:                            fmt.Sprintf("%s %s version %d", run.Kind, run.Model, run.Version),
		Memo:                                     map[string]any{runMemo: run.ID},
	}
	_, err := s.temporal.ExecuteWorkflow(starting, options, name, in)
	for temporal.IsWorkflowExecutionAlreadyStartedError(err) && !s.runs(starting, id, run.ID) && starting.Err() == nil {
		time.Sleep(startAgain) // the run before it has ended, and its workflow is about to
		_, err = s.temporal.ExecuteWorkflow(starting, options, name, in)
	}
	if err != nil && !temporal.IsWorkflowExecutionAlreadyStartedError(err) {
		s.log.Warn("the workflow of a run is not started yet; the reconciler will", "run", run.ID, "error", err)
	}
	if err := s.noteStart(ctx, run, err); err != nil {
		s.log.Warn("note how the start of a run went", "run", run.ID, "error", err)
	}
}

// runMemo is the field of a workflow's memo that says whose it is.
const runMemo = "run"

// startAgain is how long a start waits for the workflow of the run before.
const startAgain = 5 * time.Millisecond

// runs says whether the workflow with an id is a run's.
func (s *Server) runs(ctx context.Context, workflow, run string) bool {
	d, err := s.temporal.DescribeWorkflowExecution(ctx, workflow, "")
	if err != nil {
		return false
	}
	var whose string
	err = converter.GetDefaultDataConverter().FromPayload(d.GetWorkflowExecutionInfo().GetMemo().GetFields()[runMemo], &whose)
	return err == nil && whose == run
}

// noteStart lets a run say that Temporal refuses it, and no longer when it does not.
func (s *Server) noteStart(ctx context.Context, run registry.Run, err error) error {
	says := ""
	if refused, ok := errors.AsType[*serviceerror.InvalidArgument](err); ok {
		says = "Temporal refuses to start it: " + refused.Error()
	}
	switch {
	case says != "" && time.Since(run.CreatedAt) > refusedFor:
		return s.reap(ctx, run, says)
	case says != run.Message:
		_, err = s.store.UpdateRun(ctx, registry.RunUpdate{ID: run.ID, Message: &says})
		return err
	}
	return nil
}

// ListRuns implements the API.
func (s *Server) ListRuns(ctx context.Context, r ListRunsRequestObject) (ListRunsResponseObject, error) {
	list, err := s.store.ListRuns(ctx, registry.RunFilter{
		Kind: registry.RunKind(value(r.Params.Kind)), Model: value(r.Params.Model), State: registry.RunState(value(r.Params.State)),
		Open: value(r.Params.Open), After: value(r.Params.After), Limit: value(r.Params.Limit),
	})
	if err != nil {
		return nil, err
	}
	out := ListRuns200JSONResponse{}
	for _, run := range list {
		if caller(ctx).Covers(run.Model) {
			out = append(out, s.runDTO(run))
		}
	}
	return out, nil
}

// run reads a run the caller may see.
func (s *Server) run(ctx context.Context, id string) (registry.Run, error) {
	run, err := s.store.Run(ctx, id)
	if err == nil && !caller(ctx).Covers(run.Model) {
		return registry.Run{}, registry.Errorf(registry.NotFound, "no run %q", id)
	}
	return run, err
}

// GetRun implements the API.
func (s *Server) GetRun(ctx context.Context, r GetRunRequestObject) (GetRunResponseObject, error) {
	run, err := s.run(ctx, r.Run)
	if err != nil {
		return nil, err
	}
	return GetRun200JSONResponse(s.runDTO(run)), nil
}

// ListEvidence implements the API.
func (s *Server) ListEvidence(ctx context.Context, r ListEvidenceRequestObject) (ListEvidenceResponseObject, error) {
	if _, err := s.run(ctx, r.Run); err != nil {
		return nil, err
	}
	list, err := s.store.ListEvidence(ctx, r.Run)
	if err != nil {
		return nil, err
	}
	return ListEvidence200JSONResponse(list), nil
}

// DecideRun implements the API.
func (s *Server) DecideRun(ctx context.Context, r DecideRunRequestObject) (DecideRunResponseObject, error) {
	run, err := s.run(ctx, r.Run)
	if err != nil {
		return nil, err
	}
	if err := permit(caller(ctx), decisionNeeds(r.Action), run.Model); err != nil {
		return nil, err
	}
	if run.State.Ended() {
		return nil, registry.Errorf(registry.Precondition, "run %s ended: %s %s", run.ID, run.Outcome, run.Message)
	}
	if !slices.Contains(workflows.RolloutUpdates, r.Action) || r.Action == workflows.SupersedeUpdate || run.Kind != registry.KindRollout {
		return nil, registry.Errorf(registry.Invalid, "a %s takes no %s", run.Kind, r.Action)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	handle, err := s.temporal.UpdateWorkflow(ctx, client.UpdateWorkflowOptions{
		WorkflowID: run.WorkflowID, UpdateName: r.Action, WaitForStage: client.WorkflowUpdateStageCompleted,
		Args: []any{workflows.Decision{Actor: actor(ctx), Reason: value(r.Body.Reason), Seconds: value(r.Body.Seconds)}},
	})
	if err == nil {
		var phase string
		err = handle.Get(ctx, &phase)
	}
	var missing *serviceerror.NotFound
	switch {
	case errors.As(err, &missing) && r.Action == workflows.AbortUpdate && run.State == registry.RunPending:
		message := "aborted by " + actor(ctx) + " before it began"
		if reason := value(r.Body.Reason); reason != "" {
			message += ": " + reason
		}
		if err := s.endUnstarted(ctx, run, registry.Aborted, message); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, updateFault(ctx, err, run)
	}
	if run, err = s.store.Run(ctx, run.ID); err != nil {
		return nil, err
	}
	return DecideRun200JSONResponse(s.runDTO(run)), nil
}

// endUnstarted ends a run whose workflow was never started.
func (s *Server) endUnstarted(ctx context.Context, run registry.Run, outcome registry.Outcome, message string) error {
	_, err := s.store.UpdateRun(ctx, registry.RunUpdate{ID: run.ID, State: registry.RunCancelled, Outcome: outcome, Message: &message})
	return err
}

// updateFault tells a validator's refusal from a Temporal that is away.
func updateFault(ctx context.Context, err error, run registry.Run) error {
	var missing *serviceerror.NotFound
	var refused *temporal.ApplicationError
	switch {
	case errors.As(err, &refused):
		return registry.Errorf(registry.Precondition, "%s", refused.Message())
	case errors.As(err, &missing):
		return registry.Errorf(registry.Precondition, "the workflow of run %s is not running: %w", run.ID, err)
	case ctx.Err() != nil:
		return registry.Errorf(registry.Unavailable, "the run did not answer in time; is an orchestrator running?")
	}
	return registry.Errorf(registry.Unavailable, "Temporal: %w", err)
}

// ListLeases implements the API.
func (s *Server) ListLeases(ctx context.Context, _ ListLeasesRequestObject) (ListLeasesResponseObject, error) {
	now := time.Now()
	out := ListLeases200JSONResponse{}
	for _, kind := range []registry.LeaseKind{registry.GatewayLease, registry.WorkerLease} {
		list, err := s.store.Leases(ctx, kind, time.Time{})
		if err != nil {
			return nil, err
		}
		for _, l := range list {
			out = append(out, Lease{
				Id: l.ID, Kind: string(l.Kind), Node: l.Node, Address: l.Address, Applied: l.Applied, Sealed: optional(l.Sealed),
				Live: l.Expires.After(now), Expires: l.Expires, Worker: l.Worker,
			})
		}
	}
	return out, nil
}

// ListEvents implements the API.
func (s *Server) ListEvents(ctx context.Context, r ListEventsRequestObject) (ListEventsResponseObject, error) {
	after, limit := value(r.Params.After), value(r.Params.Limit)
	if limit <= 0 || limit > 1000 {
		limit = 100
	}
	if wait := min(value(r.Params.Wait), 60); wait > 0 {
		waiting, cancel := context.WithTimeout(ctx, time.Duration(wait)*time.Second)
		defer cancel()
		if err := s.store.Await(waiting, after); err != nil && waiting.Err() == nil {
			return nil, err
		}
	}
	list, err := s.store.Events(ctx, after, limit)
	if err != nil {
		return nil, err
	}
	out := ListEvents200JSONResponse{}
	for _, e := range list {
		if len(e.Data) == 0 {
			e.Data = json.RawMessage("null")
		}
		if e.Model == "" || caller(ctx).Covers(e.Model) {
			out = append(out, e)
		}
	}
	return out, nil
}
