package activities

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// PreflightInput asks whether a roll-out can begin.
type PreflightInput struct {
	RunID     string      `json:"run_id"`
	Model     string      `json:"model"`
	Candidate int         `json:"candidate"`
	Plan      RolloutPlan `json:"plan"`
}

// PreflightResult is the state a roll-out starts from.
type PreflightResult struct {
	Route          registry.Route      `json:"route"`
	Judge          monitor.JudgeConfig `json:"judge"`           // with the model's guardrails filled in
	Began          time.Time           `json:"began"`           //
	PerMinute      float64             `json:"per_minute"`      // requests lately; 0 = none
	BaseErrors     float64             `json:"base_errors"`     // error rate of the stable arm lately, or what is assumed
	DetectableOdds float64             `json:"detectable_odds"` // smallest odds ratio of errors the bake can see; 0 = none
	Warnings       []string            `json:"warnings,omitempty"`
	Gate           Gate                `json:"gate,omitzero"`
	Warm           bool                `json:"warm"` // the candidates are loaded already
}

// Back returns the arms of the route that a roll-out which did not promote leaves behind.
func (p PreflightResult) Back() []registry.Arm { return registry.StableOnly(p.Route.StableVersion()) }

// Gate says that traffic may not move to a candidate yet; the zero gate is open.
type Gate struct {
	Opens time.Time `json:"opens"`
	Why   string    `json:"why"`
}

const (
	assumedErrorRate = 0.01             // of the stable arm, when it has had no traffic
	leastErrorRate   = 0.001            // a stable arm without errors is taken to have this rate
	recentTraffic    = 10 * time.Minute // that preflight expects to go on
)

// Preflight checks that the candidate can take the stable version's place, captures the route to go back to and says
// what the bake will be able to see.
func (a *Traffic) Preflight(ctx context.Context, in PreflightInput) (PreflightResult, error) {
	phase := "preflight"
	noted := a.noteRun(ctx, noteAfter, registry.RunUpdate{ID: in.RunID, State: registry.RunRunning, Phase: &phase})
	out, err := a.preflight(ctx, in)
	return out, Fault(errors.Join(err, noted()))
}

func (a *Traffic) preflight(ctx context.Context, in PreflightInput) (PreflightResult, error) {
	run, err := a.store.Run(ctx, in.RunID)
	if err != nil {
		return PreflightResult{}, err
	}
	if run.State.Ended() { // it was aborted while it was started
		return PreflightResult{}, registry.Errorf(registry.Precondition, "run %s ended before it began: %s", run.ID, run.Message)
	}
	model, err := a.store.Model(ctx, in.Model)
	if err != nil {
		return PreflightResult{}, err
	}
	route, err := a.store.Route(ctx, in.Model)
	if err != nil {
		return PreflightResult{}, err
	}
	candidates := []int{in.Candidate}
	if in.Plan.Experiment != nil {
		candidates = nil
		for _, v := range in.Plan.Variants {
			candidates = append(candidates, v.Version)
		}
	}
	if err := a.checkCandidates(ctx, in.RunID, route, candidates); err != nil {
		return PreflightResult{}, err
	}
	if route.StableVersion() == 0 && in.Plan.Strategy != registry.AllAtOnce && (in.Plan.Experiment != nil || in.Plan.Shadow > 0) {
		return PreflightResult{}, registry.Errorf(registry.Precondition, "model %s has no stable version to compare with: promote one first", in.Model)
	}
	if in.Plan.Judge.MaxLossGain > 0 && model.Config.Recording != registry.RecordRows {
		return PreflightResult{}, registry.Errorf(registry.Precondition, "labels are joined with inference records, and %s keeps none: set recording=rows, or max_loss_gain=0", in.Model)
	}
	out := PreflightResult{Route: route, Judge: in.Plan.Judge, Began: time.Now().UTC()}
	if !in.Plan.Urgent {
		out.Gate = gateOf(model, out.Began)
	}
	if out.Judge.MaxErrorRate == 0 {
		out.Judge.MaxErrorRate = model.Config.ErrorRateLimit
	}
	if out.Judge.MaxP99Millis == 0 {
		out.Judge.MaxP99Millis = model.Config.P99Millis
	}
	if in.Plan.Shadow > 0 { // mirrored requests yield to all others, so their durations say nothing
		out.Judge.MaxP99Millis, out.Judge.LatencyMargin = 0, 0.999
	}
	out.Warm = true
	for _, candidate := range candidates {
		warm, err := a.isWarm(ctx, model, candidate)
		out.Warm = out.Warm && warm && err == nil // what cannot be loaded is found out when it is to be warmed
	}
	return out, a.forecast(ctx, in, &out)
}

