package workflows

import (
	"errors"
	"fmt"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// RolloutName is the registered name.
const RolloutName = "Rollout"

// RolloutID returns the workflow id. It is the lock: one roll-out per model.
func RolloutID(model string) string { return "rollout/" + model }

// Updates of a roll-out: a Decision in, the phase out.
const (
	ApproveUpdate    = "approve"
	RejectUpdate     = "reject"
	AbortUpdate      = "abort"
	PauseUpdate      = "pause"
	ResumeUpdate     = "resume"
	PromoteNowUpdate = "promote_now"
	ReleaseUpdate    = "release" // out of NEEDS_OPERATOR
)

// RolloutUpdates lists them.
var RolloutUpdates = []string{ApproveUpdate, RejectUpdate, AbortUpdate, PauseUpdate, ResumeUpdate, PromoteNowUpdate, ReleaseUpdate}

// RouteMovedSignal tells a roll-out that somebody took its route.
const RouteMovedSignal = "route_moved"

// ProgressQuery returns a RolloutProgress.
const ProgressQuery = "progress"

// Decision is what a person says to a roll-out.
type Decision struct {
	Actor  string `json:"actor"`
	Reason string `json:"reason,omitempty"`
}

// RolloutInput says what to roll out and how. It is also the strategy: all_at_once has no steps, canary one.
type RolloutInput struct {
	RunID           string              `json:"run_id"`
	Model           string              `json:"model"`
	Candidate       int                 `json:"candidate"`
	Steps           []int               `json:"steps"`            // the candidate's weight in basis points, ascending, below 10000
	BakeSeconds     int64               `json:"bake_seconds"`     // least time of a step
	BakeRequests    int64               `json:"bake_requests"`    // least requests of the candidate in a step
	MaxBakeSeconds  int64               `json:"max_bake_seconds"` // then a step is inconclusive; 0 = never
	WatchSeconds    int64               `json:"watch_seconds"`    // after the promotion
	RequireApproval bool                `json:"require_approval"`
	ApprovalSeconds int64               `json:"approval_seconds"` // then it is rejected; 0 = waits for ever
	Judge           monitor.JudgeConfig `json:"judge"`
	Actor           string              `json:"actor"`
	Reason          string              `json:"reason"`
}

// RolloutProgress is the answer to ProgressQuery.
type RolloutProgress struct {
	Phase     string             `json:"phase"`
	Step      int                `json:"step"`
	Paused    bool               `json:"paused"`
	Revision  int64              `json:"revision"`
	Judgement *monitor.Judgement `json:"judgement,omitempty"`
}

// RolloutResult says how a roll-out came out.
type RolloutResult struct {
	Outcome   registry.Outcome   `json:"outcome"`
	Message   string             `json:"message"`
	Revision  int64              `json:"revision"`
	Warnings  []string           `json:"warnings,omitempty"`
	Judgement *monitor.Judgement `json:"judgement,omitempty"`
}

// rollout is the state of one roll-out.
type rollout struct {
	in        RolloutInput
	start     activities.PreflightResult
	phase     string
	step      int
	revision  int64     // our last
	first     int64     // revision of the first step: evidence counts from here
	since     time.Time // when the present step began
	judgement *monitor.Judgement
	approved  bool
	paused    bool
	promote   bool // now, without waiting for the bakes
	release   bool
	stop      registry.Outcome // set when a person or the judge ended it
	message   string
	interrupt workflow.CancelFunc // stops what runs
	baking    bool                // what runs is a bake, which a pause may stop; a shift of traffic is only stopped by the end
}

// Rollout moves a model's traffic from its stable version to a candidate, or back.
func Rollout(ctx workflow.Context, in RolloutInput) (RolloutResult, error) {
	r := &rollout{in: in, phase: "preflight"}
	if err := r.handlers(ctx); err != nil {
		return RolloutResult{}, err
	}
	err := r.run(ctx)
	out, err := r.end(ctx, err)
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	if waitErr := workflow.Await(last, func() bool { return workflow.AllHandlersFinished(last) }); err == nil {
		err = waitErr
	}
	return out, err
}

// handlers are set before the first block, so that no message is missed.
func (r *rollout) handlers(ctx workflow.Context) error {
	err := workflow.SetQueryHandler(ctx, ProgressQuery, func() (RolloutProgress, error) {
		return RolloutProgress{Phase: r.phase, Step: r.step, Paused: r.paused, Revision: r.revision, Judgement: r.judgement}, nil
	})
	if err != nil {
		return err
	}
	for _, name := range RolloutUpdates {
		err := workflow.SetUpdateHandlerWithOptions(ctx, name,
			func(_ workflow.Context, d Decision) (string, error) { return r.decide(name, d), nil },
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
	return nil
}

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
	case (name == ApproveUpdate || name == RejectUpdate) && r.phase != phaseApproval:
		return fmt.Errorf("no approval is asked for: the roll-out is in phase %q", r.phase)
	case name == PauseUpdate && r.paused:
		return errors.New("the roll-out is paused already")
	case name == ResumeUpdate && !r.paused:
		return errors.New("the roll-out is not paused")
	}
	return nil
}

// Phases that code asks for; the others are text for people.
const (
	phaseApproval = "waiting for approval"
	phasePromote  = "promoting"
	phaseOperator = "needs an operator"
)

func (r *rollout) decide(name string, d Decision) string {
	switch name {
	case ApproveUpdate:
		r.approved = true
	case RejectUpdate:
		r.conclude(registry.Rejected, fmt.Sprintf("rejected by %s: %s", d.Actor, d.Reason))
	case AbortUpdate:
		r.conclude(registry.Aborted, fmt.Sprintf("aborted by %s: %s", d.Actor, d.Reason))
	case PauseUpdate:
		r.paused = true
		r.wakeBake()
	case ResumeUpdate:
		r.paused = false
	case PromoteNowUpdate:
		r.promote, r.paused = true, false
		r.wakeBake()
	case ReleaseUpdate:
		r.release = true
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

func (r *rollout) wakeBake() {
	if r.baking {
		r.wake()
	}
}

func (r *rollout) wake() {
	if r.interrupt != nil {
		r.interrupt()
	}
}

func (r *rollout) run(ctx workflow.Context) error {
	var traffic *activities.Traffic
	first := registry.FullWeight
	if len(r.in.Steps) > 0 {
		first = r.in.Steps[0]
	}
	err := workflow.ExecuteActivity(quick(ctx), traffic.Preflight, activities.PreflightInput{
		RunID: r.in.RunID, Model: r.in.Model, Candidate: r.in.Candidate, Judge: r.in.Judge,
		Requests: r.in.BakeRequests * int64(len(r.in.Steps)), FirstStep: first,
	}).Get(ctx, &r.start)
	if err != nil {
		r.conclude(registry.Rejected, activities.Reason(err))
		return err
	}
	r.revision = r.start.Route.Revision
	if r.in.RequireApproval {
		if err := r.awaitApproval(ctx); err != nil || r.stop != "" {
			return err
		}
	}
	if stable := r.start.Route.StableVersion(); stable != 0 && stable != r.in.Candidate {
		if err := r.steps(ctx); err != nil || r.stop != "" {
			return err
		}
	}
	return r.finish(ctx)
}

func (r *rollout) awaitApproval(ctx workflow.Context) error {
	r.enter(ctx, phaseApproval)
	var runs *activities.Runs
	note := activities.NoteRunInput{RunID: r.in.RunID, State: registry.RunWaiting, Phase: phaseApproval}
	if err := workflow.ExecuteActivity(quick(ctx), runs.NoteRun, note).Get(ctx, nil); err != nil {
		return err
	}
	decided := func() bool { return r.approved || r.stop != "" }
	if r.in.ApprovalSeconds == 0 {
		return workflow.Await(ctx, decided)
	}
	ok, err := workflow.AwaitWithTimeout(ctx, time.Duration(r.in.ApprovalSeconds)*time.Second, decided)
	if err == nil && !ok {
		r.conclude(registry.Rejected, fmt.Sprintf("nobody approved it within %d seconds", r.in.ApprovalSeconds))
	}
	return err
}

// steps warms the candidate with no traffic, then raises its weight step by step.
func (r *rollout) steps(ctx workflow.Context) error {
	if err := r.shift(ctx, "warm", "warming the candidate", 0); err != nil {
		return err
	}
	for i, weight := range r.in.Steps {
		r.step = i + 1
		if r.promote || r.stop != "" {
			return nil
		}
		phase := fmt.Sprintf("step %d of %d: %.4g %%", r.step, len(r.in.Steps), float64(weight)/100)
		if err := r.shift(ctx, fmt.Sprintf("step-%d", r.step), phase, weight); err != nil {
			return err
		}
		if r.first == 0 {
			r.first = r.revision
		}
		if err := r.bake(ctx); err != nil || r.stop != "" {
			return err
		}
	}
	return nil
}

// shift gives the candidate a weight; weight 0 waits until it is warm.
func (r *rollout) shift(ctx workflow.Context, step, phase string, weight int) error {
	if err := workflow.Await(ctx, func() bool { return !r.paused || r.stop != "" }); err != nil || r.stop != "" {
		return err
	}
	r.enter(ctx, phase)
	in := activities.ShiftInput{
		RunID: r.in.RunID, Step: step, Phase: phase, Progress: float64(r.step) / float64(len(r.in.Steps)+1), Model: r.in.Model,
		Expected: r.revision, Owned: true, Salt: r.in.RunID, Actor: r.in.Actor, Reason: phase,
		Arms: []registry.Arm{
			{Version: r.start.Route.StableVersion(), Role: registry.Stable, Weight: registry.FullWeight - weight},
			{Version: r.in.Candidate, Role: registry.Candidate, Weight: weight},
		},
	}
	if weight == 0 {
		in.Ready = r.in.Candidate
	}
	return r.apply(ctx, in)
}

func (r *rollout) apply(ctx workflow.Context, in activities.ShiftInput) error {
	var traffic *activities.Traffic
	var done activities.ShiftResult
	err := r.interruptible(ctx, func(ctx workflow.Context) error {
		return workflow.ExecuteActivity(waiting(ctx), traffic.ShiftTraffic, in).Get(ctx, &done)
	})
	if err == nil && done.Revision > 0 {
		r.revision, r.since = done.Revision, done.At
	}
	return err
}

// interruptible runs f under a context that a decision cancels; a cancellation by a decision is no error. After a pause
// f begins again.
func (r *rollout) interruptible(ctx workflow.Context, f func(workflow.Context) error) error {
	for {
		inner, cancel := workflow.WithCancel(ctx)
		r.interrupt = cancel
		err := f(inner)
		r.interrupt = nil
		if err == nil || ctx.Err() != nil || inner.Err() == nil {
			return err
		}
		if r.stop != "" {
			return nil
		}
		if err := workflow.Await(ctx, func() bool { return !r.paused || r.stop != "" }); err != nil || r.stop != "" {
			return err
		}
		if r.promote {
			return nil
		}
	}
}

// bake watches the present step until it passes or the roll-out is decided.
func (r *rollout) bake(ctx workflow.Context) error {
	var traffic *activities.Traffic
	in := activities.BakeInput{
		RunID: r.in.RunID, Model: r.in.Model, Candidate: r.in.Candidate, FirstRevision: r.first, Revision: r.revision,
		Since: r.since, Seconds: r.in.BakeSeconds, Requests: r.in.BakeRequests, MaxSeconds: r.in.MaxBakeSeconds,
		Last: r.step == len(r.in.Steps), Judge: r.start.Judge,
	}
	for {
		// What was said while traffic was shifted holds now.
		if err := workflow.Await(ctx, func() bool { return !r.paused || r.promote || r.stop != "" }); err != nil || r.promote || r.stop != "" {
			return err
		}
		var result activities.BakeResult
		r.baking = true
		err := r.interruptible(ctx, func(ctx workflow.Context) error {
			return workflow.ExecuteActivity(baking(ctx), traffic.Bake, in).Get(ctx, &result)
		})
		r.baking = false
		if err != nil || r.promote || r.stop != "" {
			return err
		}
		j := result.Judgement
		r.judgement = &j
		switch j.Verdict {
		case monitor.Pass:
			return nil
		case monitor.Rollback:
			r.conclude(registry.RolledBack, j.Reason)
			return nil
		case monitor.Inconclusive:
			r.conclude(registry.Inconclusive, j.Reason)
			return nil
		case activities.Moved:
			r.conclude(registry.Superseded, j.Reason)
			return nil
		case monitor.Continue:
		}
	}
}

// baking is for bakes: each activity lasts a few minutes, and is tried again for as long as it takes.
func baking(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		StartToCloseTimeout: 10 * time.Minute, HeartbeatTimeout: 10 * time.Second, RetryPolicy: &patient,
	})
}

// finish promotes the candidate. From here on nothing interrupts it.
func (r *rollout) finish(ctx workflow.Context) error {
	if r.stop != "" {
		return nil
	}
	r.enter(ctx, phasePromote)
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	var traffic *activities.Traffic
	var done activities.ShiftResult
	err := workflow.ExecuteActivity(waiting(last), traffic.ShiftTraffic, activities.ShiftInput{
		RunID: r.in.RunID, Step: "promote", Phase: phasePromote, Progress: 0.95, Model: r.in.Model, Expected: r.revision,
		Arms: registry.StableOnly(r.in.Candidate), Actor: r.in.Actor, Reason: "promoted: " + r.in.Reason, Ready: r.in.Candidate,
	}).Get(last, &done)
	if err != nil {
		return err
	}
	r.revision, r.since = done.Revision, done.At
	r.stop, r.message = registry.Promoted, fmt.Sprintf("version %d is the champion", r.in.Candidate)
	return r.startWatch(ctx)
}

// startWatch starts the watch, which outlives the roll-out: its context is never cancelled, because that would cancel
// the watch too.
func (r *rollout) startWatch(ctx workflow.Context) error {
	previous := r.start.Route.StableVersion()
	if r.in.WatchSeconds == 0 || previous == 0 || previous == r.in.Candidate {
		return nil
	}
	ctx, _ = workflow.NewDisconnectedContext(ctx)
	child := workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{
		WorkflowID: WatchID(r.in.Model, r.revision), ParentClosePolicy: enums.PARENT_CLOSE_POLICY_ABANDON,
		TypedSearchAttributes: Attributes(registry.KindWatch, r.in.Model, r.in.Candidate, r.in.Actor, r.in.RunID+"-watch"),
	})
	in := WatchInput{
		RunID: r.in.RunID + "-watch", Model: r.in.Model, Version: r.in.Candidate, Previous: previous, Revision: r.revision,
		Since: r.since, Seconds: r.in.WatchSeconds, Judge: r.start.Judge, Actor: r.in.Actor,
	}
	return workflow.ExecuteChildWorkflow(child, WatchName, in).GetChildWorkflowExecution().Get(ctx, nil)
}

// enter says what the roll-out does now.
func (r *rollout) enter(ctx workflow.Context, phase string) {
	r.phase = phase
	workflow.SetCurrentDetails(ctx, fmt.Sprintf("**%s** version %d: %s", r.in.Model, r.in.Candidate, phase))
}
