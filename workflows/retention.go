package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/registry"
)

// RetentionName is the registered name.
const RetentionName = "Retention"

// RetentionID is the workflow id; the schedule appends its time. RetentionScheduleID is the schedule's.
const (
	RetentionID         = "retention"
	RetentionScheduleID = "orrery/retention"
)

// RetentionInput says what to keep; the schedule carries it.
type RetentionInput struct {
	KeepChampions int   `json:"keep_champions"`
	ArchiveDays   int64 `json:"archive_days"`
	GraceHours    int64 `json:"grace_hours"`
	StrataDays    int64 `json:"strata_days"`
}

// DefaultRetention keeps the last five champions, unneeded versions for 30 days, unreferenced blobs for a day and
// strata for a week.
func DefaultRetention() RetentionInput {
	return RetentionInput{KeepChampions: 5, ArchiveDays: 30, GraceHours: 24, StrataDays: 7}
}

// Retention archives and deletes what no alias, route, run, rollback window or "last K champions" needs.
func Retention(ctx workflow.Context, in RetentionInput) (activities.SweepResult, error) {
	var retention *activities.Retention
	var runs *activities.Runs
	id := ""
	if err := begin(ctx, &id, registry.Run{Kind: registry.KindRetention}, "sweeping"); err != nil {
		return activities.SweepResult{}, err
	}
	const day = 24 * time.Hour
	var out activities.SweepResult
	err := workflow.ExecuteActivity(waiting(ctx), retention.Sweep, activities.SweepInput{
		RunID: id, KeepChampions: in.KeepChampions, ArchiveAfter: time.Duration(in.ArchiveDays) * day,
		Grace: time.Duration(in.GraceHours) * time.Hour, KeepStrata: time.Duration(in.StrataDays) * day,
	}).Get(ctx, &out)
	end := activities.EndRunInput{RunID: id, State: registry.RunSucceeded, Message: fmt.Sprintf(
		"%d versions archived, %d files of records, %d blobs and %d strata deleted", out.Archived, out.Records, out.Blobs, out.Strata)}
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
