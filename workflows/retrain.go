package workflows

import (
	"encoding/json"
	"fmt"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// RetrainName is the registered name.
const RetrainName = "Retrain"

// RetrainID returns the workflow id.
func RetrainID(model string, n int) string { return fmt.Sprintf("retrain/%s/%d", model, n) }

// RetrainInput says what to train again and why.
type RetrainInput struct {
	Model   string                    `json:"model"`
	Trigger activities.RetrainTrigger `json:"trigger"`
	Policy  registry.RetrainPolicy    `json:"policy"`
}

// RetrainResult says how it came out.
type RetrainResult struct {
	Version int              `json:"version"`
	Outcome registry.Outcome `json:"outcome"` // of the roll-out; REJECTED when the challenger was no better
	Message string           `json:"message"`
}

// trainOptions: a trainer takes as long as its own limit says, and is tried once more when the machine dies.
func trainOptions(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		TaskQueue: TrainQueue, StartToCloseTimeout: 24 * time.Hour, HeartbeatTimeout: 30 * time.Second,
		RetryPolicy: &temporal.RetryPolicy{InitialInterval: time.Second, MaximumAttempts: 2},
	})
}

// Retrain freezes labelled data, trains a challenger, registers it, compares it with the champion on the same held-out
// rows, and rolls it out only if it is better.
func Retrain(ctx workflow.Context, in RetrainInput) (RetrainResult, error) {
	var runs *activities.Runs
	id := ""
	if err := begin(ctx, &id, registry.Run{Kind: registry.KindRetrain, Model: in.Model, Actor: "retrain-policy"}, "freezing data"); err != nil {
		return RetrainResult{}, err
	}
	end := activities.EndRunInput{RunID: id, State: registry.RunSucceeded, Result: &activities.RunResult{}}
	out, err := retrain(ctx, id, in, end.Result)
	end.Outcome, end.Message = out.Outcome, out.Message
	if err != nil {
		end.State, end.Message = registry.RunFailed, activities.Reason(err)
	}
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	if ended := workflow.ExecuteActivity(quick(last), runs.EndRun, end).Get(last, nil); err == nil {
		err = ended
	}
	return out, err
}

func retrain(ctx workflow.Context, id string, in RetrainInput, result *activities.RunResult) (RetrainResult, error) {
	var data *activities.Data
	var training *activities.Training
	var runs *activities.Runs
	var snapshot activities.Snapshot
	if err := workflow.ExecuteActivity(dataOptions(ctx), data.SnapshotLabelled, activities.SnapshotInput{RunID: id, Model: in.Model, Policy: in.Policy}).Get(ctx, &snapshot); err != nil {
		return RetrainResult{}, err
	}
	note := activities.NoteRunInput{RunID: id, Phase: fmt.Sprintf("training on %d rows", snapshot.TrainRows), Progress: 0.2}
	if err := workflow.ExecuteActivity(quick(ctx), runs.NoteRun, note).Get(ctx, nil); err != nil {
		return RetrainResult{}, err
	}
	var trained activities.RunTrainerResult
	if err := workflow.ExecuteActivity(trainOptions(ctx), training.RunTrainer, activities.RunTrainerInput{
		RunID: id, Trainer: in.Policy.Trainer, Data: snapshot.Train, LabelColumn: in.Policy.LabelColumn,
	}).Get(ctx, &trained); err != nil {
		return RetrainResult{}, err
	}
	challenger, err := registerChallenger(ctx, id, in.Model, trained.Files, snapshot.Train)
	if err != nil {
		return RetrainResult{}, err
	}
	var compared activities.CompareResult
	if err := workflow.ExecuteActivity(dataOptions(ctx), data.CompareChallenger, activities.CompareInput{
		RunID: id, Model: in.Model, Challenger: challenger, Holdout: snapshot.Holdout, Policy: in.Policy,
	}).Get(ctx, &compared); err != nil {
		return RetrainResult{Version: challenger}, err
	}
	result.Version, result.Champion, result.Challenge, result.Rows = challenger, compared.Champion, compared.Challenger, int64(compared.Rows)
	if !compared.Better {
		return RetrainResult{Version: challenger, Outcome: registry.Rejected, Message: "not better: " + compared.Reason}, nil
	}
	return offer(ctx, id, in, challenger, compared.Reason)
}

