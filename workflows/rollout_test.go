package workflows_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/mock"
	"github.com/stretchr/testify/require"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/log"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/testsuite"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// world is what the mocked activities of one roll-out do and saw. It keeps a route as the registry does, so that a
// test sees what a user would.
type world struct {
	failStep string                    // the shift that fails
	failure  error                     // with what
	verdicts map[int64]monitor.Verdict // of the bake under a revision; Pass when not given
	winner   int                       // of an experiment
	gate     activities.Gate           // at preflight and at promotion, until it opens
	restore  error                     // what a restore ends in

	route    []registry.Arm
	revision int64
	shifts   []activities.ShiftInput   // in order
	restores []activities.RestoreInput // in order
	bakes    []activities.BakeInput
	notes    []activities.NoteRunInput
	watch    *activities.BeginRunInput
	ended    activities.EndRunInput // the last
	env      *testsuite.TestWorkflowEnvironment
	input    workflows.RolloutInput
}

const (
	shiftTakes = time.Minute
	bakeTakes  = time.Hour
	noteTakes  = time.Second
)

// newWorld makes a world in which version 1 is stable and version 2 the candidate of two steps.
func newWorld() *world {
	w := &world{verdicts: map[int64]monitor.Verdict{}, revision: 7, route: registry.StableOnly(1)}
	w.input = workflows.RolloutInput{RunID: "r", Model: "m", Candidate: 2, Actor: "ann", Plan: activities.RolloutPlan{
		Strategy: registry.Steps, Steps: []int{1000, 5000}, Promote: true, Judge: monitor.DefaultJudge(), OnInconclusive: registry.RollBackThen,
	}}
	var suite testsuite.WorkflowTestSuite
	suite.SetLogger(log.NewStructuredLogger(slog.New(slog.DiscardHandler)))
	w.env = suite.NewTestWorkflowEnvironment()
	w.env.SetTestTimeout(time.Minute)
	workflows.Register(w.env)
	var traffic *activities.Traffic
	var runs *activities.Runs
	w.env.RegisterActivity(traffic)
	w.env.RegisterActivity(runs)
	w.env.OnActivity(traffic.Preflight, mock.Anything, mock.Anything).Return(w.preflight)
	w.env.OnActivity(traffic.ShiftTraffic, mock.Anything, mock.Anything).After(shiftTakes).Return(w.shift)
	w.env.OnActivity(traffic.RestoreRoute, mock.Anything, mock.Anything).After(noteTakes).Return(w.undo)
	w.env.OnActivity(traffic.Bake, mock.Anything, mock.Anything).After(bakeTakes).Return(w.bake)
	w.env.OnActivity(traffic.LookAtGate, mock.Anything, mock.Anything).Return(func(context.Context, string) (activities.Gate, error) { return w.closed(), nil })
	w.env.OnActivity(traffic.Allocate, mock.Anything, mock.Anything).Return(w.allocate)
	w.env.OnActivity(traffic.HoldVersion, mock.Anything, mock.Anything).Return(nil)
	w.env.OnActivity(runs.BeginRun, mock.Anything, mock.Anything).Return(func(_ context.Context, in activities.BeginRunInput) error { w.watch = &in; return nil })
	w.env.OnActivity(runs.NoteRun, mock.Anything, mock.Anything).After(noteTakes).Return(func(_ context.Context, in activities.NoteRunInput) error { w.notes = append(w.notes, in); return nil })
	w.env.OnActivity(runs.EndRun, mock.Anything, mock.Anything).Return(func(_ context.Context, in activities.EndRunInput) error {
		if in.RunID == "r" {
			w.ended = in
		}
		return nil
	})
	return w
}

func (w *world) preflight(context.Context, activities.PreflightInput) (activities.PreflightResult, error) {
	return activities.PreflightResult{
		Route: registry.Route{Model: "m", Revision: w.revision, Arms: w.route}, Judge: monitor.DefaultJudge(), Began: w.env.Now(), Gate: w.closed(),
	}, nil
}

