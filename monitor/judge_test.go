package monitor

import (
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
	for i := range groups {
		if Judge(DefaultJudge(), groups[:i+1], false).Verdict == Rollback {
			return true
		}
	}
	return false
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
	j := Judge(DefaultJudge(), nil, true)
	require.Equal(t, Inconclusive, j.Verdict)
	j = Judge(DefaultJudge(), []Group{{Stable: ArmCount{Requests: 1000, Votes: 1000}}}, true)
	require.Equal(t, Inconclusive, j.Verdict)
	require.Equal(t, "the candidate has had no traffic", j.Reason)
	clean := []Group{{Stable: ArmCount{Requests: 1000, Votes: 1000}, Candidate: ArmCount{Requests: 250, Votes: 250}}}
	require.Equal(t, Pass, Judge(DefaultJudge(), clean, true).Verdict)
	require.Equal(t, Continue, Judge(DefaultJudge(), clean, false).Verdict)
}

func TestJudge_GuardrailsActAlone(t *testing.T) {
	nan := []Group{{Candidate: ArmCount{Requests: 1, Votes: 1, NotFinite: 1}}}
	require.Equal(t, Rollback, Judge(DefaultJudge(), nan, false).Verdict)
	c := DefaultJudge()
	c.MaxErrorRate = 0.1
	bad := []Group{{Candidate: ArmCount{Requests: 60, Errors: 20}}}
	require.Equal(t, Rollback, Judge(c, bad, false).Verdict)
}

func latencies(r *rand.Rand, n int, scale float64) ArmCount {
	a := ArmCount{Requests: int64(n), Votes: int64(n), Latency: map[int]int64{}}
	for range n {
		a.Latency[LatencyBucket(time.Duration(scale*(1+r.ExpFloat64())*float64(time.Millisecond)))]++
	}
	return a
}

func TestJudge_LatencyBandSeesASlowerCandidateOnly(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	same := []Group{{Stable: latencies(r, 5000, 1), Candidate: latencies(r, 500, 1)}}
	require.Equal(t, Pass, Judge(DefaultJudge(), same, true).Verdict)
	slow := []Group{{Stable: latencies(r, 5000, 1), Candidate: latencies(r, 500, 2.5)}}
	j := Judge(DefaultJudge(), slow, true)
	require.Equal(t, Rollback, j.Verdict)
	require.Contains(t, j.Reason, "slower")
	fast := []Group{{Stable: latencies(r, 5000, 2.5), Candidate: latencies(r, 500, 1)}}
	require.Equal(t, Pass, Judge(DefaultJudge(), fast, true).Verdict)
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
	few := DetectableOddsRatio(DefaultJudge(), 360, 3240, 0.01)
	many := DetectableOddsRatio(DefaultJudge(), 3600, 32400, 0.01)
	require.Greater(t, few, many)
	require.Greater(t, many, 1.2)
	require.Less(t, many, 3.0)
}
