package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// WatchName is the registered name.
const WatchName = "Watch"

// WatchID returns the workflow id.
func WatchID(model string, revision int64) string { return fmt.Sprintf("watch/%s/%d", model, revision) }

// WatchInput says which promotion to watch and where the way back leads.
type WatchInput struct {
	RunID    string              `json:"run_id"`
	Model    string              `json:"model"`
	Version  int                 `json:"version"`
	Previous int                 `json:"previous"`
	Revision int64               `json:"revision"`
	Since    time.Time           `json:"since"`
	Seconds  int64               `json:"seconds"`
	Compared bool                `json:"compared"` // the previous version keeps some traffic, to compare with
	Judge    monitor.JudgeConfig `json:"judge"`
	Actor    string              `json:"actor"`
}

// run is the watch as the registry knows it.
func (in WatchInput) run() activities.BeginRunInput {
	return activities.BeginRunInput{RunID: in.RunID, Phase: "watching", Insert: &registry.Run{
		ID: in.RunID, Kind: registry.KindWatch, Model: in.Model, Version: in.Version, WorkflowID: WatchID(in.Model, in.Revision), Actor: in.Actor,
	}}
}

// WatchResult says how a watch came out: "" when nothing was wrong, ROLLED_BACK or SUPERSEDED.
type WatchResult struct {
	Outcome registry.Outcome `json:"outcome"`
	Message string           `json:"message"`
}

// holdSlack keeps the way back open a little longer than the watch lasts.
const holdSlack = 10 * time.Minute

// Watch keeps the previous version warm after a promotion and goes back to it when a guardrail trips. A new roll-out
// supersedes it.
func Watch(ctx workflow.Context, in WatchInput) (WatchResult, error) {
	var runs *activities.Runs
	var traffic *activities.Traffic
	if err := workflow.ExecuteActivity(quick(ctx), runs.BeginRun, in.run()).Get(ctx, nil); err != nil {
		return WatchResult{}, err
	}
	hold := activities.HoldInput{RunID: in.RunID, Model: in.Model, Version: in.Previous, For: time.Duration(in.Seconds)*time.Second + holdSlack}
	if err := workflow.ExecuteActivity(quick(ctx), traffic.HoldVersion, hold).Get(ctx, nil); err != nil {
		return WatchResult{}, err
	}
	out, state, err := watchUntil(ctx, in)
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	hold.For = 0
	if letGo := workflow.ExecuteActivity(quick(last), traffic.HoldVersion, hold).Get(last, nil); err == nil {
		err = letGo
	}
	if err != nil {
		out.Message, state = activities.Reason(err), registry.RunFailed
	}
	end := activities.EndRunInput{RunID: in.RunID, State: state, Outcome: out.Outcome, Message: out.Message}
	return out, workflow.ExecuteActivity(quick(last), runs.EndRun, end).Get(last, nil)
}

func watchUntil(ctx workflow.Context, in WatchInput) (WatchResult, registry.RunState, error) {
	var traffic *activities.Traffic
	bake := activities.BakeInput{
		RunID: in.RunID, Model: in.Model, Versions: []int{in.Version}, FirstRevision: in.Revision, Revision: in.Revision, Began: in.Since,
		Since: in.Since, Seconds: in.Seconds, MaxSeconds: in.Seconds, Judge: in.Judge,
	}
	if in.Compared {
		bake.Reference = in.Previous
	}
	for {
		var result activities.BakeResult
		if err := workflow.ExecuteActivity(baking(ctx), traffic.Bake, bake).Get(ctx, &result); err != nil {
			if temporal.IsCanceledError(err) {
				return WatchResult{Outcome: registry.Aborted, Message: "cancelled in Temporal"}, registry.RunCancelled, nil
			}
			return WatchResult{}, registry.RunFailed, err
		}
		j := result.Judgement
		switch j.Verdict {
		case monitor.Pass, monitor.Inconclusive:
			return endHoldback(ctx, in, j.Reason)
		case activities.Moved:
			return WatchResult{Outcome: registry.Superseded, Message: j.Reason}, registry.RunCancelled, nil
		case monitor.Rollback:
			return watchBack(ctx, in, j.Reason)
		case monitor.Continue:
		}
	}
}

// endHoldback gives the new champion what the previous one kept.
func endHoldback(ctx workflow.Context, in WatchInput, why string) (WatchResult, registry.RunState, error) {
	out := WatchResult{Message: "nothing went wrong: " + why}
	if !in.Compared {
		return out, registry.RunSucceeded, nil
	}
	var traffic *activities.Traffic
	err := workflow.ExecuteActivity(waiting(ctx), traffic.ShiftTraffic, activities.ShiftInput{
		RunID: in.RunID, Step: "end", Phase: "ending the holdback", Progress: 0.95, Model: in.Model, Expected: in.Revision,
		Arms: registry.StableOnly(in.Version), Actor: "watch", Reason: "the watch is over",
	}).Get(ctx, nil)
	if err != nil && activities.CodeOf(err) == registry.Conflict {
		return WatchResult{Outcome: registry.Superseded, Message: activities.Reason(err)}, registry.RunCancelled, nil
	}
	return out, registry.RunSucceeded, err
}

func watchBack(ctx workflow.Context, in WatchInput, why string) (WatchResult, registry.RunState, error) {
	var traffic *activities.Traffic
	err := workflow.ExecuteActivity(waiting(ctx), traffic.RestoreRoute, activities.RestoreInput{
		RunID: in.RunID, Step: "undo", Model: in.Model, Arms: registry.StableOnly(in.Previous), Revision: in.Revision,
		Actor: "watch", Reason: why, Phase: phaseUndo,
	}).Get(ctx, nil)
	if activities.CodeOf(err) == registry.Conflict && err != nil {
		return WatchResult{Outcome: registry.Superseded, Message: activities.Reason(err)}, registry.RunCancelled, nil
	}
	return WatchResult{Outcome: registry.RolledBack, Message: why}, registry.RunFailed, err
}
