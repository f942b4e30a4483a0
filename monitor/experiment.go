package monitor

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// Difference is how much one arm's mean exceeds stable's, with a confidence sequence around it.
type Difference struct {
	Version int     `json:"version"`
	N       int64   `json:"n"` // values of this arm
	Mean    float64 `json:"mean"`
	Stable  float64 `json:"stable"` // mean of the stable arm
	Lower   float64 `json:"lower"`
	Upper   float64 `json:"upper"`
}

// sequenceTuning is the number of values at which a confidence sequence is narrowest.
const sequenceTuning = 5000

// Compare returns the difference of two means with an asymptotic confidence sequence: it holds at all sample sizes at
// once with probability 1 - alpha, so it may be looked at as often as one likes (Waudby-Smith, Arbour, Sinha, Kennedy,
// Ramdas, arXiv:2103.06476; tuned as GrowthBook does). It ends at infinity while an arm has fewer than 30 values.
func Compare(stable, arm Moments, alpha float64) Difference {
	d := Difference{N: arm.N, Mean: arm.Mean(), Stable: stable.Mean(), Lower: math.Inf(-1), Upper: math.Inf(1)}
	const least = 30 // for the asymptotics
	if stable.N < least || arm.N < least {
		d.Lower, d.Upper = -math.MaxFloat64, math.MaxFloat64 // JSON knows no infinity
		return d
	}
	n := float64(stable.N + arm.N)
	variance := n * (stable.Variance()/float64(stable.N) + arm.Variance()/float64(arm.N))
	rho := math.Sqrt((-2*math.Log(alpha) + math.Log(-2*math.Log(alpha)+1)) / sequenceTuning)
	m := n * rho * rho
	half := math.Sqrt(variance) * math.Sqrt(2*(m+1)/(m*n)*math.Log(math.Sqrt(m+1)/alpha))
	d.Lower, d.Upper = d.Mean-d.Stable-half, d.Mean-d.Stable+half
	return d
}

// Goal says which way a business metric is better.
type Goal string

// The goals.
const (
	Higher Goal = "higher"
	Lower  Goal = "lower"
)

// JudgeMetric compares every variant's feedback with stable's. A variant wins when its confidence sequence excludes
// "no better than stable", with alpha split over the variants; of several winners the one with the best bound. It says
// Pass with the winner's version, or with stable's when every variant is certainly no better by more than margin;
// Continue otherwise.
func JudgeMetric(c JudgeConfig, goal Goal, margin float64, stableVersion int, stable Moments, variants map[int]Moments) (Verdict, string, int, []Difference) {
	var all []Difference
	winner, best, hopeless := 0, 0.0, len(variants) > 0
	for _, version := range slices.Sorted(maps.Keys(variants)) {
		d := Compare(stable, variants[version], c.Alpha/float64(len(variants)))
		d.Version = version
		all = append(all, d)
		low, high := d.Lower, d.Upper
		if goal == Lower {
			low, high = -d.Upper, -d.Lower
		}
		if low > 0 && low > best {
			winner, best = version, low
		}
		hopeless = hopeless && high <= margin
	}
	switch {
	case winner != 0:
		return Pass, fmt.Sprintf("version %d is better by at least %.4g", winner, best), winner, all
	case hopeless:
		return Pass, fmt.Sprintf("no variant is better by more than %.4g: version %d stays", margin, stableVersion), stableVersion, all
	}
	return Continue, "no variant is better for certain yet", 0, all
}

// Source is a source of random numbers: a *rand.Rand of math/rand/v2 with a fixed seed is one.
type Source interface {
	Float64() float64     // uniform in [0,1)
	NormFloat64() float64 // standard normal
}

// thompsonDraws per allocation: shares are exact to about a hundredth.
const thompsonDraws = 10_000

// Allocate returns the share of traffic each arm gets by Thompson sampling: the chance that its mean is the best, with
// normal posteriors, and never less than floor. Arms without values are drawn from a wide prior. A source
// with the same seed gives the same shares. Shares add up to 1; floor is at most 1/len(arms).
func Allocate(arms []Moments, goal Goal, floor float64, r Source) []float64 {
	pooled := Moments{}
	for _, a := range arms {
		pooled.Merge(a)
	}
	spread := math.Max(pooled.Variance(), 1e-12)
	wins := make([]float64, len(arms))
	for range thompsonDraws {
		best, top := 0, math.Inf(-1)
		for i, a := range arms {
			n := float64(a.N) + 1 // the prior is one value with the pooled mean and spread
			mean := (a.Sum + pooled.Mean()) / n
			variance := (a.Variance()*math.Max(float64(a.N-1), 0) + spread) / n
			draw := mean + r.NormFloat64()*math.Sqrt(variance/n)
			if goal == Lower {
				draw = -draw
			}
			if draw > top {
				best, top = i, draw
			}
		}
		wins[best]++
	}
	for i := range wins {
		wins[i] = floor + wins[i]/thompsonDraws*(1-floor*float64(len(arms)))
	}
	return wins
}