func (w *world) closed() activities.Gate {
	if w.env.Now().Before(w.gate.Opens) {
		return w.gate
	}
	return activities.Gate{}
}

func (w *world) shift(_ context.Context, in activities.ShiftInput) (activities.ShiftResult, error) {
	if gate := w.closed(); in.Gated && !gate.Opens.IsZero() {
		return activities.ShiftResult{Gate: gate}, nil
	}
	w.shifts = append(w.shifts, in)
	if in.Step == w.failStep {
		return activities.ShiftResult{}, w.failure
	}
	w.revision++
	w.route = in.Arms
	return activities.ShiftResult{Revision: w.revision, At: w.env.Now()}, nil
}

func (w *world) undo(_ context.Context, in activities.RestoreInput) (activities.ShiftResult, error) {
	w.restores = append(w.restores, in)
	if w.restore == nil {
		w.revision++
		w.route = in.Arms
	}
	return activities.ShiftResult{Revision: w.revision}, w.restore
}

func (w *world) bake(_ context.Context, in activities.BakeInput) (activities.BakeResult, error) {
	w.bakes = append(w.bakes, in)
	v, ok := w.verdicts[in.Revision]
	if !ok {
		v = monitor.Pass
	}
	if in.Seconds > 1e8 && (v == monitor.Pass || v == monitor.Inconclusive) { // only waiting
		v = monitor.Continue
	}
	return activities.BakeResult{Judgement: monitor.Judgement{Verdict: v, Reason: string(v), Winner: w.winner}}, nil
}

func (w *world) allocate(_ context.Context, in activities.AllocateInput) ([]registry.Arm, error) {
	return []registry.Arm{
		{Version: 1, Role: registry.Stable, Weight: 5000 - 100*in.Seq}, {Version: 2, Role: registry.Variant, Weight: 5000 + 100*in.Seq},
	}, nil
}

func (w *world) run(t *testing.T) workflows.RolloutResult {
	t.Helper()
	w.env.ExecuteWorkflow(workflows.RolloutName, w.input)
	require.True(t, w.env.IsWorkflowCompleted())
	require.NoError(t, w.env.GetWorkflowError())
	var out workflows.RolloutResult
	require.NoError(t, w.env.GetWorkflowResult(&out))
	require.Equal(t, out.Outcome, w.ended.Outcome, "the run says what the workflow says")
	require.NotEmpty(t, out.Message)
	return out
}

// say sends an update after a while and returns what refused it, if anything did.
func (w *world) say(name string, after time.Duration, d workflows.Decision) *error {
	var refused error
	if d.Actor == "" {
		d.Actor = "bob"
	}
	w.env.RegisterDelayedCallback(func() {
		w.env.UpdateWorkflow(name, fmt.Sprintf("%s-%s", name, after), &testsuite.TestUpdateCallback{
			OnReject: func(err error) { refused = err }, OnAccept: func() {}, OnComplete: func(any, error) {},
		}, d)
	}, after)
	return &refused
}

func (w *world) weights() (out []int) {
	for _, s := range w.shifts {
		out = append(out, s.Arms[len(s.Arms)-1].Weight)
	}
	return out
}

// What a person says while traffic is shifted holds when the shift is done: no bake begins.
func TestRollout_MockedActivities_PromoteNowDuringAShift(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.say(workflows.PauseUpdate, 70*time.Second, workflows.Decision{}) // step 1 is shifted from 60 to 120 s
	w.say(workflows.ResumeUpdate, 80*time.Second, workflows.Decision{})
	w.say(workflows.PromoteNowUpdate, 90*time.Second, workflows.Decision{})
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Empty(t, w.bakes)
}

// Nobody is promoted cold, not even at once.
func TestRollout_MockedActivities_PromoteNowWarmsFirst(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.input.Plan.Approvals = 1
	w.say(workflows.PromoteNowUpdate, time.Second, workflows.Decision{})
	w.say(workflows.ApproveUpdate, 2*time.Second, workflows.Decision{})
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Equal(t, []int{0, registry.FullWeight}, w.weights())
}

