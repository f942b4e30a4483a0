package monitor

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// golden are the samples of the reference vectors: scipy 1.10.1, numpy 1.24.2.
//
//	ref[i] = ((i*7919)%2000)/2000; u = ((i*6007)%1500)/1500; cur[i] = 0.5*u*u + 0.5*u + 0.05
func golden() (ref, cur []float64) {
	for i := range 2000 {
		ref = append(ref, float64((i*7919)%2000)/2000)
	}
	for i := range 1500 {
		u := float64((i*6007)%1500) / 1500
		cur = append(cur, 0.5*u*u+0.5*u+0.05)
	}
	return ref, cur
}

func TestPSI_EqualsEvidently(t *testing.T) {
	// numpy.histogram of the golden samples on numpy.histogram_bin_edges(concat, "sturges")
	ref := []int64{162, 161, 162, 161, 161, 162, 161, 162, 161, 161, 162, 161, 63}
	cur := []int64{88, 194, 163, 143, 130, 119, 110, 104, 98, 94, 89, 85, 83}
	require.InDelta(t, 0.08013950498198795, PSI(ref, cur), 1e-14)
	// with an empty category on either side
	require.InDelta(t, 0.4096539264698713, PSI([]int64{500, 300, 150, 50, 0}, []int64{380, 310, 200, 0, 10}), 1e-14)
	require.Zero(t, PSI(nil, cur))
}

func TestKolmogorovSmirnov_EqualsScipy(t *testing.T) {
	ref, cur := golden()
	require.InDelta(t, 0.0755, KolmogorovSmirnov(ref, cur), 1e-12)                  // scipy.stats.ks_2samp(ref, cur)
	require.InEpsilon(t, 0.0001075697136245121, KSPValue(0.0755, 2000, 1500), 0.03) // scipy.stats.kstwo.sf(D, 857)
	small := make([]float64, 300)
	for i, v := range ref[400:700] {
		small[i] = 0.97*v + 0.02
	}
	d := KolmogorovSmirnov(ref[:400], small)
	require.InDelta(t, 0.029166666666666667, d, 1e-12)
	require.InDelta(t, 0.9978198301164457, KSPValue(d, 400, 300), 0.002)
}

func TestBenjaminiHochberg_EqualsScipy(t *testing.T) {
	// scipy.stats.false_discovery_control([0.01, 0.04, 0.03, 0.005])
	require.InDeltaSlice(t, []float64{0.02, 0.04, 0.04, 0.02}, BenjaminiHochberg([]float64{0.01, 0.04, 0.03, 0.005}), 1e-12)
}

func TestLogLossAndBrier_EqualScikitLearn(t *testing.T) {
	p, y := []float64{0.9, 0.2, 0.6}, []float64{1, 0, 0}
	require.InDelta(t, 0.41493159961539694, LogLoss(p, y), 1e-12) // sklearn.metrics.log_loss
	require.InDelta(t, 0.13666666666666666, Brier(p, y), 1e-12)   // sklearn.metrics.brier_score_loss
}

func TestProfile_AWindowIsTheSumOfItsParts(t *testing.T) {
	ref, cur := golden()
	b := BuildBaseline([]string{"x"}, [][]float64{ref})
	f := b.Features[0]
	cur = append(cur, math.NaN(), math.Inf(1))
	var whole, left, right Profile
	for i, v := range cur {
		whole.Add(f, v)
		if i%3 == 0 {
			left.Add(f, v)
		} else {
			right.Add(f, v)
		}
	}
	right.Merge(left)
	require.Equal(t, whole.Bins, right.Bins)
	require.Equal(t, [2]int64{1502, 2}, [2]int64{right.Count, right.Missing})
	require.InDelta(t, whole.Mean(), right.Mean(), 1e-12)
	require.InDelta(t, whole.Max, right.Max, 0)
	exact := KolmogorovSmirnov(ref, cur[:1500])
	require.InDelta(t, exact, BinnedKS(f.Profile.Bins, whole.Bins), 1.0/profileBins+1e-9)
}

func TestCheckDrift_NeedsEffectAndRows(t *testing.T) {
	ref, cur := golden()
	shifted := make([]float64, len(ref))
	for i, v := range ref {
		shifted[i] = v + 0.5
	}
	kinds := make([]float64, len(ref))
	for i := range kinds {
		kinds[i] = float64(i % 3)
	}
	b := BuildBaseline([]string{"x", "kind"}, [][]float64{ref, kinds})
	require.Equal(t, Categorical, b.Features[1].Kind)
	window := func(x, k []float64) map[string]Profile {
		out := map[string]Profile{}
		for i, values := range [][]float64{x, k} {
			var p Profile
			for _, v := range values {
				p.Add(b.Features[i], v)
			}
			out[b.Features[i].Name] = p
		}
		return out
	}
	require.Equal(t, NoDrift, CheckDrift(b, window(ref, kinds), DefaultDrift()).Status)
	require.Equal(t, Drift, CheckDrift(b, window(shifted, kinds), DefaultDrift()).Status)
	require.Equal(t, NoDrift, CheckDrift(b, window(cur, kinds), DefaultDrift()).Features[0].Status, "PSI 0.08 is stable, however small its p")
	require.Equal(t, TooFew, CheckDrift(b, window(shifted[:100], kinds[:100]), DefaultDrift()).Status)
	r := CheckDrift(b, window(ref, append(kinds, 7, 7, 7, 7)), DefaultDrift())
	require.Positive(t, r.Features[1].New)
}
