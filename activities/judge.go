package activities

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// foldEvery is the length of the windows that concurrent counts are compared in. It depends on the clock alone, so
// that what is counted cannot choose its window.
const foldEvery = 5 * time.Second

// comparison is where the judge of a run stands. It is stored as the run's tally: what is folded, and up to where, are
// one value, so a restart in the middle of a window neither loses nor doubles a stratum.
type comparison struct {
	Tallies map[int]*monitor.Tally `json:"tallies"` // by version compared with the reference
	Folded  map[string]time.Time   `json:"folded"`  // by gateway: strata that began before are in the tallies
	Counts  map[int64]int64        `json:"counts"`  // requests of the versions compared, by revision
	Shares  map[int64]map[int]int  `json:"shares"`  // weights of the arms, by revision and version
}

// readComparison returns where a run's judge stands.
func (a *Traffic) readComparison(ctx context.Context, run string) (*comparison, error) {
	t, err := a.store.Tally(ctx, run)
	if err != nil {
		return nil, err
	}
	c := &comparison{}
	if len(t.Body) > 0 {
		if err := json.Unmarshal(t.Body, c); err != nil {
			return nil, registry.Errorf(registry.Corrupt, "tally of run %s: %w", run, err)
		}
	}
	if c.Tallies == nil {
		c.Tallies, c.Folded = map[int]*monitor.Tally{}, map[string]time.Time{}
		c.Counts, c.Shares = map[int64]int64{}, map[int64]map[int]int{}
	}
	return c, nil
}

func (a *Traffic) writeComparison(ctx context.Context, run string, c *comparison) error {
	return a.store.PutTally(ctx, registry.Tally{Run: run, Body: marshal(c)})
}

// recent is what is known beyond the tallies: strata of seconds that are not folded yet.
type recent struct {
	arms map[int]monitor.ArmCount // by version
	step int64                    // requests of the versions compared under the present revision
}

// look reads what came since the last look and folds what is due.
func (a *Traffic) look(ctx context.Context, in BakeInput, c *comparison) (recent, error) {
	leases, err := a.gateways.get(ctx)
	if err != nil {
		return recent{}, err
	}
	strata, err := a.store.Strata(ctx, registry.StrataFilter{Model: in.Model, MinRevision: in.FirstRevision, MaxRevision: in.Revision, From: c.Folded})
	if err != nil {
		return recent{}, err
	}
	sealed := map[string]time.Time{}
	for _, l := range leases {
		sealed[l.ID] = l.Sealed
	}
	byGateway := map[string][]registry.Stratum{}
	for _, s := range strata {
		byGateway[s.Gateway] = append(byGateway[s.Gateway], s)
		if c.Shares[s.Revision] == nil {
			if err := a.readShares(ctx, in, c); err != nil {
				return recent{}, err
			}
		}
	}
	rest := recent{arms: map[int]monitor.ArmCount{}}
	for _, gateway := range slices.Sorted(maps.Keys(byGateway)) {
		list := byGateway[gateway]
		if until := c.due(in, gateway, list, sealed); !until.IsZero() {
			cut := slices.IndexFunc(list, func(s registry.Stratum) bool { return !s.Start.Before(until) })
			if cut < 0 {
				cut = len(list)
			}
			c.fold(in, list[:cut])
			c.Folded[gateway], list = until, list[cut:]
		}
		for _, s := range list {
			arm := rest.arms[s.Version]
			arm.Add(armCount(s))
			rest.arms[s.Version] = arm
			if s.Revision == in.Revision && slices.Contains(in.Versions, s.Version) {
				rest.step += s.Requests
			}
		}
	}
	rest.step += c.Counts[in.Revision]
	return rest, nil
}

// due returns up to when a gateway's strata are to be folded now, the zero time when they wait for their window to end.
// A gateway seals its own seconds, so one that is stuck holds nobody up and what it brings late is folded then. One
// without a lease has said its last word, or will begin a window of its own.
func (c *comparison) due(in BakeInput, gateway string, list []registry.Stratum, sealed map[string]time.Time) time.Time {
	until, alive := sealed[gateway]
	if !alive {
		return list[len(list)-1].Start.Add(time.Second)
	}
	from, started := c.Folded[gateway]
	if !started {
		from = list[0].Start
	}
	if until.Sub(from) >= foldEvery || list[0].Revision < in.Revision && list[0].Start.Before(until) {
		return until
	}
	return time.Time{}
}

// readShares looks up which share each version had under each revision of the roll-out.
func (a *Traffic) readShares(ctx context.Context, in BakeInput, c *comparison) error {
	history, err := a.store.RouteHistory(ctx, in.Model, int(in.Revision-in.FirstRevision)+100)
	for _, r := range history {
		if r.Revision < in.FirstRevision {
			break
		}
		weights := map[int]int{}
		for _, arm := range r.Arms {
			if arm.Role != registry.Shadow {
				weights[arm.Version] = arm.Weight
			}
		}
		c.Shares[r.Revision] = weights
	}
	return err
}