func TestRollout_MockedActivities_PromotesStepByStep(t *testing.T) {
	t.Parallel()
	w := newWorld()
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Equal(t, []int{0, 1000, 5000, registry.FullWeight}, w.weights())
	require.Equal(t, []int{2}, w.shifts[0].Ready, "weight only after the candidate is warm")
	require.False(t, w.shifts[3].Owned, "the promoted route is nobody's")
	require.Empty(t, w.restores)
	require.False(t, w.bakes[0].Last)
	require.True(t, w.bakes[1].Last, "only the last step must show that it is no worse")
	require.Equal(t, w.bakes[0].FirstRevision, w.bakes[1].FirstRevision, "evidence counts from the first traffic")
}

// Strategies are data: each makes its own routes.
func TestRollout_MockedActivities_Strategies(t *testing.T) {
	t.Parallel()
	arm := func(version int, role registry.Role, weight int) registry.Arm {
		return registry.Arm{Version: version, Role: role, Weight: weight}
	}
	for name, c := range map[string]struct {
		plan    func(*world)
		routes  [][]registry.Arm
		outcome registry.Outcome
	}{
		"all at once": {
			func(w *world) { w.input.Plan.Steps = nil },
			[][]registry.Arm{{arm(1, registry.Stable, 10000), arm(2, registry.Candidate, 0)}, {arm(2, registry.Stable, 10000)}},
			registry.Promoted,
		},
		"with a holdback": {
			func(w *world) { w.input.Plan.Steps, w.input.Plan.WatchSeconds, w.input.Plan.Holdback = nil, 60, 500 },
			[][]registry.Arm{{arm(1, registry.Stable, 10000), arm(2, registry.Candidate, 0)}, {arm(2, registry.Stable, 9500), arm(1, registry.Holdback, 500)}, {arm(2, registry.Stable, 10000)}},
			registry.Promoted,
		},
		"shadow": {
			func(w *world) { w.input.Plan.Steps, w.input.Plan.Shadow, w.input.Plan.Promote = nil, 2000, false },
			[][]registry.Arm{{arm(1, registry.Stable, 10000), arm(2, registry.Shadow, 0)}, {arm(1, registry.Stable, 10000), arm(2, registry.Shadow, 2000)}},
			registry.Passed,
		},
		"shadow, then promoted": {
			func(w *world) { w.input.Plan.Steps, w.input.Plan.Shadow = nil, 2000 },
			[][]registry.Arm{{arm(1, registry.Stable, 10000), arm(2, registry.Shadow, 0)}, {arm(1, registry.Stable, 10000), arm(2, registry.Shadow, 2000)}, {arm(2, registry.Stable, 10000)}},
			registry.Promoted,
		},
		"experiment": {
			func(w *world) { experiment(w, 3) },
			[][]registry.Arm{
				{arm(1, registry.Stable, 10000), arm(2, registry.Variant, 0), arm(3, registry.Variant, 0)},
				{arm(1, registry.Stable, 4000), arm(2, registry.Variant, 3000), arm(3, registry.Variant, 3000)},
				{arm(3, registry.Stable, 10000)},
			},
			registry.Promoted,
		},
		"experiment that stable wins": {
			func(w *world) { experiment(w, 1) },
			[][]registry.Arm{
				{arm(1, registry.Stable, 10000), arm(2, registry.Variant, 0), arm(3, registry.Variant, 0)},
				{arm(1, registry.Stable, 4000), arm(2, registry.Variant, 3000), arm(3, registry.Variant, 3000)},
			},
			registry.Passed,
		},
	} {
		w := newWorld()
		c.plan(w)
		out := w.run(t)
		require.Equal(t, c.outcome, out.Outcome, "%s: %s", name, out.Message)
		var routes [][]registry.Arm
		for _, s := range w.shifts {
			routes = append(routes, s.Arms)
		}
		require.Equal(t, c.routes, routes, name)
		if c.outcome == registry.Passed {
			require.Equal(t, registry.StableOnly(1), w.route, name)
		}
	}
}

