package monitor

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// bake simulates minutes of traffic in groups of five seconds at ten requests a second, a tenth of them the candidate's.
func bake(r *rand.Rand, minutes int, stable, candidate float64) []Group {
	var groups []Group
	for range minutes * 12 {
		var g Group
		for range 5 * 10 {
			arm, rate := &g.Stable, stable
			if r.Float64() < 0.1 {
				arm, rate = &g.Candidate, candidate
			}
			arm.Requests++
			arm.Votes++
			if r.Float64() < rate {
				arm.Errors++
				arm.VoteFails++
			}
		}
		groups = append(groups, g)
	}
	return groups
}

// ever says whether the judge would have rolled back at any look.
func ever(groups []Group) bool {
	var t Tally
	for _, g := range groups {
		t.Add(g)
		if Judge(DefaultJudge(), t, Beside{}).Verdict == Rollback {
			return true
		}
	}
	return false
}

// judge folds groups and looks once.
func judge(c JudgeConfig, groups []Group, baked bool) Judgement {
	var t Tally
	for _, g := range groups {
		t.Add(g)
	}
	return Judge(c, t, Beside{Guard: t.Candidate, Baked: baked})
}

func TestJudge_PeekingKeepsFalseRollbacksRare(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	wrong, caught := 0, 0
	for range 200 {
		if ever(bake(r, 10, 0.01, 0.01)) {
			wrong++
		}
		if ever(bake(r, 10, 0.01, 0.05)) {
			caught++
		}
	}
	require.LessOrEqual(t, wrong, 4, "of 200 equal candidates")
	require.GreaterOrEqual(t, caught, 190, "of 200 candidates with five times the errors")
}

func TestJudge_ASharedIncidentIsNotTheCandidates(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	groups := append(bake(r, 5, 0.01, 0.01), bake(r, 2, 0.4, 0.4)...)
	require.False(t, ever(groups))
}

func TestJudge_NoDataIsNeverAPass(t *testing.T) {
	j := judge(DefaultJudge(), nil, true)
	require.Equal(t, Inconclusive, j.Verdict)
	j = judge(DefaultJudge(), []Group{{Stable: ArmCount{Requests: 1000, Votes: 1000}}}, true)
	require.Equal(t, Inconclusive, j.Verdict)
	require.Equal(t, "the candidate has had no traffic", j.Reason)
	clean := []Group{{Stable: ArmCount{Requests: 1000, Votes: 1000}, Candidate: ArmCount{Requests: 250, Votes: 250}}}
	require.Equal(t, Pass, judge(DefaultJudge(), clean, true).Verdict)
	require.Equal(t, Continue, judge(DefaultJudge(), clean, false).Verdict)
}

func TestJudge_GuardrailsActAlone(t *testing.T) {
	nan := []Group{{Candidate: ArmCount{Requests: 1, Votes: 1, NotFinite: 1}}}
	require.Equal(t, Rollback, judge(DefaultJudge(), nan, false).Verdict)
	c := DefaultJudge()
	c.MaxErrorRate = 0.1
	bad := []Group{{Candidate: ArmCount{Requests: 60, Errors: 20}}}
	require.Equal(t, Rollback, judge(c, bad, false).Verdict)
}

func latencies(r *rand.Rand, n int, scale float64) ArmCount {
	a := ArmCount{Requests: int64(n), Votes: int64(n), Latency: map[int]int64{}}
	a.VoteLatency = a.Latency
	for range n {
		a.Latency[LatencyBucket(time.Duration(scale*(1+r.ExpFloat64())*float64(time.Millisecond)))]++
	}
	return a
}

func TestJudge_LatencyBandSeesASlowerCandidateOnly(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	same := []Group{{Stable: latencies(r, 5000, 1), Candidate: latencies(r, 500, 1)}}
	require.Equal(t, Pass, judge(DefaultJudge(), same, true).Verdict)
	slow := []Group{{Stable: latencies(r, 5000, 1), Candidate: latencies(r, 500, 2.5)}}
	j := judge(DefaultJudge(), slow, true)
	require.Equal(t, Rollback, j.Verdict)
	require.Contains(t, j.Reason, "slower")
	fast := []Group{{Stable: latencies(r, 5000, 2.5), Candidate: latencies(r, 500, 1)}}
	require.Equal(t, Pass, judge(DefaultJudge(), fast, true).Verdict)
}