// forecast works out what the bake can see of the traffic there has been lately.
func (a *Traffic) forecast(ctx context.Context, in PreflightInput, out *PreflightResult) error {
	if len(in.Plan.Steps) == 0 {
		return nil
	}
	strata, err := a.store.Strata(ctx, registry.StrataFilter{Model: in.Model, Since: out.Began.Add(-recentTraffic)})
	if err != nil {
		return err
	}
	requests, failed, first := 0.0, 0.0, out.Began
	for _, s := range strata {
		requests += float64(s.Requests)
		failed += float64(s.Errors)
		if s.Start.Before(first) {
			first = s.Start
		}
	}
	out.BaseErrors = assumedErrorRate
	if requests > 0 {
		out.PerMinute = requests / max(out.Began.Sub(first).Minutes(), 1)
		out.BaseErrors = min(max(failed/requests, leastErrorRate), 0.5)
	}
	var steps []monitor.Expected
	for _, weight := range in.Plan.Steps {
		share := float64(weight) / registry.FullWeight
		n := max(out.PerMinute*float64(in.Plan.BakeSeconds)/60*share, float64(in.Plan.BakeRequests))
		steps = append(steps, monitor.Expected{Candidate: n, Stable: n / share * (1 - share)})
	}
	if len(steps) == 0 || steps[0].Candidate == 0 {
		return nil
	}
	out.DetectableOdds = monitor.DetectableOddsRatio(out.Judge, steps, out.BaseErrors)
	switch {
	case out.DetectableOdds == 0:
		out.Warnings = append(out.Warnings, fmt.Sprintf("with this traffic the bake can see no regression of a %.2g %% error rate, however large: bake longer", 100*out.BaseErrors))
	case out.DetectableOdds > 2:
		out.Warnings = append(out.Warnings, fmt.Sprintf("with this traffic the bake cannot see a doubling of a %.2g %% error rate; it sees %.1f times as many errors", 100*out.BaseErrors, out.DetectableOdds))
	}
	return nil
}

// checkCandidates ends in an error unless every candidate can take the place of the stable version.
func (a *Traffic) checkCandidates(ctx context.Context, run string, route registry.Route, candidates []int) error {
	stable, wanted := route.StableVersion(), candidates
	if stable != 0 {
		wanted = append(slices.Clone(candidates), stable)
	}
	versions, err := a.store.PickVersions(ctx, route.Model, wanted...)
	if err != nil {
		return err
	}
	for _, n := range candidates {
		v := versions[n]
		if v.Status != registry.Ready {
			return registry.Errorf(registry.Precondition, "version %d of %s is %s, not READY", n, route.Model, v.Status)
		}
		if route.Owner != "" && route.Owner != run {
			return registry.Errorf(registry.Conflict, "the route of %s is owned by run %s", route.Model, route.Owner)
		}
		if stable == n && len(route.Arms) == 1 {
			return registry.Errorf(registry.Precondition, "version %d of %s has all the traffic already", n, route.Model)
		}
		if stable == 0 {
			continue
		}
		if err := versions[stable].Signature.Compatible(v.Signature); err != nil {
			return registry.Errorf(registry.Invalid, "version %d cannot take the place of version %d: %w", n, stable, err)
		}
	}
	return nil
}

// LookAtGate says whether a model's policy lets traffic move to a candidate now.
func (a *Traffic) LookAtGate(ctx context.Context, model string) (Gate, error) {
	m, err := a.store.Model(ctx, model)
	if err != nil {
		return Gate{}, Fault(err)
	}
	return gateOf(m, time.Now()), nil
}

func gateOf(m registry.Model, now time.Time) (g Gate) {
	g.Opens, g.Why = m.Rollout.Open(now)
	return g
}