// share returns which share of the callers of both arms a version had, 0 for a shadow.
func (c *comparison) share(in BakeInput, version int, revision int64) float64 {
	weights := c.Shares[revision]
	if weights[version] == 0 || weights[in.Reference] == 0 {
		return 0
	}
	return float64(weights[version]) / float64(weights[version]+weights[in.Reference])
}

// fold adds the strata of one gateway and window: a group for every version compared and revision.
func (c *comparison) fold(in BakeInput, strata []registry.Stratum) {
	byRevision := map[int64][]registry.Stratum{}
	for _, s := range strata {
		byRevision[s.Revision] = append(byRevision[s.Revision], s)
	}
	for _, revision := range slices.Sorted(maps.Keys(byRevision)) {
		for _, version := range in.Versions {
			g := monitor.Group{Revision: revision, Share: c.share(in, version, revision)}
			for _, s := range byRevision[revision] {
				switch s.Version {
				case version:
					g.Candidate.Add(armCount(s))
					addPairs(&g.Pairs, s.Detail)
					c.Counts[revision] += s.Requests
				case in.Reference:
					g.Stable.Add(armCount(s))
				}
			}
			if c.Tallies[version] == nil {
				c.Tallies[version] = &monitor.Tally{}
			}
			c.Tallies[version].Add(g)
		}
	}
}

func armCount(s registry.Stratum) monitor.ArmCount {
	votes := s.Detail.VoteLatency
	if votes == nil && s.Votes == s.Requests {
		votes = s.Latency
	}
	return monitor.ArmCount{
		Requests: s.Requests, Errors: s.Errors, Votes: s.Votes, VoteFails: s.VoteFails, NotFinite: s.NotFinite, Callers: s.Detail.Callers,
		Latency: s.Latency, VoteLatency: votes, Outputs: s.Detail.Outputs,
		Feedback: monitor.Moments{N: s.Detail.Feedback, Sum: s.Detail.FeedbackSum, Squares: s.Detail.FeedbackSquares},
	}
}

func addPairs(p *monitor.PairCount, d registry.StratumDetail) {
	p.Pairs += d.Pairs
	p.OnlyFailed += d.OnlyFailed
	p.OnlyAnswered += d.OnlyAnswered
	if p.Gaps == nil {
		p.Gaps = map[int]int64{}
	}
	for b, n := range d.Gaps {
		p.Gaps[b] += n
	}
}

// judge looks once: at every version compared, at the business metric of an experiment, and at the clock.
func (a *Traffic) judge(ctx context.Context, in BakeInput, c *comparison, labels *labelled, now time.Time) (monitor.Judgement, error) {
	route, err := a.store.Route(ctx, in.Model)
	if err != nil {
		return monitor.Judgement{}, err
	}
	if route.Revision != in.Revision {
		return monitor.Judgement{Verdict: Moved, Reason: fmt.Sprintf("the route was changed by %s: %s", route.Actor, route.Reason)}, nil
	}
	rest, err := a.look(ctx, in, c)
	if err != nil {
		return monitor.Judgement{}, err
	}
	crashes, err := a.crashes(ctx, in)
	if err == nil {
		err = labels.look(ctx, in, now)
	}
	if err != nil {
		return monitor.Judgement{}, err
	}
	elapsed := now.Sub(in.Since)
	baked := elapsed >= time.Duration(in.Seconds)*time.Second && rest.step >= in.Requests
	judge := in.Judge
	judge.Alpha /= float64(len(in.Versions))
	var all []monitor.Judgement
	for _, version := range in.Versions {
		t := c.Tallies[version]
		if t == nil {
			t = &monitor.Tally{}
		}
		guard := t.Candidate.Plain() // maps of its own: what is not folded must not get into the tally
		guard.Latency = maps.Clone(t.Candidate.Latency)
		guard.Add(rest.arms[version])
		b := monitor.Beside{Guard: guard, Crashes: crashes[version], Loss: labels.difference(in, judge, version), Baked: baked}
		j := monitor.Judge(judge, *t, b)
		if in.Reference == 0 {
			j = guardOnly(j, guard, baked)
		}
		if len(in.Versions) > 1 {
			j.Reason = fmt.Sprintf("version %d: %s", version, j.Reason)
		}
		all = append(all, j)
	}
	worst := all[0]
	for _, j := range all[1:] {
		if order := cmp.Compare(severity[j.Verdict], severity[worst.Verdict]); order > 0 || order == 0 && j.SplitE > worst.SplitE {
			worst = j
		}
	}
	if in.Experiment != nil && worst.Verdict != monitor.Rollback {
		worst = in.experiment(worst, c)
	}
	return in.conclude(worst, baked, rest.step, elapsed), nil
}