func TestLatencyQuantile(t *testing.T) {
	counts := map[int]int64{}
	for ms := 1; ms <= 1000; ms++ {
		counts[LatencyBucket(time.Duration(ms)*time.Millisecond)]++
	}
	require.InEpsilon(t, 990, millis(LatencyQuantile(counts, 0.99)), 0.1)
	require.InEpsilon(t, 500, millis(LatencyQuantile(counts, 0.5)), 0.1)
	require.Zero(t, LatencyQuantile(nil, 0.5))
}

func TestDetectableOddsRatio(t *testing.T) {
	few := DetectableOddsRatio(DefaultJudge(), []Expected{{360, 3240}}, 0.01)
	many := DetectableOddsRatio(DefaultJudge(), []Expected{{3600, 32400}}, 0.01)
	ramp := DetectableOddsRatio(DefaultJudge(), []Expected{{450, 8550}, {900, 8100}, {2250, 6750}, {4500, 4500}}, 0.01)
	require.Greater(t, few, many)
	require.Greater(t, many, 1.2)
	require.Less(t, many, 3.0)
	require.Less(t, ramp, 2.0, "the default ramp at 600 requests a minute sees a doubling")
	require.Zero(t, DetectableOddsRatio(DefaultJudge(), nil, 0.01))
}

func answers(r *rand.Rand, n int, shift float64) ArmCount {
	a := ArmCount{Requests: int64(n), Votes: int64(n), Outputs: map[int]int64{}}
	for range n {
		for column, v := range []float64{r.Float64(), r.NormFloat64() + shift} {
			key, ok := OutputKey(column, v)
			if ok {
				a.Outputs[key]++
			}
		}
	}
	return a
}

func TestJudge_OutputsThatAreDistributedDifferentlyGoBack(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	same := judge(DefaultJudge(), []Group{{Stable: answers(r, 5000, 0), Candidate: answers(r, 800, 0)}}, true)
	require.Equal(t, Pass, same.Verdict, same.Reason)
	other := judge(DefaultJudge(), []Group{{Stable: answers(r, 5000, 0), Candidate: answers(r, 800, 3)}}, true)
	require.Equal(t, Rollback, other.Verdict)
	require.Contains(t, other.Reason, "distributed differently")
	c := DefaultJudge()
	c.OutputMargin = 1
	require.Equal(t, Pass, judge(c, []Group{{Stable: answers(r, 5000, 0), Candidate: answers(r, 800, 3)}}, true).Verdict, "not compared")
}

func TestOutputKey_KeepsOrderAndSign(t *testing.T) {
	last := 0
	for _, v := range []float64{math.Inf(-1), -1e9, -1, -0.1, 0, 0.1, 1, 1e9, math.Inf(1)} {
		key, ok := OutputKey(3, v)
		require.True(t, ok)
		require.Greater(t, key, last, "of %v", v)
		require.Equal(t, 3, key/outputSpan)
		last = key
	}
	_, ok := OutputKey(0, math.NaN())
	require.False(t, ok)
	_, ok = OutputKey(8, 1)
	require.False(t, ok)
}

func pairs(n, differ, onlyShadow, onlyStable int64) Group {
	return Group{Candidate: ArmCount{Requests: n}, Pairs: PairCount{
		Pairs: n, OnlyFailed: onlyShadow, OnlyAnswered: onlyStable,
		Gaps: map[int]int64{GapBucket(0.001): n - differ - onlyShadow - onlyStable, GapBucket(0.5): differ},
	}}
}

func TestJudge_ShadowIsComparedPairByPair(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		group        Group
		want         Verdict
	}{
		{"they agree", "excluded", pairs(1000, 20, 0, 0), Pass},
		{"they disagree", "answers disagree", pairs(1000, 300, 0, 0), Rollback},
		{"at the limit nothing is certain", "not certain yet", pairs(1000, 90, 0, 0), Inconclusive},
		{"the shadow alone fails", "errs more often", pairs(1000, 0, 30, 1), Rollback},
		{"both fail alike", "excluded", pairs(5000, 0, 20, 22), Pass},
	} {
		j := judge(DefaultJudge(), []Group{c.group}, true)
		require.Equal(t, c.want, j.Verdict, "%s: %s", c.name, j.Reason)
		require.Contains(t, j.Reason, c.reason, c.name)
	}
}