// Whoever sees that a roll-out has ended finds its watch: the end tells the registry of it first.
func TestRollout_MockedActivities_ItsEndTellsOfTheWatch(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.input.Plan.WatchSeconds = 60
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.NotNil(t, w.ended.Began)
	require.Equal(t, "r-watch", w.ended.Began.Insert.ID)
	require.Equal(t, w.watch, w.ended.Began, "the watch says the same of itself")

	w = newWorld()
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Nil(t, w.ended.Began, "the policy wants no watch")

	w = newWorld()
	w.input.Plan.WatchSeconds = 60
	w.env.OnWorkflow(workflows.WatchName, mock.Anything, mock.Anything).Return(workflows.WatchResult{}, testsuite.ErrMockStartChildWorkflowFailed)
	out := w.run(t)
	require.Equal(t, registry.Promoted, out.Outcome)
	require.Contains(t, out.Message, "nobody watches it")
	require.Nil(t, w.ended.Began)
}

func experiment(w *world, winner int) {
	w.winner = winner
	w.input.Plan = activities.RolloutPlan{
		Strategy: registry.AB, Promote: true, Judge: monitor.DefaultJudge(), Experiment: &activities.Experiment{Goal: monitor.Higher, EverySeconds: 600},
		Variants: []registry.Arm{{Version: 2, Role: registry.Variant, Weight: 3000}, {Version: 3, Role: registry.Variant, Weight: 3000}},
	}
}

func TestRollout_MockedActivities_ABanditMovesWeightsUntilThereIsAWinner(t *testing.T) {
	t.Parallel()
	w := newWorld()
	experiment(w, 2)
	w.input.Plan.Experiment.Bandit = true
	w.verdicts[9], w.verdicts[10], w.verdicts[11] = monitor.Continue, monitor.Continue, monitor.Pass
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Equal(t, []int{0, 3000, 5100, 5200, registry.FullWeight}, w.weights())
	require.EqualValues(t, 600, w.bakes[0].Slice)
	require.Equal(t, w.bakes[0].Since, w.bakes[2].Since, "the experiment's time goes on")
}

// A roll-out must be able to end from every state, by everything that can happen there. After each: the route is one
// version's, nobody owns it, and the run says what happened. (Flagger #1801, #1588, #1152; Argo Rollouts #1411, #943.)
func TestRollout_MockedActivities_EveryStateHasAWayOut(t *testing.T) {
	t.Parallel()
	states := []struct {
		name    string
		plan    func(*world)
		at      time.Duration // when the roll-out is there
		touched bool
	}{
		{"waiting for approval", func(w *world) { w.input.Plan.Approvals = 1 }, time.Second, false},
		{"waiting for a window", func(w *world) {
			w.gate = activities.Gate{Opens: w.env.Now().Add(1000 * time.Hour), Why: "frozen"}
		}, time.Minute, false},
		{"warming", func(*world) {}, 30 * time.Second, true},
		{"shifting to step 1", func(*world) {}, 90 * time.Second, true},
		{"baking step 1", func(*world) {}, 10 * time.Minute, true},
		{"shifting to step 2", func(*world) {}, 62*time.Minute + 30*time.Second, true},
		{"baking step 2", func(*world) {}, 100 * time.Minute, true},
		{"paused", func(w *world) { w.say(workflows.PauseUpdate, 5*time.Minute, workflows.Decision{}) }, 10 * time.Minute, true},
		{"paused before traffic moves", func(w *world) { w.say(workflows.PauseUpdate, time.Second, workflows.Decision{}) }, 10 * time.Minute, true},
		{"held without a verdict", func(w *world) {
			w.input.Plan.OnInconclusive = registry.HoldThen
			w.verdicts[9] = monitor.Inconclusive
		}, 80 * time.Minute, true},
		{"waiting for approval before promotion", func(w *world) {
			w.input.Plan.Approvals, w.input.Plan.ApproveBefore = 1, "promotion"
		}, 130 * time.Minute, true},
		{"mirroring", func(w *world) { w.input.Plan.Steps, w.input.Plan.Shadow = nil, 1000 }, 10 * time.Minute, true},
		{"experimenting", func(w *world) { experiment(w, 2) }, 10 * time.Minute, true},
	}
	moved := temporal.NewNonRetryableApplicationError("the route was changed by bob", string(registry.Conflict), nil)
	events := []struct {
		name    string
		happens func(w *world, at time.Duration)
		want    registry.Outcome
	}{
		{"abort", func(w *world, at time.Duration) { w.say(workflows.AbortUpdate, at, workflows.Decision{}) }, registry.Aborted},
		{"cancel", func(w *world, at time.Duration) { w.env.RegisterDelayedCallback(w.env.CancelWorkflow, at) }, registry.Aborted},
		{"another roll-out", func(w *world, at time.Duration) { w.say(workflows.SupersedeUpdate, at, workflows.Decision{}) }, registry.Superseded},
		{"a rollback by hand", func(w *world, at time.Duration) {
			w.restore = moved
			w.env.RegisterDelayedCallback(func() {
				w.env.SignalWorkflow(workflows.RouteMovedSignal, workflows.Decision{Actor: "bob", Reason: "it looks bad"})
			}, at)
		}, registry.Superseded},
	}
	for _, state := range states {
		for _, event := range events {
			w := newWorld()
			state.plan(w)
			event.happens(w, state.at)
			name := state.name + " / " + event.name
			out := w.run(t)
			require.Equal(t, event.want, out.Outcome, "%s: %s", name, out.Message)
			require.Equal(t, registry.RunCancelled, w.ended.State, name)
			if !state.touched {
				require.Empty(t, w.shifts, name)
				require.Empty(t, w.restores, "%s: a route that was not touched is left alone", name)
				continue
			}
			require.Len(t, w.restores, 1, name)
			if w.restore == nil {
				require.Equal(t, registry.StableOnly(1), w.route, name)
			}
		}
	}
}

