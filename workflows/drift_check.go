package workflows

import (
	"fmt"
	"strings"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// DriftCheckName is the registered name.
const DriftCheckName = "DriftCheck"

// DriftCheckID returns the workflow id of a check that a person started; a schedule appends its time.
func DriftCheckID(model, window string) string { return "drift/" + model + "/" + window }

// scheduledStart is set by Temporal on what a schedule starts.
var scheduledStart = temporal.NewSearchAttributeKeyTime("TemporalScheduledStartTime")

// DriftCheckInput says which window to look at: the WindowSeconds before Until, or before the scheduled time when
// Until is not set.
type DriftCheckInput struct {
	RunID         string              `json:"run_id"`
	Model         string              `json:"model"`
	Until         time.Time           `json:"until"`
	WindowSeconds int64               `json:"window_seconds"`
	Config        monitor.DriftConfig `json:"config"`
	Actor         string              `json:"actor"`
}

// DriftCheck compares a window of the champion's traffic with its baseline and tells the retrain policy when it drifts.
func DriftCheck(ctx workflow.Context, in DriftCheckInput) (activities.CompareWindowResult, error) {
	var out activities.CompareWindowResult
	if err := begin(ctx, &in.RunID, registry.Run{Kind: registry.KindDrift, Model: in.Model, Actor: in.Actor}, "comparing"); err != nil {
		return out, err
	}
	if in.Until.IsZero() {
		in.Until = scheduledTime(ctx)
	}
	var data *activities.Data
	err := workflow.ExecuteActivity(dataOptions(ctx), data.CompareWindow, activities.CompareWindowInput{
		RunID: in.RunID, Model: in.Model, From: in.Until.Add(-time.Duration(in.WindowSeconds) * time.Second), To: in.Until, Config: in.Config,
	}).Get(ctx, &out)
	if err == nil && out.Status == monitor.Drift {
		err = tellPolicy(ctx, in, out)
	}
	end := activities.EndRunInput{
		RunID: in.RunID, State: registry.RunSucceeded, Outcome: registry.Outcome(out.Status), Message: driftMessage(out),
		Result: &activities.RunResult{Output: out.Report, Rows: out.Rows},
	}
	if err != nil {
		end.State, end.Outcome, end.Message = registry.RunFailed, "", activities.Reason(err)
	}
	var runs *activities.Runs
	last, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	if ended := workflow.ExecuteActivity(quick(last), runs.EndRun, end).Get(last, nil); err == nil {
		err = ended
	}
	return out, err
}

func driftMessage(r activities.CompareWindowResult) string {
	text := fmt.Sprintf("%s over %d rows; furthest off is %s (PSI %.3g)", r.Status, r.Rows, r.Worst, r.WorstPSI)
	if len(r.Drifted) > 0 {
		text += "; drifted: " + strings.Join(r.Drifted, ", ")
	}
	return text
}

// tellPolicy starts the model's retrain policy if need be and tells it of the drift.
func tellPolicy(ctx workflow.Context, in DriftCheckInput, out activities.CompareWindowResult) error {
	var training *activities.Training
	return workflow.ExecuteActivity(quick(ctx), training.TriggerRetrain, TriggerInput(in.Model, activities.RetrainTrigger{
		Source: "drift", Run: in.RunID, Share: out.Share, Reason: driftMessage(out),
	})).Get(ctx, nil)
}
