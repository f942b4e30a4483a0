package workflows_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/mock"
	"github.com/stretchr/testify/require"
	"go.temporal.io/sdk/log"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/testsuite"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// world is what the mocked activities of one roll-out do and saw.
type world struct {
	failStep string                    // the shift that fails
	failure  error                     // with what
	verdicts map[int64]monitor.Verdict // of the bake under a revision; Pass when not given
	shifts   []activities.ShiftInput   // in order
	restores []activities.RestoreInput // in order
	restore  error                     // what a restore ends in
	bakes    int
	ended    activities.EndRunInput             // the last
	env      *testsuite.TestWorkflowEnvironment //
}

// newWorld makes a world whose bakes take a while.
func newWorld(bakeFor time.Duration) *world {
	w := &world{verdicts: map[int64]monitor.Verdict{}}
	var suite testsuite.WorkflowTestSuite
	suite.SetLogger(log.NewStructuredLogger(slog.New(slog.DiscardHandler)))
	w.env = suite.NewTestWorkflowEnvironment()
	workflows.Register(w.env)
	var traffic *activities.Traffic
	var runs *activities.Runs
	w.env.RegisterActivity(traffic)
	w.env.RegisterActivity(runs)
	start := activities.PreflightResult{Route: registry.Route{Model: "m", Revision: 7, Arms: registry.StableOnly(1)}, Judge: monitor.DefaultJudge()}
	w.env.OnActivity(traffic.Preflight, mock.Anything, mock.Anything).Return(start, nil)
	w.env.OnActivity(traffic.ShiftTraffic, mock.Anything, mock.Anything).After(time.Minute).Return(w.shift)
	w.env.OnActivity(traffic.RestoreRoute, mock.Anything, mock.Anything).Return(w.undo)
	w.env.OnActivity(traffic.Bake, mock.Anything, mock.Anything).After(bakeFor).Return(w.bake)
	w.env.OnActivity(traffic.HoldVersion, mock.Anything, mock.Anything).Return(nil)
	w.env.OnActivity(runs.NoteRun, mock.Anything, mock.Anything).Return(nil)
	w.env.OnActivity(runs.EndRun, mock.Anything, mock.Anything).Return(func(_ context.Context, in activities.EndRunInput) error { w.ended = in; return nil })
	return w
}

func (w *world) shift(_ context.Context, in activities.ShiftInput) (activities.ShiftResult, error) {
	w.shifts = append(w.shifts, in)
	if in.Step == w.failStep {
		return activities.ShiftResult{}, w.failure
	}
	return activities.ShiftResult{Revision: in.Expected + 1, At: w.env.Now()}, nil
}

func (w *world) undo(_ context.Context, in activities.RestoreInput) (activities.ShiftResult, error) {
	w.restores = append(w.restores, in)
	return activities.ShiftResult{Revision: in.Revision + 1}, w.restore
}

func (w *world) bake(_ context.Context, in activities.BakeInput) (activities.BakeResult, error) {
	w.bakes++
	v, ok := w.verdicts[in.Revision]
	if !ok {
		v = monitor.Pass
	}
	return activities.BakeResult{Judgement: monitor.Judgement{Verdict: v, Reason: string(v)}}, nil
}

func (w *world) run(t *testing.T) workflows.RolloutResult {
	t.Helper()
	w.env.ExecuteWorkflow(workflows.RolloutName, workflows.RolloutInput{
		RunID: "r", Model: "m", Candidate: 2, Steps: []int{1000, 5000}, Judge: monitor.DefaultJudge(), Actor: "ann",
	})
	require.True(t, w.env.IsWorkflowCompleted())
	require.NoError(t, w.env.GetWorkflowError())
	var out workflows.RolloutResult
	require.NoError(t, w.env.GetWorkflowResult(&out))
	require.Equal(t, out.Outcome, w.ended.Outcome, "the run says what the workflow says")
	return out
}

// say sends an update after a while.
func (w *world) say(t *testing.T, name string, after time.Duration) {
	t.Helper()
	w.env.RegisterDelayedCallback(func() {
		w.env.UpdateWorkflow(name, name, &testsuite.TestUpdateCallback{
			OnReject:   func(err error) { t.Errorf("%s was refused: %v", name, err) },
			OnAccept:   func() {},
			OnComplete: func(any, error) {},
		}, workflows.Decision{Actor: "ann"})
	}, after)
}

// What a person says while traffic is shifted holds when the shift is done: no bake begins.
func TestRollout_MockedActivities_PromoteNowDuringAShift(t *testing.T) {
	t.Parallel()
	w := newWorld(time.Hour)
	w.say(t, workflows.PauseUpdate, 70*time.Second) // step 1 is shifted from 60 to 120 s
	w.say(t, workflows.ResumeUpdate, 80*time.Second)
	w.say(t, workflows.PromoteNowUpdate, 90*time.Second)
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	require.Zero(t, w.bakes)
}

func TestRollout_MockedActivities_PromotesStepByStep(t *testing.T) {
	t.Parallel()
	w := newWorld(time.Second)
	require.Equal(t, registry.Promoted, w.run(t).Outcome)
	var weights []int
	for _, s := range w.shifts {
		weights = append(weights, s.Arms[len(s.Arms)-1].Weight)
	}
	require.Equal(t, []int{0, 1000, 5000, registry.FullWeight}, weights)
	require.Equal(t, 2, w.shifts[0].Ready, "weight only after the candidate is warm")
	require.False(t, w.shifts[3].Owned, "the promoted route is nobody's")
	require.Empty(t, w.restores)
}

// Whatever step fails, the route captured at the start is put back, once.
func TestRollout_MockedActivities_UndoesWhateverStepFails(t *testing.T) {
	t.Parallel()
	broken := temporal.NewNonRetryableApplicationError("worker w cannot load it", string(registry.Precondition), nil)
	for _, step := range []string{"warm", "step-1", "step-2", "promote"} {
		w := newWorld(time.Second)
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
		w := newWorld(time.Second)
		w.verdicts[10] = verdict // of the second step: 7 captured, 8 warm, 9 step 1, 10 step 2
		require.Equal(t, want, w.run(t).Outcome)
		require.Len(t, w.restores, 1)
	}
}

// A route that somebody else changed is not fought: the compensation's compare-and-set loses, and the run says so.
func TestRollout_MockedActivities_NeverFightsAChangedRoute(t *testing.T) {
	t.Parallel()
	moved := temporal.NewNonRetryableApplicationError("the route was changed by bob", string(registry.Conflict), nil)
	w := newWorld(time.Second)
	w.failStep, w.failure, w.restore = "step-2", moved, moved
	out := w.run(t)
	require.Equal(t, registry.Superseded, out.Outcome)
	require.Equal(t, registry.RunCancelled, w.ended.State)
}

func TestRollout_MockedActivities_AbortWhilePausedGoesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(time.Hour)
	w.say(t, workflows.PauseUpdate, 5*time.Minute)
	w.say(t, workflows.AbortUpdate, 6*time.Minute)
	out := w.run(t)
	require.Equal(t, registry.Aborted, out.Outcome)
	require.Len(t, w.restores, 1)
}