// Traffic is judged in every state in which a candidate has some: a rollback does not wait for anybody
// (Flagger #1801: no rollback while it waits for a confirmation).
func TestRollout_MockedActivities_WatchesWhileItWaits(t *testing.T) {
	t.Parallel()
	for name, plan := range map[string]func(*world){
		"paused": func(w *world) {
			w.verdicts[9] = monitor.Rollback
			w.say(workflows.PauseUpdate, 5*time.Minute, workflows.Decision{})
		},
		"paused before step 2": func(w *world) {
			w.say(workflows.PauseUpdate, 61*time.Minute+59*time.Second, workflows.Decision{})
			w.verdicts[9] = monitor.Rollback
		},
		"held": func(w *world) {
			w.input.Plan.OnInconclusive = registry.HoldThen
			w.verdicts[9] = monitor.Inconclusive
			w.env.RegisterDelayedCallback(func() { w.verdicts[9] = monitor.Rollback }, 90*time.Minute)
		},
		"waiting for approval": func(w *world) {
			w.input.Plan.Approvals, w.input.Plan.ApproveBefore = 1, "promotion"
			w.env.RegisterDelayedCallback(func() { w.verdicts[10] = monitor.Rollback }, 130*time.Minute)
		},
		"waiting for a window": func(w *world) {
			w.env.RegisterDelayedCallback(func() {
				w.gate = activities.Gate{Opens: w.env.Now().Add(1000 * time.Hour), Why: "frozen"}
				w.verdicts[10] = monitor.Rollback
			}, 123*time.Minute)
		},
	} {
		w := newWorld()
		plan(w)
		out := w.run(t)
		require.Equal(t, registry.RolledBack, out.Outcome, "%s: %s", name, out.Message)
		require.Equal(t, registry.StableOnly(1), w.route, name)
	}
}

// Whatever step fails, the route captured at the start is put back, once.
func TestRollout_MockedActivities_UndoesWhateverStepFails(t *testing.T) {
	t.Parallel()
	broken := temporal.NewNonRetryableApplicationError("worker w cannot load it", string(registry.Precondition), nil)
	for _, step := range []string{"warm", "step-1", "step-2", "promote"} {
		w := newWorld()
		w.failStep, w.failure = step, broken
		out := w.run(t)
		require.Equal(t, registry.RolledBack, out.Outcome, step)
		require.Contains(t, out.Message, "cannot load it")
		require.Len(t, w.restores, 1, step)
		require.Equal(t, registry.StableOnly(1), w.restores[0].Arms)
		require.Equal(t, registry.RunFailed, w.ended.State)
	}
}