func registerChallenger(ctx workflow.Context, id, model string, files []registry.File, train string) (int, error) {
	var training *activities.Training
	var made activities.CreateChallengerResult
	if err := workflow.ExecuteActivity(quick(ctx), training.CreateChallenger, activities.CreateChallengerInput{
		RunID: id, Model: model, Files: files, Train: train, Actor: "run/" + id,
	}).Get(ctx, &made); err != nil {
		return 0, err
	}
	child := workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{
		WorkflowID: RegisterVersionID(model, made.Version), WorkflowIDReusePolicy: enums.WORKFLOW_ID_REUSE_POLICY_ALLOW_DUPLICATE,
		TypedSearchAttributes: Attributes(registry.KindRegister, model, made.Version, "run/"+id, made.RunID),
	})
	var registered RegisterVersionResult
	in := RegisterVersionInput{RunID: made.RunID, Model: model, Version: made.Version}
	if err := workflow.ExecuteChildWorkflow(child, RegisterVersionName, in).Get(ctx, &registered); err != nil {
		return 0, err
	}
	if registered.Status != registry.Ready {
		return 0, fmt.Errorf("the challenger was not registered: %s", registered.Reason)
	}
	return made.Version, nil
}

// offer rolls the challenger out as the model's policy says, and waits for the end.
func offer(ctx workflow.Context, id string, in RetrainInput, version int, why string) (RetrainResult, error) {
	var training *activities.Training
	rollout := RolloutInput{
		RunID: id + "-rollout", Model: in.Model, Candidate: version, Actor: "run/" + id, Reason: why, ContinueAfter: ContinueAfter,
	}
	if err := workflow.ExecuteActivity(quick(ctx), training.PlanChallenger, activities.PlanChallengerInput{
		Model: in.Model, RequireApproval: in.Policy.RequireApproval,
	}).Get(ctx, &rollout.Plan); err != nil {
		return RetrainResult{Version: version}, err
	}
	raw, err := encodeInput(rollout)
	if err != nil {
		return RetrainResult{Version: version}, err
	}
	if err := workflow.ExecuteActivity(quick(ctx), training.InsertRollout, activities.InsertRolloutInput{Run: registry.Run{
		ID: rollout.RunID, Parent: id, Kind: registry.KindRollout, Model: in.Model, Version: version, WorkflowID: RolloutID(in.Model),
		Lock: RolloutID(in.Model), Input: raw, Actor: rollout.Actor,
	}}).Get(ctx, nil); err != nil {
		return RetrainResult{Version: version}, err
	}
	child := workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{
		WorkflowID: RolloutID(in.Model), ParentClosePolicy: enums.PARENT_CLOSE_POLICY_ABANDON,
		WorkflowIDReusePolicy: enums.WORKFLOW_ID_REUSE_POLICY_ALLOW_DUPLICATE,
		TypedSearchAttributes: Attributes(registry.KindRollout, in.Model, version, rollout.Actor, rollout.RunID),
	})
	var done RolloutResult
	if err := workflow.ExecuteChildWorkflow(child, RolloutName, rollout).Get(ctx, &done); err != nil {
		return RetrainResult{Version: version}, err
	}
	return RetrainResult{Version: version, Outcome: done.Outcome, Message: why + "; " + done.Message}, nil
}

// encodeInput writes a plain struct; encoding/json is deterministic for structs, which workflowcheck cannot see.
//
//workflowcheck:ignore
func encodeInput(v any) (json.RawMessage, error) { return json.Marshal(v) }
