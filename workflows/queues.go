package workflows

import (
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"
)

// Task queues, one per kind of machine.
const (
	LifecycleQueue = "orrery-lifecycle"
	DataQueue      = "orrery-data"
	TrainQueue     = "orrery-train"
)

// Search attributes of every run.
var (
	ModelAttribute   = temporal.NewSearchAttributeKeyKeyword("OrreryModel")
	VersionAttribute = temporal.NewSearchAttributeKeyInt64("OrreryVersion")
	KindAttribute    = temporal.NewSearchAttributeKeyKeyword("OrreryKind")
	ActorAttribute   = temporal.NewSearchAttributeKeyKeyword("OrreryActor")
	RunAttribute     = temporal.NewSearchAttributeKeyKeyword("OrreryRun")
)

// patient retries until the registry answers again: half an hour is longer than any restart of a database.
var patient = temporal.RetryPolicy{InitialInterval: 200 * time.Millisecond, BackoffCoefficient: 2, MaximumInterval: 10 * time.Second}

// quick is for activities that only talk to the registry.
func quick(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		StartToCloseTimeout: 20 * time.Second, ScheduleToCloseTimeout: 30 * time.Minute, RetryPolicy: &patient,
	})
}

// waiting is for activities that wait for gateways and workers; they heartbeat, so a dead orchestrator is noticed
// within ten seconds.
func waiting(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		StartToCloseTimeout: 10 * time.Minute, ScheduleToCloseTimeout: 30 * time.Minute, HeartbeatTimeout: 10 * time.Second,
		RetryPolicy: &patient,
	})
}