func TestRollout_MockedActivities_EndsAsTheJudgeSays(t *testing.T) {
	t.Parallel()
	for verdict, want := range map[monitor.Verdict]registry.Outcome{
		monitor.Rollback: registry.RolledBack, monitor.Inconclusive: registry.Inconclusive, activities.Moved: registry.Superseded,
	} {
		w := newWorld()
		w.verdicts[10] = verdict // of the second step: 7 captured, 8 warm, 9 step 1, 10 step 2
		require.Equal(t, want, w.run(t).Outcome)
		require.Len(t, w.restores, 1)
	}
}

// What the policy says when the time is up: roll back, wait for a person, or bake once more.
func TestRollout_MockedActivities_WhenTheTimeIsUp(t *testing.T) {
	t.Parallel()
	held := func(say func(*world)) registry.Outcome {
		w := newWorld()
		w.input.Plan.OnInconclusive, w.input.Plan.MaxBakeSeconds = registry.HoldThen, 3600
		w.verdicts[9] = monitor.Inconclusive
		say(w)
		out := w.run(t)
		require.Contains(t, w.notes[0].Phase, "waiting for a decision")
		require.Equal(t, registry.RunWaiting, w.notes[0].State)
		if len(w.notes) > 1 { // it went on
			require.Equal(t, "step 1 of 2: 10 %", w.notes[1].Phase)
			require.Equal(t, registry.RunRunning, w.notes[1].State)
		}
		return out.Outcome
	}
	pass := func(w *world) {
		w.env.RegisterDelayedCallback(func() { w.verdicts[9] = monitor.Pass }, 100*time.Minute)
	}
	require.Equal(t, registry.Promoted, held(func(w *world) { w.say(workflows.PromoteNowUpdate, 90*time.Minute, workflows.Decision{}) }))
	require.Equal(t, registry.Promoted, held(func(w *world) {
		pass(w)
		w.say(workflows.RetryStepUpdate, 110*time.Minute, workflows.Decision{})
	}))
	require.Equal(t, registry.Promoted, held(func(w *world) {
		pass(w)
		w.say(workflows.ExtendUpdate, 110*time.Minute, workflows.Decision{Seconds: 600})
	}))
	require.Equal(t, registry.Aborted, held(func(w *world) { w.say(workflows.AbortUpdate, 90*time.Minute, workflows.Decision{}) }))

	w := newWorld()
	w.input.Plan.OnInconclusive, w.input.Plan.MaxBakeSeconds = registry.ExtendThen, 3600
	w.verdicts[9] = monitor.Inconclusive
	require.Equal(t, registry.Inconclusive, w.run(t).Outcome)
	require.Len(t, w.bakes, 2, "once more, and no more")
	require.EqualValues(t, 3600, w.bakes[0].MaxSeconds)
	require.EqualValues(t, 7200, w.bakes[1].MaxSeconds)
}

func TestRollout_MockedActivities_ExtendGivesTheStepMoreTime(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.input.Plan.MaxBakeSeconds = 3600
	w.say(workflows.ExtendUpdate, 5*time.Minute, workflows.Decision{Seconds: 600})
	w.say(workflows.RetryStepUpdate, 80*time.Minute, workflows.Decision{})
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	var most []int64
	for _, b := range w.bakes {
		most = append(most, b.MaxSeconds)
	}
	require.Contains(t, most, int64(4200))
	require.EqualValues(t, 3600, most[len(most)-1], "the next step has its own time")
}

