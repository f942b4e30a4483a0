package activities

import (
	"context"

	"github.com/orrery-ml/orrery/registry"
)

// BuildBaselineInput names the version and what was derived of it so far.
type BuildBaselineInput struct {
	Model   string           `json:"model"`
	Version int              `json:"version"`
	Derived registry.Derived `json:"derived"`
}

// BuildBaselineResult is the baseline's digest and the features it names.
type BuildBaselineResult struct {
	Baseline string   `json:"baseline"`
	Features []string `json:"features,omitempty"`
}

// BuildBaseline summarises the training data.
func (a *Models) BuildBaseline(_ context.Context, in BuildBaselineInput) (BuildBaselineResult, error) {
	return BuildBaselineResult{}, Fault(registry.Errorf(registry.Unsupported, "no baseline for %s", in.Model))
}