// severity orders verdicts of several versions: what stops one stops all.
var severity = map[monitor.Verdict]int{monitor.Pass: 0, monitor.Continue: 1, monitor.Inconclusive: 2, monitor.Rollback: 3}

// guardOnly is the judgement of a version without a concurrent arm: only guardrails act, and say so.
func guardOnly(j monitor.Judgement, all monitor.ArmCount, baked bool) monitor.Judgement {
	j.Candidate = all.Plain()
	j.CandidateP99 = float64(monitor.LatencyQuantile(all.Latency, 0.99)) / float64(time.Millisecond)
	switch {
	case j.Verdict == monitor.Rollback:
	case baked:
		j.Verdict, j.Reason = monitor.Pass, "no guardrail tripped; there is no concurrent arm to compare with"
	default:
		j.Verdict, j.Reason = monitor.Continue, "guardrails only: there is no concurrent arm"
	}
	return j
}

// experiment replaces a judgement that is no rollback by what the business metric says.
func (in BakeInput) experiment(j monitor.Judgement, c *comparison) monitor.Judgement {
	var stable monitor.Moments
	variants := map[int]monitor.Moments{}
	for version, t := range c.Tallies {
		stable, variants[version] = t.Stable.Feedback, t.Candidate.Feedback
	}
	if j.SplitE >= monitor.SplitLimit { // then nothing can be compared
		return j
	}
	j.Verdict, j.Reason, j.Winner, j.Metric = monitor.JudgeMetric(in.Judge, in.Experiment.Goal, in.Experiment.Margin, in.Reference, stable, variants)
	return j
}

// conclude turns what the judge says into what the step does: a step before the last one ends when it is baked and not
// found worse, a judge that has not made up its mind gets more time, and the time has an end.
func (in BakeInput) conclude(j monitor.Judgement, baked bool, step int64, elapsed time.Duration) monitor.Judgement {
	late := in.MaxSeconds > 0 && elapsed > time.Duration(in.MaxSeconds)*time.Second
	switch {
	case j.Verdict == monitor.Rollback:
	case j.Verdict == monitor.Pass && baked:
	case !in.Last && baked && j.Candidate.Requests > 0 && in.Experiment == nil && j.SplitE < monitor.SplitLimit:
		j.Verdict = monitor.Pass
		j.Reason = "not found worse; " + j.Reason
	case j.Verdict == monitor.Inconclusive && j.SplitE >= monitor.SplitLimit:
	case !late:
		j.Verdict = monitor.Continue
	default:
		j.Verdict = monitor.Inconclusive
		if !baked {
			j.Reason = fmt.Sprintf("%d requests of %d after %s", step, in.Requests, elapsed.Round(time.Second))
		}
	}
	return j
}

// crashes counts, by version, the workers that died while they ran it since the roll-out began.
func (a *Traffic) crashes(ctx context.Context, in BakeInput) (map[int]int, error) {
	workers, err := a.workers.get(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[registry.Crash]bool{}
	out := map[int]int{}
	for _, w := range workers {
		for _, crash := range w.Worker.Crashes {
			if crash.Model == in.Model && !crash.At.Before(in.Began) && !seen[crash] {
				seen[crash] = true
				out[crash.Version]++
			}
		}
	}
	return out, nil
}

// AllocateInput asks for the weights of an experiment's arms.
type AllocateInput struct {
	RunID      string     `json:"run_id"`
	Seq        int        `json:"seq"` // of the allocation
	Stable     int        `json:"stable"`
	Versions   []int      `json:"versions"`
	Experiment Experiment `json:"experiment"`
}

// Allocate gives every arm of an experiment a weight by Thompson sampling. The same run, sequence number and feedback
// give the same weights.
func (a *Traffic) Allocate(ctx context.Context, in AllocateInput) ([]registry.Arm, error) {
	c, err := a.readComparison(ctx, in.RunID)
	if err != nil {
		return nil, Fault(err)
	}
	moments := make([]monitor.Moments, len(in.Versions)+1)
	arms := []registry.Arm{{Version: in.Stable, Role: registry.Stable}}
	for i, v := range in.Versions {
		arms = append(arms, registry.Arm{Version: v, Role: registry.Variant})
		if t := c.Tallies[v]; t != nil {
			moments[0], moments[i+1] = t.Stable.Feedback, t.Candidate.Feedback
		}
	}
	shares := monitor.Allocate(moments, in.Experiment.Goal, float64(in.Experiment.Floor)/registry.FullWeight, rand.New(rand.NewPCG(xxhash.Sum64String(in.RunID), uint64(in.Seq)))) //nolint:gosec // no secret: it must be repeatable
	rest := registry.FullWeight
	for i := range arms[1:] {
		arms[i+1].Weight = int(shares[i+1] * registry.FullWeight)
		rest -= arms[i+1].Weight
	}
	arms[0].Weight = rest
	return arms, nil
}