// Approvals: as many people as the policy asks for, not the same one twice, and not who started it.
func TestRollout_MockedActivities_Approvals(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.input.Plan.Approvals, w.input.Plan.FourEyes = 2, true
	own := w.say(workflows.ApproveUpdate, time.Second, workflows.Decision{Actor: "ann"})
	first := w.say(workflows.ApproveUpdate, 2*time.Second, workflows.Decision{Actor: "bob"})
	twice := w.say(workflows.ApproveUpdate, 3*time.Second, workflows.Decision{Actor: "bob"})
	second := w.say(workflows.ApproveUpdate, 4*time.Second, workflows.Decision{Actor: "cay"})
	late := w.say(workflows.ApproveUpdate, 10*time.Minute, workflows.Decision{Actor: "dan"})
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.ErrorContains(t, *own, "four eyes")
	require.NoError(t, *first)
	require.ErrorContains(t, *twice, "has approved it already")
	require.NoError(t, *second)
	require.ErrorContains(t, *late, "no approval is asked for")

	w = newWorld()
	w.input.Plan.Approvals, w.input.Plan.ApprovalSeconds = 2, 600
	w.say(workflows.ApproveUpdate, 2*time.Second, workflows.Decision{})
	out := w.run(t)
	require.Equal(t, registry.Rejected, out.Outcome)
	require.Contains(t, out.Message, "1 of 2 approved it")
	require.Empty(t, w.restores)
}

// A promotion waits for a window; the way back does not, and urgent ones neither.
func TestRollout_MockedActivities_Windows(t *testing.T) {
	t.Parallel()
	w := newWorld()
	opens := w.env.Now().Add(10 * time.Hour)
	w.gate = activities.Gate{Opens: opens, Why: "frozen"}
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.False(t, w.bakes[0].Began.After(opens))
	require.Contains(t, w.notes[0].Phase, "frozen")
	require.Equal(t, registry.RunWaiting, w.notes[0].State)
	require.False(t, w.bakes[0].Since.Before(opens), "no traffic before it opens")

	w = newWorld()
	w.env.RegisterDelayedCallback(func() { w.gate = activities.Gate{Opens: w.env.Now().Add(3 * time.Hour), Why: "frozen"} }, 100*time.Minute)
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.False(t, w.env.Now().Before(w.gate.Opens), "the freeze came while it baked, and held the promotion")
}

// Who looks at the run sees that it is paused, and that it goes on.
func TestRollout_MockedActivities_ThePauseIsShown(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.say(workflows.PauseUpdate, 5*time.Minute, workflows.Decision{})
	w.say(workflows.ResumeUpdate, 10*time.Minute, workflows.Decision{})
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Len(t, w.notes, 2)
	require.Equal(t, activities.NoteRunInput{RunID: "r", State: registry.RunWaiting, Phase: "step 1 of 2: 10 % (paused)", Progress: 0.25}, w.notes[0])
	require.Equal(t, activities.NoteRunInput{RunID: "r", State: registry.RunRunning, Phase: "step 1 of 2: 10 %", Progress: 0.25}, w.notes[1])
}

// One that is paused while it warms, before it moves any traffic, says so too; the change of the traffic says that it goes on.
func TestRollout_MockedActivities_ThePauseBeforeTrafficIsShown(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.say(workflows.PauseUpdate, time.Second, workflows.Decision{})
	w.say(workflows.ResumeUpdate, 10*time.Minute, workflows.Decision{})
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Equal(t, []activities.NoteRunInput{{RunID: "r", State: registry.RunWaiting, Phase: "step 1 of 2: 10 % (paused)", Progress: 0.25}}, w.notes)
}

// What a person says while the run is told that it is paused holds too: no bake begins that nobody would wake.
func TestRollout_MockedActivities_DecisionsWhileTheRunIsTold(t *testing.T) {
	t.Parallel()
	for action, want := range map[string]registry.Outcome{
		workflows.PromoteNowUpdate: registry.Promoted, workflows.AbortUpdate: registry.Aborted,
	} {
		w := newWorld()
		w.verdicts[9] = monitor.Continue
		w.say(workflows.PauseUpdate, 5*time.Minute, workflows.Decision{})
		w.say(action, 5*time.Minute+noteTakes/2, workflows.Decision{})
		began := w.env.Now()
		require.Equal(t, want, w.run(t).Outcome)
		require.Less(t, w.env.Now().Sub(began), 10*time.Minute, action)
	}
}