func TestJudge_CallersThatAreNotSplitAsTheRouteSays(t *testing.T) {
	split := func(stable, candidate int64) []Group {
		return []Group{{
			Share: 0.1, Revision: 3, Stable: ArmCount{Requests: stable, Votes: stable, Callers: stable},
			Candidate: ArmCount{Requests: candidate, Votes: candidate, Callers: candidate},
		}}
	}
	require.Equal(t, Pass, judge(DefaultJudge(), split(9000, 1000), true).Verdict)
	j := judge(DefaultJudge(), split(8500, 1500), true)
	require.Equal(t, Inconclusive, j.Verdict)
	require.Contains(t, j.Reason, "not split")
}

func seeded(run int) Source { return rand.New(rand.NewPCG(11, uint64(run))) }

// One caller that always fails is one failure per step, however many requests it sends.
func TestJudge_TargetsOfTheDefaults(t *testing.T) {
	const runs = 300
	for _, c := range []struct {
		s    Scenario
		most float64 // share of false rollbacks
		min  float64 // share of caught regressions
	}{
		{Scenario{Name: "equal, 60 a minute", PerMinute: 60, Base: 0.01, Candidate: 0.01}, 0.02, 0},
		{Scenario{Name: "equal, 60 a minute in bursts of 5", PerMinute: 60, Base: 0.01, Candidate: 0.01, Burst: 5}, 0.02, 0},
		{Scenario{Name: "a broken caller, 60 a minute", PerMinute: 60, Base: 0.01, Candidate: 0.01, BrokenRate: 0.05}, 0.02, 0},
		{Scenario{Name: "equal, 600 a minute in bursts of 5", PerMinute: 600, Base: 0.01, Candidate: 0.01, Burst: 5}, 0.02, 0},
		{Scenario{Name: "a shared incident", PerMinute: 60, Base: 0.01, Candidate: 0.01, Incident: true}, 0.02, 0},
		{Scenario{Name: "five times the errors, 60 a minute", PerMinute: 60, Base: 0.01, Candidate: 0.05}, 1, 0.9},
	} {
		got := Simulate(c.s, DefaultPlan(), runs, seeded)[0].RolledBack
		require.LessOrEqual(t, got.Share, c.most, c.s.Name)
		require.GreaterOrEqual(t, got.Share, c.min, c.s.Name)
	}
	double := Simulate(Scenario{PerMinute: 600, Base: 0.01, Candidate: 0.02}, DefaultPlan(), 60, seeded)[0].RolledBack
	require.GreaterOrEqual(t, double.Share, 0.95, "twice the errors")
}

func TestCompare_HoldsWhileOnePeeks(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	wrong, found := 0, 0
	for range 200 {
		var a, b, c Moments
		missed, seen := false, false
		for i := range 4000 {
			for arm, m := range []*Moments{&a, &b, &c} {
				v := 0.0
				if r.Float64() < 0.1+0.04*float64(arm/2) {
					v = 1
				}
				m.Merge(Moments{N: 1, Sum: v, Squares: v * v})
			}
			if i%50 == 49 {
				d := Compare(a, b, 0.05)
				missed = missed || d.Lower > 0 || d.Upper < 0
				seen = seen || Compare(a, c, 0.05).Lower > 0
			}
		}
		wrong += map[bool]int{true: 1}[missed]
		found += map[bool]int{true: 1}[seen]
	}
	require.LessOrEqual(t, wrong, 10, "of 200 equal arms")
	require.GreaterOrEqual(t, found, 180, "of 200 better arms")
}

