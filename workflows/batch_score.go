package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// BatchScoreName is the registered name.
const BatchScoreName = "BatchScore"

// BatchScoreID returns the workflow id of a job that a person started; a schedule appends its time.
func BatchScoreID(job string) string { return "batch/" + job }

// BatchScoreInput says what to score. RunID is "" when a schedule starts it: the Temporal run's id is taken then.
type BatchScoreInput struct {
	RunID   string                       `json:"run_id"`
	Model   string                       `json:"model"`
	Version int                          `json:"version"` // 0 = the champion when the job begins
	Input   string                       `json:"input"`
	Output  string                       `json:"output"` // "" = batch/{run id}/
	PerPart int64                        `json:"per_part"`
	MaxFail float64                      `json:"max_failed_share"`
	Actor   string                       `json:"actor"`
	Plan    *activities.BatchPlan        `json:"plan,omitempty"` // carried over continue-as-new
	Done    []activities.PartitionResult `json:"done,omitempty"`
}

// BatchScoreResult says how a job came out.
type BatchScoreResult struct {
	Rows     int64  `json:"rows"`
	Failed   int64  `json:"failed"`
	Manifest string `json:"manifest"`
}

const (
	batchWindow = 4   // partitions under way at once
	batchTurn   = 400 // partitions before the history is begun anew
)

// BatchScore plans partitions, scores them in a bounded window, verifies the counts and publishes the manifest last.
func BatchScore(ctx workflow.Context, in BatchScoreInput) (BatchScoreResult, error) {
	var runs *activities.Runs
	if in.Plan == nil {
		run := registry.Run{Kind: registry.KindBatch, Model: in.Model, Version: in.Version, Actor: in.Actor}
		if err := begin(ctx, &in.RunID, run, "planning"); err != nil {
			return BatchScoreResult{}, err
		}
	}
	out, err := batch(ctx, &in)
	if workflow.IsContinueAsNewError(err) {
		return out, err
	}
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	end := activities.EndRunInput{
		RunID: in.RunID, State: registry.RunSucceeded, Message: fmt.Sprintf("%d rows scored, %d failed", out.Rows, out.Failed),
		Result: &activities.RunResult{Output: out.Manifest, Rows: out.Rows, Failed: out.Failed},
	}
	if err != nil {
		end.State, end.Message = registry.RunFailed, activities.Reason(err)
	}
	if ended := workflow.ExecuteActivity(quick(last), runs.EndRun, end).Get(last, nil); err == nil {
		err = ended
	}
	return out, err
}

// begin marks a run RUNNING. A run that a schedule started is inserted under the Temporal run's id.
func begin(ctx workflow.Context, id *string, run registry.Run, phase string) error {
	info := workflow.GetInfo(ctx)
	in := activities.BeginRunInput{Phase: phase}
	if *id == "" {
		*id = info.WorkflowExecution.RunID
		run.ID, run.WorkflowID = *id, info.WorkflowExecution.ID
		if run.Actor == "" {
			run.Actor = "schedule"
		}
		in.Insert = &run
	}
	in.RunID = *id
	var runs *activities.Runs
	return workflow.ExecuteActivity(quick(ctx), runs.BeginRun, in).Get(ctx, nil)
}

func batch(ctx workflow.Context, in *BatchScoreInput) (BatchScoreResult, error) {
	var data *activities.Data
	if in.Plan == nil {
		output := in.Output
		if output == "" {
			output = activities.BatchPrefix + in.RunID + "/"
		}
		in.Plan = &activities.BatchPlan{}
		if err := workflow.ExecuteActivity(dataOptions(ctx), data.PlanBatch, activities.PlanBatchInput{
			RunID: in.RunID, Model: in.Model, Version: in.Version, Input: in.Input, Output: output, PerPart: in.PerPart,
		}).Get(ctx, in.Plan); err != nil {
			return BatchScoreResult{}, err
		}
	}
	if err := scoreParts(ctx, in); err != nil {
		return BatchScoreResult{}, err
	}
	var m activities.BatchManifest
	if err := workflow.ExecuteActivity(dataOptions(ctx), data.CommitBatch, activities.CommitInput{Plan: *in.Plan, Parts: in.Done}).Get(ctx, &m); err != nil {
		return BatchScoreResult{}, err
	}
	out := BatchScoreResult{Rows: m.Rows, Failed: m.Failed, Manifest: in.Plan.Output + activities.ManifestName}
	if share := float64(m.Failed) / float64(in.Plan.Rows); share > in.MaxFail {
		return out, fmt.Errorf("%d of %d rows failed, more than the share of %.3g allowed; see %serrors/", m.Failed, in.Plan.Rows, in.MaxFail, in.Plan.Output)
	}
	return out, nil
}

// scoreParts keeps a window of partitions under way until all are done.
func scoreParts(ctx workflow.Context, in *BatchScoreInput) error {
	var data *activities.Data
	var runs *activities.Runs
	selector := workflow.NewSelector(ctx)
	var failure error
	next, flying, turn := len(in.Done), 0, 0
	for len(in.Done) < in.Plan.Partitions && failure == nil {
		for ; flying < batchWindow && next < in.Plan.Partitions && turn < batchTurn; next++ {
			f := workflow.ExecuteActivity(dataOptions(ctx), data.ScorePartition, activities.PartitionInput{Plan: *in.Plan, Index: next})
			selector.AddFuture(f, func(f workflow.Future) {
				var part activities.PartitionResult
				if err := f.Get(ctx, &part); err != nil {
					failure = err
				}
				in.Done = append(in.Done, part)
				flying--
			})
			flying++
			turn++
		}
		if flying == 0 {
			return workflow.NewContinueAsNewError(ctx, BatchScoreName, *in)
		}
		selector.Select(ctx)
		if len(in.Done)%16 == 0 {
			note := activities.NoteRunInput{RunID: in.RunID, Phase: fmt.Sprintf("scored %d of %d partitions", len(in.Done), in.Plan.Partitions), Progress: float64(len(in.Done)) / float64(in.Plan.Partitions)}
			if err := workflow.ExecuteActivity(quick(ctx), runs.NoteRun, note).Get(ctx, nil); err != nil {
				return err
			}
		}
	}
	return failure
}

// scheduledTime is the time a schedule meant, also in a backfill; now for a run that a person started.
func scheduledTime(ctx workflow.Context) time.Time {
	if t, ok := workflow.GetTypedSearchAttributes(ctx).GetTime(scheduledStart); ok {
		return t
	}
	return workflow.Now(ctx)
}
