package activities

import (
	"context"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// Runs keeps the registry's runs in step with their workflows.
type Runs struct{ runs registry.Runs }

// NewRuns makes the activities.
func NewRuns(runs registry.Runs) *Runs { return &Runs{runs: runs} }

// BeginRunInput says which run begins. A run that was started by a schedule is not in the registry yet: Insert.
type BeginRunInput struct {
	RunID  string        `json:"run_id"`
	Phase  string        `json:"phase"`
	Insert *registry.Run `json:"insert,omitempty"`
}

// BeginRun marks a run RUNNING.
func (a *Runs) BeginRun(ctx context.Context, in BeginRunInput) error {
	if in.Insert != nil {
		if _, err := a.runs.InsertRun(ctx, *in.Insert); err != nil {
			return Fault(err)
		}
	}
	_, err := a.runs.UpdateRun(ctx, registry.RunUpdate{ID: in.RunID, State: registry.RunRunning, Phase: &in.Phase})
	return Fault(err)
}

// NoteRunInput changes what a run says of itself.
type NoteRunInput struct {
	RunID    string            `json:"run_id"`
	State    registry.RunState `json:"state,omitempty"`
	Phase    string            `json:"phase"`
	Progress float64           `json:"progress,omitempty"`
}

// NoteRun writes a run's phase, and its state when one is given.
func (a *Runs) NoteRun(ctx context.Context, in NoteRunInput) error {
	_, err := a.runs.UpdateRun(ctx, registry.RunUpdate{ID: in.RunID, State: in.State, Phase: &in.Phase, Progress: &in.Progress})
	return Fault(err)
}

// EndRunInput ends a run.
type EndRunInput struct {
	RunID   string            `json:"run_id"`
	State   registry.RunState `json:"state"`
	Outcome registry.Outcome  `json:"outcome,omitempty"`
	Message string            `json:"message"`
	Result  *RunResult        `json:"result,omitempty"`
	Began   *BeginRunInput    `json:"began,omitempty"` // a run that this one started: whoever sees the end finds it
}

// RunResult is what a run leaves behind; each kind of run fills its own fields.
type RunResult struct {
	Revision  int64              `json:"revision,omitempty"`  // roll-out: of the route at the end
	Warnings  []string           `json:"warnings,omitempty"`  // roll-out: of preflight
	Judgement *monitor.Judgement `json:"judgement,omitempty"` // roll-out: the last
	Output    string             `json:"output,omitempty"`    // batch: the manifest; drift: the report; retrain: the comparison
	Rows      int64              `json:"rows,omitempty"`      // batch, drift: rows read
	Failed    int64              `json:"failed,omitempty"`    // batch: rows that failed
	Version   int                `json:"version,omitempty"`   // retrain: the challenger
	Champion  float64            `json:"champion,omitempty"`  // retrain: the champion's loss on the held-out rows
	Challenge float64            `json:"challenge,omitempty"` // retrain: the challenger's
}

// EndRun writes how a run ended; the first end stays.
func (a *Runs) EndRun(ctx context.Context, in EndRunInput) error {
	if in.Began != nil {
		if err := a.BeginRun(ctx, *in.Began); err != nil {
			return err
		}
	}
	done, phase := 1.0, "ended"
	update := registry.RunUpdate{ID: in.RunID, State: in.State, Outcome: in.Outcome, Phase: &phase, Message: &in.Message, Progress: &done}
	if in.Result != nil {
		update.Result = marshal(in.Result)
	}
	_, err := a.runs.UpdateRun(ctx, update)
	return Fault(err)
}
