package activities

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// RolloutPlan is a strategy as data: everything a roll-out does, resolved when it is asked for.
type RolloutPlan struct {
	Strategy        registry.Strategy       `json:"strategy"`
	Steps           []int                   `json:"steps,omitempty"`  // the candidate's weight in basis points, ascending, below 10000
	Shadow          int                     `json:"shadow,omitempty"` // share of requests mirrored to the candidate, in basis points
	Variants        []registry.Arm          `json:"variants,omitempty"`
	Experiment      *Experiment             `json:"experiment,omitempty"`
	Promote         bool                    `json:"promote"`          // shadow, ab: what came out well becomes the champion
	BakeSeconds     int64                   `json:"bake_seconds"`     // least time of a step
	BakeRequests    int64                   `json:"bake_requests"`    // least requests of the candidate in a step
	MaxBakeSeconds  int64                   `json:"max_bake_seconds"` // then a step is inconclusive; 0 = never
	WatchSeconds    int64                   `json:"watch_seconds"`    // after the promotion
	Holdback        int                     `json:"holdback"`         // weight the old version keeps while watched
	OnInconclusive  registry.OnInconclusive `json:"on_inconclusive"`
	Approvals       int                     `json:"approvals"` // people who must approve
	ApproveBefore   string                  `json:"approve_before"`
	ApprovalSeconds int64                   `json:"approval_seconds"` // then it is rejected; 0 = waits for ever
	FourEyes        bool                    `json:"four_eyes"`
	Urgent          bool                    `json:"urgent"` // does not wait for windows or the end of a freeze
	Judge           monitor.JudgeConfig     `json:"judge"`
}

// Experiment is how an A/B test is decided.
type Experiment struct {
	Goal         monitor.Goal `json:"goal"`
	Margin       float64      `json:"margin"`        // a variant that is certainly better by no more than this is no winner
	Bandit       bool         `json:"bandit"`        // weights follow Thompson sampling
	Floor        int          `json:"floor"`         // weight that an arm keeps under a bandit
	EverySeconds int64        `json:"every_seconds"` // between two allocations of a bandit
}

// RolloutRequest is what somebody asks for; nil and empty fields are the model's policy.
type RolloutRequest struct {
	Strategy        registry.Strategy
	Steps           []float64 // percents
	StepPercent     float64   // linear
	SharePercent    float64   // shadow; 0 = 100
	Variants        []VariantRequest
	Goal            monitor.Goal
	MetricMargin    float64
	Bandit          bool
	FloorPercent    float64 // 0 = 5
	EverySeconds    int64   // 0 = 15 minutes
	Promote         *bool
	BakeSeconds     *int64
	BakeRequests    *int64
	MaxBakeSeconds  *int64
	WatchSeconds    *int64
	HoldbackPercent *float64
	OnInconclusive  registry.OnInconclusive
	RequireApproval bool
	ApprovalSeconds *int64
	Urgent          bool
	Judge           json.RawMessage
}

// VariantRequest is an arm of an A/B test beside the stable one.
type VariantRequest struct {
	Version int
	Percent float64
}

const (
	defaultFloor    = 5.0
	defaultAllocate = 15 * 60
	leastAllocate   = 10
	maxVariants     = 10
)

