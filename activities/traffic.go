package activities

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

const (
	pollFleet   = 15 * time.Millisecond  // while waiting for gateways and workers
	pollBake    = 300 * time.Millisecond // while baking
	noteEvery   = 5 * time.Second        // evidence is stored this often, and at every verdict
	bakeSlice   = 4 * time.Minute        // a bake reports back to its workflow this often
	groupWindow = 5 * time.Second        // concurrent counts are compared in windows of this length
)

// trafficStore is the part of the registry that roll-outs work on.
type trafficStore interface {
	registry.Versions
	registry.Routes
	registry.Runs
	registry.Fleet
	registry.EvidenceLog
	Model(ctx context.Context, name string) (registry.Model, error)
}

// Traffic moves models' traffic and watches what comes of it.
type Traffic struct{ store trafficStore }

// NewTraffic makes the activities.
func NewTraffic(s trafficStore) *Traffic { return &Traffic{store: s} }

// PreflightInput asks whether a roll-out can begin.
type PreflightInput struct {
	RunID     string              `json:"run_id"`
	Model     string              `json:"model"`
	Candidate int                 `json:"candidate"`
	Judge     monitor.JudgeConfig `json:"judge"`
	Requests  int64               `json:"requests"` // expected for the candidate over all steps; 0 = not known
	FirstStep int                 `json:"first_step"`
}

// PreflightResult is the state a roll-out starts from.
type PreflightResult struct {
	Route          registry.Route      `json:"route"`
	Judge          monitor.JudgeConfig `json:"judge"`           // with the model's guardrails filled in
	DetectableOdds float64             `json:"detectable_odds"` // smallest odds ratio of errors the bake can see; 0 = none
	Warnings       []string            `json:"warnings,omitempty"`
}

// assumedErrorRate is the stable arm's error rate that preflight computes the minimum detectable effect for.
const assumedErrorRate = 0.01

// Preflight checks that the candidate can take the stable version's place and captures the route to go back to.
func (a *Traffic) Preflight(ctx context.Context, in PreflightInput) (PreflightResult, error) {
	phase := "preflight"
	if _, err := a.store.UpdateRun(ctx, registry.RunUpdate{ID: in.RunID, State: registry.RunRunning, Phase: &phase}); err != nil {
		return PreflightResult{}, Fault(err)
	}
	model, err := a.store.Model(ctx, in.Model)
	if err != nil {
		return PreflightResult{}, Fault(err)
	}
	route, err := a.store.Route(ctx, in.Model)
	if err != nil {
		return PreflightResult{}, Fault(err)
	}
	if err := a.checkCandidate(ctx, in, route); err != nil {
		return PreflightResult{}, Fault(err)
	}
	out := PreflightResult{Route: route, Judge: in.Judge}
	if out.Judge.MaxErrorRate == 0 {
		out.Judge.MaxErrorRate = model.Config.ErrorRateLimit
	}
	if out.Judge.MaxP99Millis == 0 {
		out.Judge.MaxP99Millis = model.Config.P99Millis
	}
	if in.Requests > 0 && in.FirstStep > 0 && in.FirstStep < registry.FullWeight {
		n := float64(in.Requests)
		m := n * float64(registry.FullWeight-in.FirstStep) / float64(in.FirstStep)
		out.DetectableOdds = monitor.DetectableOddsRatio(in.Judge, n, m, assumedErrorRate)
		if out.DetectableOdds == 0 || out.DetectableOdds > 2 {
			out.Warnings = append(out.Warnings, fmt.Sprintf("a bake of %d requests cannot see a doubling of a 1 %% error rate; it sees odds of %.1f", in.Requests, out.DetectableOdds))
		}
	}
	return out, nil
}

func (a *Traffic) checkCandidate(ctx context.Context, in PreflightInput, route registry.Route) error {
	v, err := a.store.Version(ctx, in.Model, in.Candidate)
	if err != nil {
		return err
	}
	if v.Status != registry.Ready {
		return registry.Errorf(registry.Precondition, "version %d of %s is %s, not READY", in.Candidate, in.Model, v.Status)
	}
	if route.Owner != "" && route.Owner != in.RunID {
		return registry.Errorf(registry.Conflict, "the route of %s is owned by run %s", in.Model, route.Owner)
	}
	stable := route.StableVersion()
	if stable == in.Candidate && len(route.Arms) == 1 {
		return registry.Errorf(registry.Precondition, "version %d of %s has all the traffic already", in.Candidate, in.Model)
	}
	if stable == 0 {
		return nil
	}
	champion, err := a.store.Version(ctx, in.Model, stable)
	if err != nil {
		return err
	}
	if err := champion.Signature.Compatible(v.Signature); err != nil {
		return registry.Errorf(registry.Invalid, "version %d cannot take the place of version %d: %w", in.Candidate, stable, err)
	}
	return nil
}