func TestJudgeMetric_NoWinnerUntilSignificant(t *testing.T) {
	at := func(n int64, mean float64) Moments {
		return Moments{N: n, Sum: mean * float64(n), Squares: mean * float64(n)}
	}
	v, _, winner, list := JudgeMetric(DefaultJudge(), Higher, 0, 1, at(100, 0.1), map[int]Moments{2: at(100, 0.15)})
	require.Equal(t, Continue, v)
	require.Zero(t, winner)
	require.Len(t, list, 1)
	v, reason, winner, _ := JudgeMetric(DefaultJudge(), Higher, 0, 1, at(20_000, 0.1), map[int]Moments{2: at(20_000, 0.12), 3: at(20_000, 0.15)})
	require.Equal(t, Pass, v, reason)
	require.Equal(t, 3, winner)
	_, _, winner, _ = JudgeMetric(DefaultJudge(), Lower, 0, 1, at(20_000, 0.1), map[int]Moments{2: at(20_000, 0.12), 3: at(20_000, 0.05)})
	require.Equal(t, 3, winner)
	v, _, winner, _ = JudgeMetric(DefaultJudge(), Higher, 0.02, 1, at(50_000, 0.1), map[int]Moments{2: at(50_000, 0.1)})
	require.Equal(t, Pass, v, "certainly no better by the margin")
	require.Equal(t, 1, winner)
}

func TestAllocate_FollowsTheBetterArmAndKeepsTheFloor(t *testing.T) {
	at := func(n int64, mean float64) Moments {
		return Moments{N: n, Sum: mean * float64(n), Squares: mean * float64(n)}
	}
	even := Allocate([]Moments{{}, {}, {}}, Higher, 0.05, seeded(0))
	for _, s := range even {
		require.InDelta(t, 1.0/3, s, 0.03)
	}
	shares := Allocate([]Moments{at(2000, 0.1), at(2000, 0.2), at(2000, 0.1)}, Higher, 0.05, seeded(0))
	require.InDelta(t, 0.9, shares[1], 0.01)
	require.InDelta(t, 0.05, shares[0], 0.01)
	require.InDelta(t, 1, shares[0]+shares[1]+shares[2], 1e-9)
	require.Equal(t, shares, Allocate([]Moments{at(2000, 0.1), at(2000, 0.2), at(2000, 0.1)}, Higher, 0.05, seeded(0)))
	low := Allocate([]Moments{at(2000, 0.1), at(2000, 0.2)}, Lower, 0.1, seeded(0))
	require.InDelta(t, 0.9, low[0], 0.01)
}

// What users of other judges complained of, by the numbers of their issues.
func TestJudge_ComplaintsOfOthers(t *testing.T) {
	t.Parallel()
	counts := func(stable, stableErrors, candidate, candidateErrors int64) []Group {
		return []Group{{
			Stable:    ArmCount{Requests: stable, Errors: stableErrors, Votes: stable, VoteFails: stableErrors},
			Candidate: ArmCount{Requests: candidate, Errors: candidateErrors, Votes: candidate, VoteFails: candidateErrors},
		}}
	}
	r := rand.New(rand.NewPCG(21, 22))
	spread := func(n int, sigma float64) ArmCount {
		a := ArmCount{Requests: int64(n), Votes: int64(n), Latency: map[int]int64{}}
		for range n {
			a.Latency[LatencyBucket(time.Duration(10*math.Exp(sigma*r.NormFloat64())*float64(time.Millisecond)))]++
		}
		a.VoteLatency = a.Latency
		return a
	}
	for _, c := range []struct {
		name   string
		groups []Group
		baked  bool
		want   Verdict
	}{
		{"kayenta #780, spinnaker #6278: a hundred errors against one pass until the eighth minute", counts(1000, 1, 1000, 100), false, Rollback},
		{"spinnaker #6278: the same median, a much wider spread passes", []Group{{Stable: spread(4000, 0.1), Candidate: spread(2000, 1.2)}}, false, Rollback},
		{"kayenta #426: sparse errors pass", counts(4000, 0, 400, 6), false, Rollback},
		{"kayenta #633: 650 % more errors pass for fifty minutes", counts(1800, 18, 200, 15), false, Rollback},
		{"flagger #1035: no traffic is a failure", nil, false, Continue},
		{"flagger #1035: no traffic is a pass", nil, true, Inconclusive},
		{"suna #3403: one error on next to no traffic aborts", counts(3, 0, 2, 1), false, Continue},
		{"flagger #1501: an error in a quiet minute counts as a failed check", counts(40, 0, 4, 1), false, Continue},
		{"argo-rollouts #2027: little traffic passes", counts(100, 0, 12, 0), true, Inconclusive},
	} {
		j := judge(DefaultJudge(), c.groups, c.baked)
		require.Equal(t, c.want, j.Verdict, "%s: %s", c.name, j.Reason)
		require.NotEmpty(t, j.Reason, "kayenta #521: nobody sees why")
	}
}
