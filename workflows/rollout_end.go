package workflows

import (
	"fmt"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// end undoes what a roll-out that was not promoted did to the route, and writes how it ended.
func (r *rollout) end(ctx workflow.Context, failure error) (RolloutResult, error) {
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	r.explain(failure)
	if r.stop != registry.Promoted && r.Touched {
		r.undo(last)
	}
	out := RolloutResult{Outcome: r.stop, Message: r.message, Revision: r.Revision, Warnings: r.Start.Warnings, Judgement: r.Judgement}
	state := registry.RunFailed
	switch r.stop {
	case registry.Promoted, registry.Passed:
		state = registry.RunSucceeded
	case registry.Aborted, registry.Superseded:
		state = registry.RunCancelled
	default: // FAILED
	}
	workflow.SetCurrentDetails(last, fmt.Sprintf("**%s** version %d: %s. %s", r.in.Model, r.in.Candidate, r.stop, r.message))
	var runs *activities.Runs
	return out, workflow.ExecuteActivity(quick(last), runs.EndRun, activities.EndRunInput{
		RunID: r.in.RunID, State: state, Outcome: r.stop, Message: r.message,
		Result: &activities.RunResult{Revision: r.Revision, Warnings: r.Start.Warnings, Judgement: r.Judgement}, Began: r.watch,
	}).Get(last, nil)
}

// explain finds the outcome of a roll-out that ended by an error.
func (r *rollout) explain(failure error) {
	switch {
	case r.stop == registry.Promoted && failure != nil:
		r.message += ", but nobody watches it: " + activities.Reason(failure)
	case r.stop != "":
	case temporal.IsCanceledError(failure):
		r.stop, r.message = registry.Aborted, "cancelled in Temporal"
	case activities.CodeOf(failure) == registry.Conflict:
		r.stop, r.message = registry.Superseded, activities.Reason(failure)
	case failure != nil:
		r.stop, r.message = registry.RolledBack, activities.Reason(failure)
	}
}

// undo puts back the route captured at the start, if the route is still ours. When the registry cannot be reached for
// half an hour it waits for an operator, who makes it try again with the update "release".
func (r *rollout) undo(ctx workflow.Context) {
	var traffic *activities.Traffic
	for {
		var done activities.ShiftResult
		err := workflow.ExecuteActivity(waiting(ctx), traffic.RestoreRoute, activities.RestoreInput{
			RunID: r.in.RunID, Step: "undo", Model: r.in.Model, Arms: r.Start.Back(),
			Revision: r.Revision, Actor: r.in.Actor, Reason: r.message, Phase: phaseUndo,
		}).Get(ctx, &done)
		switch {
		case err == nil:
			r.Revision = done.Revision
			return
		case activities.CodeOf(err) == registry.Conflict:
			if r.stop != registry.Superseded {
				r.message = activities.Reason(err) + "; before that: " + r.message
			}
			r.stop = registry.Superseded
			return
		}
		r.operator(ctx, activities.Reason(err))
		r.enter(ctx, phaseUndo) // who releases it now says nothing new
	}
}

func (r *rollout) operator(ctx workflow.Context, why string) {
	r.release = false
	r.enter(ctx, phaseOperator)
	var runs *activities.Runs
	note := activities.NoteRunInput{RunID: r.in.RunID, State: registry.RunNeedsOperator, Phase: phaseOperator + ": " + why}
	if err := workflow.ExecuteActivity(quick(ctx), runs.NoteRun, note).Get(ctx, nil); err != nil {
		workflow.GetLogger(ctx).Error("the run cannot be marked", "error", err)
	}
	if err := workflow.Await(ctx, func() bool { return r.release }); err != nil {
		workflow.GetLogger(ctx).Error("wait for an operator", "error", err)
	}
}
