package workflows

import (
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/registry"
)

// Register registers every workflow under its name.
func Register(w worker.WorkflowRegistry) {
	for name, f := range map[string]any{
		RegisterVersionName: RegisterVersion,
		RolloutName:         Rollout,
		WatchName:           Watch,
		BatchScoreName:      BatchScore,
		DriftCheckName:      DriftCheck,
		RetrainPolicyName:   RetrainPolicy,
		RetrainName:         Retrain,
		RetentionName:       Retention,
	} {
		w.RegisterWorkflowWithOptions(f, workflow.RegisterOptions{Name: name})
	}
}

// Attributes are the search attributes of a run's workflow.
func Attributes(kind registry.RunKind, model string, version int, actor, run string) temporal.SearchAttributes {
	return temporal.NewSearchAttributes(
		KindAttribute.ValueSet(string(kind)), ModelAttribute.ValueSet(model), VersionAttribute.ValueSet(int64(version)),
		ActorAttribute.ValueSet(actor), RunAttribute.ValueSet(run),
	)
}
