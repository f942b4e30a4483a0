package workflows

import (
	"fmt"
	"slices"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// RolloutName is the registered name.
const RolloutName = "Rollout"

// RolloutID returns the workflow id. It is the lock: one roll-out per model.
func RolloutID(model string) string { return "rollout/" + model }

// RouteMovedSignal tells a roll-out that somebody took its route.
const RouteMovedSignal = "route_moved"

// PolicyChangedSignal tells a roll-out that the model's policy changed.
const PolicyChangedSignal = "policy_changed"

// ProgressQuery returns a RolloutProgress.
const ProgressQuery = "progress"

// RolloutPlan is a strategy as data.
type RolloutPlan = activities.RolloutPlan

// RolloutRequest is what somebody asks for; what it leaves out is the model's policy.
type RolloutRequest = activities.RolloutRequest

// VariantRequest is an arm of an A/B test.
type VariantRequest = activities.VariantRequest

// PlanRollout resolves a request under a model's policy. It ends in Invalid.
func PlanRollout(p registry.RolloutPolicy, r RolloutRequest) (RolloutPlan, error) {
	return activities.PlanRollout(p, r)
}

// ContinueAfter is the length of history, in events, at which a roll-out continues as new.
const ContinueAfter = 2000

// RolloutInput says what to roll out and how.
type RolloutInput struct {
	RunID         string        `json:"run_id"`
	Model         string        `json:"model"`
	Candidate     int           `json:"candidate"` // of an experiment: its first variant
	Plan          RolloutPlan   `json:"plan"`
	Actor         string        `json:"actor"`
	Reason        string        `json:"reason"`
	ContinueAfter int           `json:"continue_after"` // events of history; 0 = never
	Resume        *RolloutState `json:"resume,omitempty"`
}

// RolloutState is what a roll-out takes along when it continues as new.
type RolloutState struct {
	Start     activities.PreflightResult `json:"start"`
	Stage     int                        `json:"stage"`    // index of the stage under way
	Set       bool                       `json:"set"`      // the present stage has its traffic
	Touched   bool                       `json:"touched"`  // the route may be ours
	Revision  int64                      `json:"revision"` // our last
	First     int64                      `json:"first"`    // revision of the first traffic: evidence counts from here
	Since     time.Time                  `json:"since"`    // when the present stage's time began
	Extra     int64                      `json:"extra"`    // seconds added to the stage's time
	Extended  bool                       `json:"extended"` // by the policy, which does so once
	Seq       int                        `json:"seq"`      // of allocations
	Arms      []registry.Arm             `json:"arms"`     // at our last revision
	Approvals []string                   `json:"approvals"`
	Paused    bool                       `json:"paused"`
	Held      string                     `json:"held"`    // why it waits for a person
	Waiting   bool                       `json:"waiting"` // the run says that it is paused or held
	Promote   bool                       `json:"promote"`
	Winner    int                        `json:"winner"`
	Judgement *monitor.Judgement         `json:"judgement,omitempty"`
}

// RolloutProgress is the answer to ProgressQuery.
type RolloutProgress struct {
	Phase     string             `json:"phase"`
	Stage     int                `json:"stage"`
	Paused    bool               `json:"paused"`
	Held      string             `json:"held,omitempty"`
	Approvals []string           `json:"approvals,omitempty"`
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
	RolloutState

	in        RolloutInput
	resumed   bool // by continue-as-new
	phase     string
	release   bool
	policy    bool             // it changed
	stop      registry.Outcome // set when a person or the judge ended it
	message   string
	watch     *activities.BeginRunInput // the watch that was started
	interrupt workflow.CancelFunc       // stops what runs
	watching  bool                      // what runs looks at traffic, which any decision may stop; a shift is only stopped by the end
}

// stage is one state of the route.
type stage struct {
	step  string // the change id is {run id}/{step}
	phase string
	arms  []registry.Arm
	ready []int // versions that must be warm before it ends
	bake  bool
}

// warms says that a stage only warms: it is never left out.
func (s stage) warms() bool { return len(s.ready) > 0 }

// Rollout moves a model's traffic from its stable version to a candidate, or back.
func Rollout(ctx workflow.Context, in RolloutInput) (RolloutResult, error) {
	r := &rollout{in: in, phase: "preflight"}
	if in.Resume != nil {
		r.RolloutState, r.resumed, r.in.Resume = *in.Resume, true, nil
	}
	if err := r.handlers(ctx); err != nil {
		return RolloutResult{}, err
	}
	err := r.run(ctx)
	if workflow.IsContinueAsNewError(err) {
		return RolloutResult{}, err
	}
	out, err := r.end(ctx, err)
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	if waitErr := workflow.Await(last, func() bool { return workflow.AllHandlersFinished(last) }); err == nil {
		err = waitErr
	}
	return out, err
}

func (r *rollout) run(ctx workflow.Context) error {
	if !r.resumed {
		if err := r.begin(ctx); err != nil || r.stop != "" {
			return err
		}
	}
	stages := r.stages()
	for r.Stage < len(stages) && r.stop == "" && (!r.Promote || stages[r.Stage].warms()) { // nobody is promoted cold
		if err := r.stageOnce(ctx, stages[r.Stage]); err != nil || r.stop != "" {
			return err
		}
		r.Stage++
		r.Set, r.Extra, r.Extended, r.Held = false, 0, false, ""
	}
	if r.stop != "" {
		return nil
	}
	return r.finish(ctx)
}

// warmFresh is how long a version that was loaded at preflight is taken to be so: workers keep what nobody refers to for
// longer than that.
const warmFresh = 5 * time.Second

// begin is all that happens before traffic moves.
func (r *rollout) begin(ctx workflow.Context) error {
	var traffic *activities.Traffic
	err := workflow.ExecuteActivity(quick(ctx), traffic.Preflight, activities.PreflightInput{
		RunID: r.in.RunID, Model: r.in.Model, Candidate: r.in.Candidate, Plan: r.in.Plan,
	}).Get(ctx, &r.Start)
	if err != nil {
		r.conclude(registry.Rejected, activities.Reason(err))
		return err
	}
	r.Revision = r.Start.Route.Revision
	began := workflow.Now(ctx)
	defer func() { r.Start.Warm = r.Start.Warm && workflow.Now(ctx).Sub(began) < warmFresh }()
	if r.in.Plan.ApproveBefore != beforePromotion {
		if err := r.awaitApproval(ctx); err != nil || r.stop != "" {
			return err
		}
	}
	return r.awaitGate(ctx, r.Start.Gate)
}

// stable returns the version that had the traffic when the roll-out began.
func (r *rollout) stable() int { return r.Start.Route.StableVersion() }

// stages are what the strategy's data say. Whoever gets traffic is warmed with none first, unless it is warm.
func (r *rollout) stages() []stage {
	all := r.allStages()
	if len(all) > 0 && r.Start.Warm {
		all = all[1:]
	}
	return all
}

func (r *rollout) allStages() []stage {
	stable, plan := r.stable(), r.in.Plan
	if stable == 0 || stable == r.in.Candidate && plan.Experiment == nil {
		return nil
	}
	with := func(arms ...registry.Arm) []registry.Arm {
		rest := registry.FullWeight
		for _, a := range arms {
			if a.Role != registry.Shadow {
				rest -= a.Weight
			}
		}
		return append([]registry.Arm{{Version: stable, Role: registry.Stable, Weight: rest}}, arms...)
	}
	candidate := registry.Arm{Version: r.in.Candidate, Role: registry.Candidate}
	warm := stage{step: "warm", phase: "warming the candidate", arms: with(candidate), ready: []int{r.in.Candidate}}
	switch {
	case plan.Experiment != nil:
		warm.ready, warm.phase = nil, "warming the variants"
		cold := slices.Clone(plan.Variants)
		for i := range cold {
			warm.ready = append(warm.ready, cold[i].Version)
			cold[i].Weight = 0
		}
		warm.arms = with(cold...)
		return []stage{warm, {step: "experiment", phase: "experiment", arms: with(plan.Variants...), bake: true}}
	case plan.Shadow > 0:
		candidate.Role = registry.Shadow
		warm.arms = with(candidate)
		candidate.Weight = plan.Shadow
		return []stage{warm, {step: "shadow", phase: fmt.Sprintf("mirroring %.4g %%", float64(plan.Shadow)/100), arms: with(candidate), bake: true}}
	}
	out := []stage{warm}
	for i, weight := range plan.Steps {
		candidate.Weight = weight
		out = append(out, stage{
			step: fmt.Sprintf("step-%d", i+1), phase: fmt.Sprintf("step %d of %d: %.4g %%", i+1, len(plan.Steps), float64(weight)/100),
			arms: with(candidate), bake: true,
		})
	}
	return out
}

// stageOnce sets a stage's traffic and bakes it.
func (r *rollout) stageOnce(ctx workflow.Context, s stage) error {
	if !r.Set {
		if err := r.awaitResume(ctx, s); err != nil || r.stop != "" {
			return err
		}
		r.enter(ctx, s.phase)
		if err := r.shift(ctx, s.step, s.arms, s.ready); err != nil || r.stop != "" {
			return err
		}
		r.Set = true
	}
	r.enter(ctx, s.phase)
	if !s.bake || r.Promote {
		return nil
	}
	if r.First == 0 {
		r.First = r.Revision
	}
	return r.bake(ctx, s)
}

// shift sets the route; it is the run's as long as it has arms beside the stable one.
func (r *rollout) shift(ctx workflow.Context, step string, arms []registry.Arm, ready []int) error {
	var traffic *activities.Traffic
	var done activities.ShiftResult
	in := activities.ShiftInput{
		RunID: r.in.RunID, Step: step, Phase: r.phase, Progress: r.progress(), Model: r.in.Model,
		Expected: r.Revision, Owned: true, Salt: r.in.RunID, Actor: r.in.Actor, Reason: r.phase, Arms: arms, Ready: ready,
	}
	r.Touched = true
	err := r.interruptible(ctx, func(ctx workflow.Context) error {
		return workflow.ExecuteActivity(waiting(ctx), traffic.ShiftTraffic, in).Get(ctx, &done)
	})
	if err == nil && done.Revision > 0 {
		r.Revision, r.Since, r.Arms = done.Revision, done.At, arms
	}
	return err
}

// progress is a number for people: how many of the stages are done.
func (r *rollout) progress() float64 { return float64(r.Stage) / float64(len(r.in.Plan.Steps)+2) }

// interruptible runs f under a context that a decision may cancel; that is no error.
func (r *rollout) interruptible(ctx workflow.Context, f func(workflow.Context) error) error {
	inner, cancel := workflow.WithCancel(ctx)
	r.interrupt = cancel
	err := f(inner)
	r.interrupt = nil
	if err != nil && ctx.Err() == nil && inner.Err() != nil && temporal.IsCanceledError(err) {
		return nil
	}
	return err
}

// bake watches the present stage until it passes or the roll-out is decided. A paused or held roll-out is watched too:
// what is certainly worse goes back although nobody is there.
func (r *rollout) bake(ctx workflow.Context, s stage) error {
	for r.stop == "" && !r.Promote {
		if err := r.continueAsNew(ctx); err != nil {
			return err
		}
		if shown, err := r.showWaiting(ctx, s); err != nil {
			return err
		} else if shown { // people may have decided meanwhile
			continue
		}
		j, err := r.look(ctx, r.Paused || r.Held != "", 0)
		if err != nil {
			return err
		}
		switch {
		case j == nil: // woken by a decision: what holds now decides
		case j.Verdict == monitor.Pass:
			r.Winner = j.Winner
			return nil
		case j.Verdict == monitor.Inconclusive:
			r.inconclusive(*j)
		case r.in.Plan.Experiment != nil && r.in.Plan.Experiment.Bandit && !r.Paused && r.Held == "":
			if err := r.allocate(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// forever is longer than any roll-out.
const forever = 10 * 365 * 24 * 3600

// look lets an activity judge the present traffic, and ends the roll-out when it must. It returns nil when a decision
// woke it. While it only waits nothing passes and no time runs out.
func (r *rollout) look(ctx workflow.Context, waits bool, slice int64) (*monitor.Judgement, error) {
	plan := r.in.Plan
	in := activities.BakeInput{
		RunID: r.in.RunID, Model: r.in.Model, Versions: []int{r.in.Candidate}, Reference: r.stable(), FirstRevision: r.First,
		Revision: r.Revision, Began: r.Start.Began, Since: r.Since, Seconds: plan.BakeSeconds, Requests: plan.BakeRequests,
		Last: r.Stage >= len(r.stages())-1, Experiment: plan.Experiment, Judge: r.Start.Judge, Slice: slice,
	}
	if plan.MaxBakeSeconds > 0 {
		in.MaxSeconds = plan.MaxBakeSeconds + r.Extra
	}
	if plan.Experiment != nil {
		in.Versions = nil
		for _, v := range plan.Variants {
			in.Versions = append(in.Versions, v.Version)
		}
		if plan.Experiment.Bandit && slice == 0 {
			in.Slice = plan.Experiment.EverySeconds
		}
	}
	if waits {
		in.Seconds, in.MaxSeconds = forever, 0
	}
	var traffic *activities.Traffic
	var result *activities.BakeResult
	r.watching = true
	err := r.interruptible(ctx, func(ctx workflow.Context) error {
		return workflow.ExecuteActivity(baking(ctx), traffic.Bake, in).Get(ctx, &result)
	})
	r.watching = false
	if err != nil || result == nil || r.stop != "" {
		return nil, err
	}
	j := result.Judgement
	r.Judgement = &j
	switch j.Verdict {
	case monitor.Rollback:
		r.conclude(registry.RolledBack, j.Reason)
	case activities.Moved:
		r.conclude(registry.Superseded, j.Reason)
	case monitor.Continue, monitor.Pass, monitor.Inconclusive:
		r.enter(ctx, r.phase)
	}
	return &j, nil
}

// inconclusive does what the policy says when the time is up.
func (r *rollout) inconclusive(j monitor.Judgement) {
	switch {
	case r.in.Plan.OnInconclusive == registry.HoldThen:
		r.Held = j.Reason
	case r.in.Plan.OnInconclusive == registry.ExtendThen && !r.Extended:
		r.Extended = true
		r.Extra += r.in.Plan.MaxBakeSeconds
	default:
		r.conclude(registry.Inconclusive, j.Reason)
	}
}

// allocate gives the arms of a bandit new weights.
func (r *rollout) allocate(ctx workflow.Context) error {
	r.Seq++
	in := activities.AllocateInput{RunID: r.in.RunID, Seq: r.Seq, Stable: r.stable(), Experiment: *r.in.Plan.Experiment}
	for _, v := range r.in.Plan.Variants {
		in.Versions = append(in.Versions, v.Version)
	}
	var traffic *activities.Traffic
	var arms []registry.Arm
	if err := workflow.ExecuteActivity(quick(ctx), traffic.Allocate, in).Get(ctx, &arms); err != nil {
		return err
	}
	if slices.Equal(arms, r.Arms) {
		return nil
	}
	since := r.Since // the experiment's time goes on
	err := r.shift(ctx, fmt.Sprintf("allocate-%d", r.Seq), arms, nil)
	r.Since = since
	return err
}

// continueAsNew ends this execution in the next one when its history is long.
func (r *rollout) continueAsNew(ctx workflow.Context) error {
	info := workflow.GetInfo(ctx)
	if r.in.ContinueAfter == 0 || info.GetCurrentHistoryLength() < r.in.ContinueAfter && !info.GetContinueAsNewSuggested() {
		return nil
	}
	if err := workflow.Await(ctx, func() bool { return workflow.AllHandlersFinished(ctx) }); err != nil {
		return err
	}
	next := r.in
	state := r.RolloutState
	next.Resume = &state
	return workflow.NewContinueAsNewError(ctx, RolloutName, next)
}

// note marks the run and enters a phase.
func (r *rollout) note(ctx workflow.Context, state registry.RunState, phase string) error {
	r.enter(ctx, phase)
	var runs *activities.Runs
	note := activities.NoteRunInput{RunID: r.in.RunID, State: state, Phase: phase, Progress: r.progress()}
	return workflow.ExecuteActivity(quick(ctx), runs.NoteRun, note).Get(ctx, nil)
}

// enter says what the roll-out does now, in the Temporal UI too.
func (r *rollout) enter(ctx workflow.Context, phase string) {
	r.phase = phase
	text := fmt.Sprintf("**%s** version %d, %s: %s", r.in.Model, r.in.Candidate, r.in.Plan.Strategy, phase)
	if j := r.Judgement; j != nil {
		text += fmt.Sprintf("\n\n%s: %s\n\n| | stable | candidate |\n|---|---|---|\n| requests | %d | %d |\n| errors | %d | %d |\n| p99 ms | %.1f | %.1f |\n\ne-value of errors %.3g of %.3g",
			j.Verdict, j.Reason, j.Stable.Requests, j.Candidate.Requests, j.Stable.Errors, j.Candidate.Errors, j.StableP99, j.CandidateP99, j.ErrorE, j.ErrorLimit)
	}
	workflow.SetCurrentDetails(ctx, text)
}

// baking is for bakes: each activity lasts a quarter of an hour, and is tried again for as long as it takes.
func baking(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		StartToCloseTimeout: 20 * time.Minute, HeartbeatTimeout: 10 * time.Second, RetryPolicy: &patient,
	})
}
