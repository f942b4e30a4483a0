package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// finish promotes the candidate, or the winner of an experiment. Once the route moves nothing interrupts it.
func (r *rollout) finish(ctx workflow.Context) error {
	version, err := r.promotable(ctx)
	if err != nil || r.stop != "" {
		return err
	}
	arms := registry.StableOnly(version)
	previous := r.stable()
	if r.in.Plan.WatchSeconds > 0 && r.in.Plan.Holdback > 0 && previous != 0 && previous != version {
		arms = []registry.Arm{
			{Version: version, Role: registry.Stable, Weight: registry.FullWeight - r.in.Plan.Holdback},
			{Version: previous, Role: registry.Holdback, Weight: r.in.Plan.Holdback},
		}
	}
	var hold *activities.HoldInput // the way back is warm from the first moment on; the watch takes it over
	if r.in.Plan.WatchSeconds > 0 && previous != 0 && previous != version {
		hold = &activities.HoldInput{
			RunID: r.in.RunID + "-watch", Model: r.in.Model, Version: previous, For: time.Duration(r.in.Plan.WatchSeconds)*time.Second + holdSlack,
		}
	}
	var ready []int
	if previous == 0 { // else it was warm before it got any traffic
		ready = []int{version}
	}
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	var traffic *activities.Traffic
	for r.Touched = true; ; {
		r.enter(ctx, phasePromote)
		var done activities.ShiftResult
		if err := workflow.ExecuteActivity(waiting(last), traffic.ShiftTraffic, activities.ShiftInput{
			RunID: r.in.RunID, Step: "promote", Phase: phasePromote, Progress: 0.95, Model: r.in.Model, Expected: r.Revision,
			Arms: arms, Salt: r.in.RunID, Actor: r.in.Actor, Reason: "promoted: " + r.in.Reason, Ready: ready, Gated: !r.in.Plan.Urgent, Hold: hold,
		}).Get(last, &done); err != nil {
			return err
		}
		if done.Gate.Opens.IsZero() {
			r.Revision, r.Since = done.Revision, done.At
			break
		}
		r.phase = phaseGate // until it opens people decide again
		if err := r.awaitGate(ctx, done.Gate); err != nil || r.stop != "" {
			return err
		}
	}
	r.stop, r.message = registry.Promoted, fmt.Sprintf("version %d is the champion", version)
	return r.startWatch(ctx, version, len(arms) > 1)
}

// promotable returns the version to promote, after the approval that the policy wants before it. It concludes a
// roll-out that is not to promote.
func (r *rollout) promotable(ctx workflow.Context) (int, error) {
	plan, version := r.in.Plan, r.in.Candidate
	if plan.Experiment != nil {
		version = r.Winner
	}
	switch {
	case plan.Experiment != nil && version == r.stable():
		r.conclude(registry.Passed, r.Judgement.Reason)
	case !plan.Promote && !r.Promote:
		r.conclude(registry.Passed, r.Judgement.Reason)
	case plan.ApproveBefore == beforePromotion:
		return version, r.awaitApproval(ctx)
	}
	return version, nil
}

// startWatch starts the watch, which outlives the roll-out: its context is never cancelled, because that would cancel
// the watch too.
func (r *rollout) startWatch(ctx workflow.Context, version int, compared bool) error {
	previous := r.stable()
	if r.in.Plan.WatchSeconds == 0 || previous == 0 || previous == version {
		return nil
	}
	ctx, _ = workflow.NewDisconnectedContext(ctx)
	child := workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{
		WorkflowID: WatchID(r.in.Model, r.Revision), ParentClosePolicy: enums.PARENT_CLOSE_POLICY_ABANDON,
		TypedSearchAttributes: Attributes(registry.KindWatch, r.in.Model, version, r.in.Actor, r.in.RunID+"-watch"),
		StaticSummary:         fmt.Sprintf("watch %s version %d", r.in.Model, version),
	})
	in := WatchInput{
		RunID: r.in.RunID + "-watch", Model: r.in.Model, Version: version, Previous: previous, Revision: r.Revision,
		Since: r.Since, Seconds: r.in.Plan.WatchSeconds, Compared: compared, Judge: r.Start.Judge, Actor: r.in.Actor,
	}
	if err := workflow.ExecuteChildWorkflow(child, WatchName, in).GetChildWorkflowExecution().Get(ctx, nil); err != nil {
		return err
	}
	run := in.run()
	r.watch = &run
	return nil
}