// A route that somebody else changed is not fought: the compensation's compare-and-set loses, and the run says so.
func TestRollout_MockedActivities_NeverFightsAChangedRoute(t *testing.T) {
	t.Parallel()
	moved := temporal.NewNonRetryableApplicationError("the route was changed by bob", string(registry.Conflict), nil)
	w := newWorld()
	w.failStep, w.failure, w.restore = "step-2", moved, moved
	out := w.run(t)
	require.Equal(t, registry.Superseded, out.Outcome)
	require.Equal(t, registry.RunCancelled, w.ended.State)
}

// A long roll-out continues as new and goes on where it was: the present step's traffic is not set again, and what
// people said holds.
func TestRollout_MockedActivities_ContinuesAsNew(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.input.ContinueAfter = 10
	w.verdicts[9] = monitor.Continue
	w.say(workflows.ExtendUpdate, 10*time.Minute, workflows.Decision{Seconds: 77})
	w.env.RegisterDelayedCallback(func() { w.env.SetCurrentHistoryLength(10) }, 20*time.Minute)
	w.env.ExecuteWorkflow(workflows.RolloutName, w.input)
	var next *workflow.ContinueAsNewError
	require.ErrorAs(t, w.env.GetWorkflowError(), &next)
	var in workflows.RolloutInput
	require.NoError(t, converter.GetDefaultDataConverter().FromPayloads(next.Input, &in))
	require.Equal(t, 1, in.Resume.Stage)
	require.True(t, in.Resume.Set)
	require.EqualValues(t, 77, in.Resume.Extra)
	require.Empty(t, w.ended.RunID, "the run has not ended")

	again := newWorld()
	again.revision, again.route, again.input = w.revision, w.route, in
	again.input.ContinueAfter = 0
	require.Equal(t, registry.Promoted, again.run(t).Outcome)
	require.Equal(t, []int{5000, registry.FullWeight}, again.weights(), "step 1 is not set again")
	require.Equal(t, w.bakes[0].FirstRevision, again.bakes[0].FirstRevision)
}

// A bake is one activity for each slice of it, and none besides (Argo Rollouts #1107: analysis runs created endlessly).
func TestRollout_MockedActivities_ABakeIsOneActivityASlice(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.input.Plan.Steps = []int{1000}
	w.verdicts[9] = monitor.Continue
	w.env.RegisterDelayedCallback(func() { w.verdicts[9] = monitor.Pass }, 24*time.Hour)
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.LessOrEqual(t, len(w.bakes), 25, "a day of bakes that report hourly")
}

// A route that cannot be put back waits for an operator, each time until it is released; while it is tried again there is
// nothing to release.
func TestRollout_MockedActivities_WaitsForAnOperator(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.verdicts[9] = monitor.Rollback
	w.restore = temporal.NewNonRetryableApplicationError("no model m", string(registry.NotFound), nil)
	failed := 2*shiftTakes + bakeTakes + noteTakes
	release := func(after time.Duration) *error { return w.say(workflows.ReleaseUpdate, after, workflows.Decision{}) }
	early, first, again := release(failed-noteTakes/2), release(failed+time.Minute), release(failed+time.Minute+noteTakes/2)
	w.env.RegisterDelayedCallback(func() { w.restore = nil }, failed+time.Hour)
	last := release(failed + 2*time.Hour)
	out := w.run(t)
	require.Equal(t, registry.RolledBack, out.Outcome)
	require.Len(t, w.restores, 3)
	require.Equal(t, registry.StableOnly(1), w.route)
	require.ErrorContains(t, *early, "nothing to release")
	require.NoError(t, *first)
	require.ErrorContains(t, *again, "nothing to release")
	require.NoError(t, *last)
	require.Len(t, w.notes, 2)
	require.Equal(t, registry.RunNeedsOperator, w.notes[0].State)
	require.Equal(t, "needs an operator: no model m", w.notes[0].Phase)
}