// ShiftInput is one change of a model's route, and what to wait for before and after.
type ShiftInput struct {
	RunID    string         `json:"run_id"`
	Step     string         `json:"step"` // the change id is {run id}/{step}
	Phase    string         `json:"phase"`
	Progress float64        `json:"progress"`
	Model    string         `json:"model"`
	Expected int64          `json:"expected"`
	Arms     []registry.Arm `json:"arms"`
	Owned    bool           `json:"owned"`
	Salt     string         `json:"salt,omitempty"`
	Actor    string         `json:"actor"`
	Reason   string         `json:"reason"`
	Ready    int            `json:"ready,omitempty"` // wait until this version is warm on every worker that should hold it
}

// ShiftResult is the route that was made.
type ShiftResult struct {
	Revision int64     `json:"revision"`
	At       time.Time `json:"at"`
}

// ShiftTraffic sets the route and returns once every leased gateway has applied it and, when asked, a version is warm.
// It ends in Conflict when the route is no longer the expected one.
func (a *Traffic) ShiftTraffic(ctx context.Context, in ShiftInput) (ShiftResult, error) {
	if _, err := a.store.UpdateRun(ctx, registry.RunUpdate{ID: in.RunID, State: registry.RunRunning, Phase: &in.Phase, Progress: &in.Progress}); err != nil {
		return ShiftResult{}, Fault(err)
	}
	change := registry.RouteChange{
		ChangeID: in.RunID + "/" + in.Step, Model: in.Model, Expected: in.Expected, Arms: in.Arms, Salt: in.Salt, By: in.RunID,
		Actor: in.Actor, Reason: in.Reason,
	}
	if in.Owned {
		change.Owner = in.RunID
	}
	route, err := a.store.SetRoute(ctx, change)
	if err != nil {
		return ShiftResult{}, Fault(err)
	}
	if err := a.awaitApplied(ctx, route.Event); err != nil {
		return ShiftResult{}, Fault(err)
	}
	if in.Ready > 0 {
		if err := a.awaitWarm(ctx, in.Model, in.Ready); err != nil {
			return ShiftResult{}, Fault(err)
		}
	}
	return ShiftResult{Revision: route.Revision, At: route.At}, nil
}

// awaitApplied returns once every gateway with a lease has applied the event.
func (a *Traffic) awaitApplied(ctx context.Context, event int64) error {
	return poll(ctx, pollFleet, func() (bool, error) {
		leases, err := a.store.Leases(ctx, registry.GatewayLease, time.Now())
		if err != nil {
			return false, err
		}
		return len(registry.Behind(leases, event)) == 0, nil
	})
}

// awaitWarm returns once the version is loaded on as many workers as the model's serving config asks for. It ends in
// Precondition when a worker says that it cannot load it.
func (a *Traffic) awaitWarm(ctx context.Context, model string, version int) error {
	m, err := a.store.Model(ctx, model)
	if err != nil {
		return err
	}
	return poll(ctx, pollFleet, func() (bool, error) {
		leases, err := a.store.Leases(ctx, registry.WorkerLease, time.Now())
		if err != nil {
			return false, err
		}
		need := len(leases)
		if m.Config.Replicas > 0 {
			need = min(need, m.Config.Replicas)
		}
		warm := 0
		for _, l := range leases {
			i := slices.IndexFunc(l.Worker.Loaded, func(v registry.LoadedVersion) bool { return v.Model == model && v.Version == version })
			if i < 0 {
				continue
			}
			if loaded := l.Worker.Loaded[i]; loaded.State == registry.Loaded {
				warm++
			} else if loaded.Error != "" {
				return false, registry.Errorf(registry.Precondition, "worker %s cannot load version %d: %s", l.Node, version, loaded.Error)
			}
		}
		return warm >= need && need > 0, nil
	})
}

// poll calls ok until it says true, heartbeating.
func poll(ctx context.Context, every time.Duration, ok func() (bool, error)) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		done, err := ok()
		if err != nil || done {
			return err
		}
		activity.RecordHeartbeat(ctx)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// RestoreInput undoes a run's last own change of the route.
type RestoreInput struct {
	RunID    string         `json:"run_id"`
	Step     string         `json:"step"`
	Model    string         `json:"model"`
	Arms     []registry.Arm `json:"arms"`
	Actor    string         `json:"actor"`
	Reason   string         `json:"reason"`
	Revision int64          `json:"revision"` // our last
}