// PlanRollout resolves a request under a model's policy. It ends in Invalid, naming what is wrong.
func PlanRollout(p registry.RolloutPolicy, r RolloutRequest) (RolloutPlan, error) {
	merged := p
	set(&merged.BakeSeconds, r.BakeSeconds)
	set(&merged.BakeRequests, r.BakeRequests)
	set(&merged.MaxBakeSeconds, r.MaxBakeSeconds)
	set(&merged.WatchSeconds, r.WatchSeconds)
	set(&merged.HoldbackPercent, r.HoldbackPercent)
	set(&merged.ApprovalSeconds, r.ApprovalSeconds)
	if r.OnInconclusive != "" {
		merged.OnInconclusive = r.OnInconclusive
	}
	if r.RequireApproval {
		merged.Approvals = max(merged.Approvals, 1)
	}
	if err := merged.Validate(); err != nil {
		return RolloutPlan{}, err
	}
	out := RolloutPlan{
		Strategy: p.Strategy, BakeSeconds: merged.BakeSeconds, BakeRequests: merged.BakeRequests, MaxBakeSeconds: merged.MaxBakeSeconds,
		WatchSeconds: merged.WatchSeconds, Holdback: points(merged.HoldbackPercent), OnInconclusive: merged.OnInconclusive,
		Approvals: merged.Approvals, ApproveBefore: merged.ApproveBefore, ApprovalSeconds: merged.ApprovalSeconds, FourEyes: merged.FourEyes,
		Urgent: r.Urgent, Promote: true,
	}
	if r.Strategy != "" {
		out.Strategy = r.Strategy
	}
	var err error
	var own json.RawMessage
	if out.Strategy == registry.AB { // variants are there to answer differently
		own = json.RawMessage(`{"output_margin": 1}`)
	}
	if out.Judge, err = ReadJudge(own, p.Judge, r.Judge); err != nil {
		return out, err
	}
	return out, out.arrange(p, r)
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

func points(percent float64) int { return int(math.Round(percent * 100)) }

// ReadJudge lays thresholds over the defaults, one after the other.
func ReadJudge(layers ...json.RawMessage) (monitor.JudgeConfig, error) {
	c := monitor.DefaultJudge()
	for _, raw := range layers {
		if len(raw) == 0 || string(raw) == "null" {
			continue
		}
		d := json.NewDecoder(bytes.NewReader(raw))
		d.DisallowUnknownFields()
		if err := d.Decode(&c); err != nil {
			return c, registry.Errorf(registry.Invalid, "judge: %w", err)
		}
	}
	if err := c.Validate(); err != nil {
		return c, registry.Errorf(registry.Invalid, "judge: %w", err)
	}
	return c, nil
}

// arrange fills in what is the strategy's own.
func (p *RolloutPlan) arrange(policy registry.RolloutPolicy, r RolloutRequest) error {
	switch p.Strategy {
	case registry.AllAtOnce, registry.BlueGreen:
		if len(r.Steps) > 0 {
			return registry.Errorf(registry.Invalid, "%s has no steps", p.Strategy)
		}
		if p.Strategy == registry.BlueGreen && p.WatchSeconds == 0 {
			return registry.Errorf(registry.Invalid, "blue_green keeps the old version while it watches: set watch_seconds")
		}
		return nil
	case registry.Canary:
		return p.canary(policy, r)
	case registry.Steps:
		if len(r.Steps) == 0 {
			return p.climb(policy.Steps)
		}
		return p.climb(r.Steps)
	case registry.Linear:
		if r.StepPercent <= 0 || r.StepPercent >= 100 {
			return registry.Errorf(registry.Invalid, "step_percent %v: want between 0 and 100", r.StepPercent)
		}
		var percents []float64
		for at := r.StepPercent; at < 99.999; at += r.StepPercent {
			percents = append(percents, at)
		}
		return p.climb(percents)
	case registry.ShadowRun:
		return p.shadow(r)
	case registry.AB:
		return p.experiment(r)
	}
	return registry.Errorf(registry.Invalid, "strategy %q: want one of %v", p.Strategy, registry.Strategies)
}

// canary has one step: the one asked for, the policy's first, or ten percent.
func (p *RolloutPlan) canary(policy registry.RolloutPolicy, r RolloutRequest) error {
	switch {
	case len(r.Steps) > 1:
		return registry.Errorf(registry.Invalid, "canary has one step; use the strategy steps")
	case len(r.Steps) == 1:
		return p.climb(r.Steps)
	case len(policy.Steps) > 0:
		return p.climb(policy.Steps[:1])
	}
	return p.climb([]float64{10})
}

// climb makes the steps out of percents.
func (p *RolloutPlan) climb(percents []float64) error {
	if len(percents) == 0 {
		return registry.Errorf(registry.Invalid, "strategy steps needs steps, such as [1, 5, 25, 50]")
	}
	for _, percent := range percents {
		at := points(percent)
		if at < 1 || at >= registry.FullWeight {
			return registry.Errorf(registry.Invalid, "step %v %%: want at least 0.01 and less than 100", percent)
		}
		p.Steps = append(p.Steps, at)
	}
	if !slices.IsSorted(p.Steps) {
		return registry.Errorf(registry.Invalid, "steps must ascend, got %v", percents)
	}
	return nil
}

func (p *RolloutPlan) shadow(r RolloutRequest) error {
	share := r.SharePercent
	if share == 0 {
		share = 100
	}
	if share < 0.01 || share > 100 {
		return registry.Errorf(registry.Invalid, "share_percent %v: want 0.01 to 100", share)
	}
	p.Shadow, p.Promote = points(share), false
	set(&p.Promote, r.Promote)
	return nil
}

func (p *RolloutPlan) experiment(r RolloutRequest) error {
	if len(r.Variants) == 0 || len(r.Variants) > maxVariants {
		return registry.Errorf(registry.Invalid, "ab needs 1 to %d variants, such as [{version: 2, percent: 50}]", maxVariants)
	}
	total := 0
	for _, v := range r.Variants {
		weight := points(v.Percent)
		if weight < 1 {
			return registry.Errorf(registry.Invalid, "variant %d has %v %%: want at least 0.01", v.Version, v.Percent)
		}
		total += weight
		if slices.ContainsFunc(p.Variants, func(a registry.Arm) bool { return a.Version == v.Version }) {
			return registry.Errorf(registry.Invalid, "variant %d is named twice", v.Version)
		}
		p.Variants = append(p.Variants, registry.Arm{Version: v.Version, Role: registry.Variant, Weight: weight})
	}
	floor := r.FloorPercent
	if floor == 0 {
		floor = defaultFloor
	}
	p.Experiment = &Experiment{Goal: r.Goal, Margin: r.MetricMargin, Bandit: r.Bandit, Floor: points(floor), EverySeconds: r.EverySeconds}
	if p.Experiment.Goal == "" {
		p.Experiment.Goal = monitor.Higher
	}
	if p.Experiment.EverySeconds == 0 {
		p.Experiment.EverySeconds = defaultAllocate
	}
	p.Promote = false
	set(&p.Promote, r.Promote)
	var fault string
	switch {
	case total >= registry.FullWeight:
		fault = fmt.Sprintf("variants take %.4g %%: leave some for the stable version", float64(total)/100)
	case p.Experiment.Goal != monitor.Higher && p.Experiment.Goal != monitor.Lower:
		fault = fmt.Sprintf("goal %q: want higher or lower", r.Goal)
	case r.MetricMargin < 0:
		fault = fmt.Sprintf("metric_margin %v: want 0 or more", r.MetricMargin)
	case floor < 0.01 || floor*float64(len(r.Variants)+1) > 100:
		fault = fmt.Sprintf("floor_percent %v: want at least 0.01 and at most an equal share", floor)
	case p.Experiment.EverySeconds < leastAllocate:
		fault = fmt.Sprintf("every_seconds %d: want at least %d", p.Experiment.EverySeconds, leastAllocate)
	default:
		return nil
	}
	return registry.Errorf(registry.Invalid, "%s", fault)
}
