package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// awaitResume returns at once unless the roll-out is paused; then the run says so.
func (r *rollout) awaitResume(ctx workflow.Context, s stage) error {
	if !r.Paused {
		return nil
	}
	shown := false
	if workflow.GetVersion(ctx, "show-pause-before-traffic", workflow.DefaultVersion, 1) != workflow.DefaultVersion {
		var err error
		if shown, err = r.showWaiting(ctx, s); err != nil {
			return err
		}
	}
	if err := r.await(ctx, func() bool { return !r.Paused }, time.Time{}); err != nil || r.stop != "" {
		return err
	}
	if shown { // the change of the traffic says that it goes on
		r.Waiting = false
	}
	return nil
}

// showWaiting lets the run say that it is paused or held, and that it goes on, unless it says so already.
func (r *rollout) showWaiting(ctx workflow.Context, s stage) (shown bool, err error) {
	waits := r.Paused || r.Held != ""
	if waits == r.Waiting || workflow.GetVersion(ctx, "show-waiting", workflow.DefaultVersion, 1) == workflow.DefaultVersion {
		return false, nil
	}
	r.Waiting = waits
	switch {
	case r.Held != "":
		return true, r.note(ctx, registry.RunWaiting, phaseHeld+": "+r.Held)
	case r.Paused:
		return true, r.note(ctx, registry.RunWaiting, s.phase+" (paused)")
	}
	return true, r.note(ctx, registry.RunRunning, s.phase)
}

// await waits until done, or until a time that is not zero, and meanwhile watches what has traffic. It returns with
// r.stop set when the roll-out was decided.
func (r *rollout) await(ctx workflow.Context, done func() bool, until time.Time) error {
	for !done() && r.stop == "" {
		left := until.Sub(workflow.Now(ctx))
		if !until.IsZero() && left <= 0 {
			return nil
		}
		if r.First == 0 {
			decided := func() bool { return done() || r.stop != "" }
			if until.IsZero() {
				return workflow.Await(ctx, decided)
			}
			_, err := workflow.AwaitWithTimeout(ctx, left, decided)
			return err
		}
		if err := r.continueAsNew(ctx); err != nil {
			return err
		}
		slice := int64(0)
		if !until.IsZero() {
			slice = min(int64(left/time.Second)+1, 15*60)
		}
		if _, err := r.look(ctx, true, slice); err != nil {
			return err
		}
	}
	return nil
}

func (r *rollout) awaitApproval(ctx workflow.Context) error {
	if r.in.Plan.Approvals == 0 || len(r.Approvals) >= r.in.Plan.Approvals {
		return nil
	}
	if err := r.note(ctx, registry.RunWaiting, phaseApproval); err != nil {
		return err
	}
	until := time.Time{}
	if r.in.Plan.ApprovalSeconds > 0 {
		until = workflow.Now(ctx).Add(time.Duration(r.in.Plan.ApprovalSeconds) * time.Second)
	}
	approved := func() bool { return len(r.Approvals) >= r.in.Plan.Approvals }
	err := r.await(ctx, approved, until)
	if err == nil && r.stop == "" && !approved() {
		r.conclude(registry.Rejected, fmt.Sprintf("%d of %d approved it within %d seconds", len(r.Approvals), r.in.Plan.Approvals, r.in.Plan.ApprovalSeconds))
	}
	return err
}

// lookAgain is how often a closed gate is looked at, in case that nobody said that the policy changed.
const lookAgain = 5 * time.Minute

// awaitGate waits until the model's policy lets traffic move.
func (r *rollout) awaitGate(ctx workflow.Context, gate activities.Gate) error {
	var traffic *activities.Traffic
	for !gate.Opens.IsZero() && r.stop == "" {
		if err := r.note(ctx, registry.RunWaiting, phaseGate+": "+gate.Why); err != nil {
			return err
		}
		until := workflow.Now(ctx).Add(lookAgain)
		if gate.Opens.Before(until) {
			until = gate.Opens
		}
		r.policy = false
		if err := r.await(ctx, func() bool { return r.policy }, until); err != nil || r.stop != "" {
			return err
		}
		if err := workflow.ExecuteActivity(quick(ctx), traffic.LookAtGate, r.in.Model).Get(ctx, &gate); err != nil {
			return err
		}
	}
	return nil
}
