package workflows

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/registry"
)

// Updates of a roll-out: a Decision in, the phase out.
const (
	ApproveUpdate    = "approve"
	RejectUpdate     = "reject"
	AbortUpdate      = "abort"
	PauseUpdate      = "pause"
	ResumeUpdate     = "resume"
	PromoteNowUpdate = "promote_now"
	RetryStepUpdate  = "retry_step" // the present step's time begins anew
	ExtendUpdate     = "extend"     // the present step gets more time
	SupersedeUpdate  = "supersede"  // another roll-out takes over
	ReleaseUpdate    = "release"    // out of NEEDS_OPERATOR
)

// RolloutUpdates lists them.
var RolloutUpdates = []string{
	ApproveUpdate, RejectUpdate, AbortUpdate, PauseUpdate, ResumeUpdate, PromoteNowUpdate, RetryStepUpdate, ExtendUpdate,
	SupersedeUpdate, ReleaseUpdate,
}

// Decision is what a person says to a roll-out.
type Decision struct {
	Actor   string `json:"actor"`
	Reason  string `json:"reason,omitempty"`
	Seconds int64  `json:"seconds,omitempty"` // extend: by how much
}

// Phases that code asks for; the others are text for people.
const (
	phaseApproval = "waiting for approval"
	phaseGate     = "waiting until traffic may move"
	phaseHeld     = "waiting for a decision"
	phasePromote  = "promoting"
	phaseOperator = "needs an operator"
	phaseUndo     = "putting the route back"
)

// beforePromotion is the place of an approval; the other is before the start.
const beforePromotion = "promotion"

// handlers are set before the first block, so that no message is missed.
func (r *rollout) handlers(ctx workflow.Context) error {
	err := workflow.SetQueryHandler(ctx, ProgressQuery, func() (RolloutProgress, error) {
		return RolloutProgress{
			Phase: r.phase, Stage: r.Stage, Paused: r.Paused, Held: r.Held, Approvals: r.Approvals, Revision: r.Revision, Judgement: r.Judgement,
		}, nil
	})
	if err != nil {
		return err
	}
	for _, name := range RolloutUpdates {
		err := workflow.SetUpdateHandlerWithOptions(ctx, name,
			func(ctx workflow.Context, d Decision) (string, error) { return r.decide(ctx, name, d), nil },
			workflow.UpdateHandlerOptions{Validator: func(d Decision) error { return r.validate(name, d) }})
		if err != nil {
			return err
		}
	}
	moved := workflow.GetSignalChannel(ctx, RouteMovedSignal)
	workflow.Go(ctx, func(ctx workflow.Context) {
		var d Decision
		moved.Receive(ctx, &d)
		r.conclude(registry.Superseded, fmt.Sprintf("the route was taken by %s: %s", d.Actor, d.Reason))
	})
	changed := workflow.GetSignalChannel(ctx, PolicyChangedSignal)
	workflow.Go(ctx, func(ctx workflow.Context) {
		for changed.Receive(ctx, nil) {
			r.policy = true
			if r.watching && strings.HasPrefix(r.phase, phaseGate) {
				r.wake()
			}
		}
	})
	return nil
}

// validate refuses what makes no sense now; a refused update leaves no history.
func (r *rollout) validate(name string, d Decision) error {
	switch {
	case d.Actor == "":
		return fmt.Errorf("%s needs an actor", name)
	case name == ReleaseUpdate && r.phase != phaseOperator:
		return fmt.Errorf("nothing to release: the roll-out is in phase %q", r.phase)
	case name == ReleaseUpdate:
		return nil
	case r.stop != "":
		return fmt.Errorf("the roll-out is ending: %s", r.message)
	case r.phase == phasePromote:
		return errors.New("too late: the candidate is being promoted")
	}
	return r.validateNow(name, d)
}

func (r *rollout) validateNow(name string, d Decision) error {
	baking := r.First != 0 && r.Held == "" && !strings.HasPrefix(r.phase, phaseGate) && r.phase != phaseApproval
	switch {
	case (name == ApproveUpdate || name == RejectUpdate) && r.phase != phaseApproval:
		return fmt.Errorf("no approval is asked for: the roll-out is in phase %q", r.phase)
	case name == ApproveUpdate && r.in.Plan.FourEyes && d.Actor == r.in.Actor:
		return fmt.Errorf("four eyes: %s started the roll-out, so somebody else approves it", d.Actor)
	case name == ApproveUpdate && slices.Contains(r.Approvals, d.Actor):
		return fmt.Errorf("%s has approved it already", d.Actor)
	case name == PauseUpdate && r.Paused:
		return errors.New("the roll-out is paused already")
	case name == ResumeUpdate && !r.Paused:
		return errors.New("the roll-out is not paused")
	case name == PromoteNowUpdate && r.in.Plan.Experiment != nil:
		return errors.New("an experiment promotes its winner: abort it, and roll out the version you want")
	case (name == RetryStepUpdate || name == ExtendUpdate) && !baking && r.Held == "":
		return fmt.Errorf("no step is baking: the roll-out is in phase %q", r.phase)
	case name == ExtendUpdate && (d.Seconds < 1 || d.Seconds > forever):
		return fmt.Errorf("extend by %d seconds: want at least 1", d.Seconds)
	}
	return nil
}

func (r *rollout) decide(ctx workflow.Context, name string, d Decision) string {
	switch name {
	case ApproveUpdate:
		r.Approvals = append(r.Approvals, d.Actor)
	case RejectUpdate:
		r.conclude(registry.Rejected, fmt.Sprintf("rejected by %s: %s", d.Actor, d.Reason))
	case AbortUpdate:
		r.conclude(registry.Aborted, fmt.Sprintf("aborted by %s: %s", d.Actor, d.Reason))
	case SupersedeUpdate:
		r.conclude(registry.Superseded, fmt.Sprintf("superseded by %s: %s", d.Actor, d.Reason))
	case PauseUpdate:
		r.Paused = true
	case ResumeUpdate:
		r.Paused = false
	case PromoteNowUpdate:
		r.Promote, r.Paused, r.Held = true, false, ""
	case RetryStepUpdate:
		r.Since, r.Held, r.Extra = workflow.Now(ctx), "", 0
	case ExtendUpdate:
		if r.Held != "" { // its time is up; from now on
			r.Since, r.Extra = workflow.Now(ctx), -r.in.Plan.MaxBakeSeconds
		}
		r.Extra += d.Seconds
		r.Held = ""
	case ReleaseUpdate:
		r.release = true
	}
	if r.watching {
		r.wake()
	}
	return r.phase
}

// conclude decides how the roll-out ends, unless that is decided.
func (r *rollout) conclude(o registry.Outcome, message string) {
	if r.stop == "" && r.phase != phasePromote {
		r.stop, r.message = o, message
		r.wake()
	}
}

func (r *rollout) wake() {
	if r.interrupt != nil {
		r.interrupt()
	}
}
