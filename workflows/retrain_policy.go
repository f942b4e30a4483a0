package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// RetrainPolicyName is the registered name.
const RetrainPolicyName = "RetrainPolicy"

// RetrainPolicyID returns the workflow id: one policy per model.
func RetrainPolicyID(model string) string { return "retrain-policy/" + model }

// RetrainSignal carries a trigger.
const RetrainSignal = "trigger"

// RetrainPolicyInput is a policy's state: it continues as new with it.
type RetrainPolicyInput struct {
	Model   string      `json:"model"`
	Seq     int         `json:"seq"`     // triggers seen
	Number  int         `json:"number"`  // retrainings started
	Started []time.Time `json:"started"` // the latest of them
}

const (
	policyTurn = 50  // triggers before the history is begun anew
	keepStarts = 100 // retrainings that are remembered for the budget
)

// TriggerInput is what tells a model's policy of a trigger, starting it if need be.
func TriggerInput(model string, t activities.RetrainTrigger) activities.TriggerRetrainInput {
	return activities.TriggerRetrainInput{
		Model: model, Trigger: t, WorkflowID: RetrainPolicyID(model), Workflow: RetrainPolicyName, Signal: RetrainSignal,
		Queue: LifecycleQueue, Input: RetrainPolicyInput{Model: model},
	}
}

// RetrainPolicy is a model's long-lived policy: it takes triggers one at a time, decides on each, and runs at most one
// retraining at once. Triggers that come meanwhile wait, and are then mostly suppressed by the cool-down.
func RetrainPolicy(ctx workflow.Context, in RetrainPolicyInput) error {
	var training *activities.Training
	run := workflow.GetInfo(ctx).FirstRunID
	if in.Seq == 0 {
		id := ""
		if err := begin(ctx, &id, registry.Run{Kind: registry.KindRetrainPolicy, Model: in.Model, Actor: "policy"}, "waiting for triggers"); err != nil {
			return err
		}
	}
	signals := workflow.GetSignalChannel(ctx, RetrainSignal)
	for turn := 0; turn < policyTurn || signals.Len() > 0; turn++ {
		var trigger activities.RetrainTrigger
		signals.Receive(ctx, &trigger)
		if err := ctx.Err(); err != nil {
			return err
		}
		in.Seq++
		var decision activities.DecideRetrainResult
		if err := workflow.ExecuteActivity(quick(ctx), training.DecideRetrain, activities.DecideRetrainInput{
			PolicyRun: run, Seq: in.Seq, Model: in.Model, Trigger: trigger, Started: in.Started, Now: workflow.Now(ctx),
		}).Get(ctx, &decision); err != nil {
			return err
		}
		workflow.SetCurrentDetails(ctx, fmt.Sprintf("last trigger (%s): %s", trigger.Source, decision.Reason))
		if decision.Go {
			in.Number++
			in.Started = append(in.Started, workflow.Now(ctx))
			in.Started = in.Started[max(0, len(in.Started)-keepStarts):]
			runRetrain(ctx, in, trigger, decision.Policy)
		}
	}
	return workflow.NewContinueAsNewError(ctx, RetrainPolicyName, in)
}

// runRetrain runs one retraining to its end. Its failure is its run's, not the policy's.
func runRetrain(ctx workflow.Context, in RetrainPolicyInput, t activities.RetrainTrigger, p registry.RetrainPolicy) {
	child := workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{
		WorkflowID:            RetrainID(in.Model, in.Number),
		TypedSearchAttributes: Attributes(registry.KindRetrain, in.Model, 0, "policy", ""),
	})
	var out RetrainResult
	if err := workflow.ExecuteChildWorkflow(child, RetrainName, RetrainInput{Model: in.Model, Trigger: t, Policy: p}).Get(ctx, &out); err != nil {
		workflow.GetLogger(ctx).Warn("retraining failed", "model", in.Model, "error", err)
	}
}

// ManualTrigger is what a person sends to a model's policy: workflow id, signal, its argument, workflow and its input.
func ManualTrigger(model, actor, reason string) (id, signal string, trigger any, name string, in RetrainPolicyInput) {
	t := activities.RetrainTrigger{Source: "manual", Reason: "asked for by " + actor + ": " + reason}
	return RetrainPolicyID(model), RetrainSignal, t, RetrainPolicyName, RetrainPolicyInput{Model: model}
}