// RestoreRoute puts the arms back if the route is still the one the run made; otherwise it ends in Conflict and
// touches nothing. A change whose acknowledgement was lost is found by its owner.
func (a *Traffic) RestoreRoute(ctx context.Context, in RestoreInput) (ShiftResult, error) {
	current, err := a.store.Route(ctx, in.Model)
	if err != nil {
		return ShiftResult{}, Fault(err)
	}
	change := in.RunID + "/" + in.Step
	if current.ChangeID != change && current.Revision != in.Revision && current.Owner != in.RunID {
		return ShiftResult{}, Fault(registry.Errorf(registry.Conflict, "the route of %s was changed by %s: %s", in.Model, current.Actor, current.Reason))
	}
	route, err := a.store.SetRoute(ctx, registry.RouteChange{
		ChangeID: change, Model: in.Model, Expected: current.Revision, Arms: in.Arms, By: in.RunID, Actor: in.Actor, Reason: in.Reason,
	})
	if err != nil {
		return ShiftResult{}, Fault(err)
	}
	return ShiftResult{Revision: route.Revision, At: route.At}, Fault(a.awaitApplied(ctx, route.Event))
}

// HoldInput holds a version for a run, or lets it go.
type HoldInput struct {
	RunID   string        `json:"run_id"`
	Model   string        `json:"model"`
	Version int           `json:"version"`
	For     time.Duration `json:"for"` // 0 lets go
}

// HoldVersion keeps a version loaded and out of Retention's reach.
func (a *Traffic) HoldVersion(ctx context.Context, in HoldInput) error {
	h := registry.Hold{Model: in.Model, Version: in.Version, Holder: in.RunID}
	if in.For > 0 {
		h.Until = time.Now().Add(in.For)
	}
	return Fault(a.store.SetHold(ctx, h, "run/"+in.RunID))
}

// BakeInput says what to watch and for how long.
type BakeInput struct {
	RunID         string              `json:"run_id"`
	Model         string              `json:"model"`
	Candidate     int                 `json:"candidate"`
	FirstRevision int64               `json:"first_revision"` // of the roll-out: evidence counts from here
	Revision      int64               `json:"revision"`       // of this step
	Since         time.Time           `json:"since"`          // when this step's route was set
	Seconds       int64               `json:"seconds"`        // least time
	Requests      int64               `json:"requests"`       // least requests of the candidate in this step
	MaxSeconds    int64               `json:"max_seconds"`    // then it is inconclusive
	Last          bool                `json:"last"`           // the step before promotion: only a pass ends it well
	Judge         monitor.JudgeConfig `json:"judge"`
}

// Moved is the verdict of a bake whose route was changed by somebody else.
const Moved monitor.Verdict = "moved"

// BakeResult is what a bake saw.
type BakeResult struct {
	Judgement monitor.Judgement `json:"judgement"`
}

// Bake judges the candidate until there is a verdict: pass, rollback, inconclusive when the time is up, moved when the
// route is no longer the run's, or continue after a few minutes so that the workflow's history stays alive.
func (a *Traffic) Bake(ctx context.Context, in BakeInput) (BakeResult, error) {
	return a.watch(ctx, in, a.judgeBake)
}

// WatchPromoted watches the stable arm after a promotion. There is no concurrent arm, so only absolute guardrails act.
func (a *Traffic) WatchPromoted(ctx context.Context, in BakeInput) (BakeResult, error) {
	return a.watch(ctx, in, a.judgeWatch)
}

type judgeFunc func(ctx context.Context, in BakeInput, now time.Time) (monitor.Judgement, error)

func (a *Traffic) watch(ctx context.Context, in BakeInput, judge judgeFunc) (BakeResult, error) {
	began, noted := time.Now(), time.Time{}
	ticker := time.NewTicker(pollBake)
	defer ticker.Stop()
	for {
		j, err := judge(ctx, in, time.Now())
		if err != nil && final[registry.CodeOf(err)] {
			return BakeResult{}, Fault(err)
		}
		if err == nil {
			if j.Verdict != monitor.Continue || time.Since(noted) >= noteEvery {
				if err := a.note(ctx, in, j); err == nil {
					noted = time.Now()
				}
			}
			if j.Verdict != monitor.Continue || time.Since(began) > bakeSlice {
				return BakeResult{Judgement: j}, nil
			}
		} // a registry that is away for a moment is no verdict: look again
		activity.RecordHeartbeat(ctx, j.Reason)
		select {
		case <-ctx.Done():
			return BakeResult{}, ctx.Err()
		case <-ticker.C:
		}
	}
}

func (a *Traffic) note(ctx context.Context, in BakeInput, j monitor.Judgement) error {
	now := time.Now()
	return a.store.AddEvidence(ctx, registry.Evidence{
		Run: in.RunID, Seq: int(now.UnixMilli()), At: now, Verdict: string(j.Verdict), Body: marshal(j),
	})
}

// moved says whether the route is no longer the one of this step.
func (a *Traffic) moved(ctx context.Context, in BakeInput) (monitor.Judgement, bool, error) {
	route, err := a.store.Route(ctx, in.Model)
	if err != nil || route.Revision == in.Revision {
		return monitor.Judgement{}, false, err
	}
	return monitor.Judgement{Verdict: Moved, Reason: fmt.Sprintf("the route was changed by %s: %s", route.Actor, route.Reason)}, true, nil
}

