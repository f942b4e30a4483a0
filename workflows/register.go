package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// RegisterVersionName is the registered name.
const RegisterVersionName = "RegisterVersion"

// RegisterVersionID returns the workflow id.
func RegisterVersionID(model string, version int) string {
	return fmt.Sprintf("register/%s/%d", model, version)
}

// RegisterVersionInput names the PENDING version.
type RegisterVersionInput struct {
	RunID   string `json:"run_id"`
	Model   string `json:"model"`
	Version int    `json:"version"`
}

// RegisterVersionResult says how it came out.
type RegisterVersionResult struct {
	Status registry.Status `json:"status"`
	Reason string          `json:"reason,omitempty"`
}

// tryOptions: three tries, because the orchestrator may die of something else while a model is tried; a model that is
// no good is not tried again.
func tryOptions(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		StartToCloseTimeout: time.Hour, HeartbeatTimeout: 15 * time.Second,
		RetryPolicy: &temporal.RetryPolicy{InitialInterval: time.Second, BackoffCoefficient: 2, MaximumAttempts: 3},
	})
}

// RegisterVersion tries a version in a process of its own and makes it READY or FAILED.
func RegisterVersion(ctx workflow.Context, in RegisterVersionInput) (RegisterVersionResult, error) {
	var runs *activities.Runs
	var models *activities.Models
	var data *activities.Data
	if err := workflow.ExecuteActivity(quick(ctx), runs.BeginRun, activities.BeginRunInput{RunID: in.RunID, Phase: "trying the model"}).Get(ctx, nil); err != nil {
		return RegisterVersionResult{}, err
	}
	finish := activities.FinishVersionInput{Model: in.Model, Version: in.Version}
	var tried activities.TryVersionResult
	err := workflow.ExecuteActivity(tryOptions(ctx), models.TryVersion, activities.TryVersionInput{Model: in.Model, Version: in.Version}).Get(ctx, &tried)
	if err == nil && tried.Derived.Documents.TrainingData != "" {
		var built activities.BuildBaselineResult
		err = workflow.ExecuteActivity(dataOptions(ctx), data.BuildBaseline, activities.BuildBaselineInput{
			Model: in.Model, Version: in.Version, Derived: tried.Derived,
		}).Get(ctx, &built)
		tried.Derived.Documents.Baseline = built.Baseline
	}
	end := activities.EndRunInput{RunID: in.RunID, State: registry.RunSucceeded, Message: fmt.Sprintf("version %d is ready", in.Version)}
	finish.Derived = tried.Derived
	out := RegisterVersionResult{Status: registry.Ready}
	if err != nil {
		finish.Failed = activities.Reason(err)
		end.State, end.Message = registry.RunFailed, finish.Failed
		out = RegisterVersionResult{Status: registry.Failed, Reason: finish.Failed}
	}
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	if err := workflow.ExecuteActivity(quick(last), models.FinishVersion, finish).Get(last, nil); err != nil {
		return out, err
	}
	return out, workflow.ExecuteActivity(quick(last), runs.EndRun, end).Get(last, nil)
}

// dataOptions are for activities that read data: on the data queue, long, heartbeating.
func dataOptions(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		TaskQueue: DataQueue, StartToCloseTimeout: 6 * time.Hour, HeartbeatTimeout: 20 * time.Second,
		RetryPolicy: &temporal.RetryPolicy{InitialInterval: time.Second, BackoffCoefficient: 2, MaximumInterval: time.Minute, MaximumAttempts: 10},
	})
}