func (a *Traffic) judgeBake(ctx context.Context, in BakeInput, now time.Time) (monitor.Judgement, error) {
	if j, moved, err := a.moved(ctx, in); err != nil || moved {
		return j, err
	}
	strata, err := a.store.Strata(ctx, registry.StrataFilter{Model: in.Model, MinRevision: in.FirstRevision, MaxRevision: in.Revision})
	if err != nil {
		return monitor.Judgement{}, err
	}
	sealed, err := a.sealed(ctx)
	if err != nil {
		return monitor.Judgement{}, err
	}
	groups, step := groupStrata(strata, in, sealed)
	elapsed := now.Sub(in.Since)
	baked := elapsed >= time.Duration(in.Seconds)*time.Second && step >= in.Requests
	j := monitor.Judge(in.Judge, groups, baked)
	late := in.MaxSeconds > 0 && elapsed > time.Duration(in.MaxSeconds)*time.Second
	switch {
	case j.Verdict == monitor.Rollback || j.Verdict == monitor.Pass:
	case !in.Last && baked && j.Candidate.Requests > 0:
		j.Verdict = monitor.Pass
		j.Reason = "not found worse; " + j.Reason
	case !late:
		j.Verdict = monitor.Continue
	case !baked:
		j.Verdict = monitor.Inconclusive
		j.Reason = fmt.Sprintf("%d requests of %d after %s", step, in.Requests, elapsed.Round(time.Second))
	}
	return j, nil
}

func (a *Traffic) judgeWatch(ctx context.Context, in BakeInput, now time.Time) (monitor.Judgement, error) {
	if j, moved, err := a.moved(ctx, in); err != nil || moved {
		return j, err
	}
	strata, err := a.store.Strata(ctx, registry.StrataFilter{Model: in.Model, MinRevision: in.Revision, MaxRevision: in.Revision})
	if err != nil {
		return monitor.Judgement{}, err
	}
	j := monitor.Judgement{Verdict: monitor.Continue, Reason: "guardrails only: there is no concurrent arm"}
	for _, s := range strata {
		j.Candidate.Add(armCount(s))
	}
	if reason := monitor.Guard(in.Judge, j.Candidate); reason != "" {
		j.Verdict, j.Reason = monitor.Rollback, reason
	} else if now.Sub(in.Since) >= time.Duration(in.Seconds)*time.Second {
		j.Verdict = monitor.Pass
	}
	return j, nil
}

// sealed returns the time before which no leased gateway will add anything.
func (a *Traffic) sealed(ctx context.Context) (time.Time, error) {
	leases, err := a.store.Leases(ctx, registry.GatewayLease, time.Now())
	if err != nil {
		return time.Time{}, err
	}
	at := time.Unix(math.MaxInt32, 0)
	for _, l := range leases {
		if l.Sealed.Before(at) {
			at = l.Sealed
		}
	}
	return at, nil
}

// groupStrata pairs the candidate with stable by gateway, revision and window, taking sealed windows only, and counts
// the candidate's requests in this step.
func groupStrata(strata []registry.Stratum, in BakeInput, sealed time.Time) (groups []monitor.Group, step int64) {
	index := map[string]int{}
	for _, s := range strata {
		start := s.Start.Truncate(groupWindow)
		if s.Revision == in.Revision && s.Version == in.Candidate {
			step += s.Requests
		}
		// A window of an older revision is over as soon as its seconds are sealed: no request counts there any more.
		over := !start.Add(groupWindow).After(sealed) || (s.Revision < in.Revision && s.Start.Before(sealed))
		if !over && !urgent(s, in) {
			continue
		}
		key := strings.Join([]string{s.Gateway, strconv.FormatInt(s.Revision, 10), start.Format(time.RFC3339)}, "|")
		i, ok := index[key]
		if !ok {
			i = len(groups)
			index[key] = i
			groups = append(groups, monitor.Group{})
		}
		switch {
		case s.Version == in.Candidate:
			groups[i].Candidate.Add(armCount(s))
		case s.Role == registry.Stable:
			groups[i].Stable.Add(armCount(s))
		}
	}
	return groups, step
}

// urgent says that a stratum trips a guardrail, which does not wait for its window to end.
func urgent(s registry.Stratum, in BakeInput) bool {
	return s.Version == in.Candidate && s.NotFinite > 0
}

func armCount(s registry.Stratum) monitor.ArmCount {
	return monitor.ArmCount{
		Requests: s.Requests, Errors: s.Errors, Votes: s.Votes, VoteFails: s.VoteFails, NotFinite: s.NotFinite, Latency: s.Latency,
	}
}
