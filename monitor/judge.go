package monitor

import (
	"fmt"
	"math"
	"time"
)

// Verdict is what the judge says.
type Verdict string

// The verdicts. Pass ends a bake well; Inconclusive is the answer when there is not enough data, never Pass.
const (
	Continue     Verdict = "continue"
	Pass         Verdict = "pass"
	Rollback     Verdict = "rollback"
	Inconclusive Verdict = "inconclusive"
)

// ArmCount is what was counted of one arm.
type ArmCount struct {
	Requests  int64         `json:"requests"`
	Errors    int64         `json:"errors"`
	Votes     int64         `json:"votes"` // callers, each at most once in a vote epoch
	VoteFails int64         `json:"vote_fails"`
	NotFinite int64         `json:"not_finite"`
	Latency   map[int]int64 `json:"-"`
}

// Add adds o to a.
func (a *ArmCount) Add(o ArmCount) {
	a.Requests += o.Requests
	a.Errors += o.Errors
	a.Votes += o.Votes
	a.VoteFails += o.VoteFails
	a.NotFinite += o.NotFinite
	if a.Latency == nil {
		a.Latency = map[int]int64{}
	}
	for b, n := range o.Latency {
		a.Latency[b] += n
	}
}

// Group is what two arms did at the same time, at the same gateway, under the same route revision.
type Group struct {
	Stable    ArmCount
	Candidate ArmCount
}

// JudgeConfig are the judge's thresholds. They are the same in production and in the demo.
type JudgeConfig struct {
	Alpha          float64 `json:"alpha"`            // chance of a false rollback over the whole roll-out, split over the metrics
	ErrorMargin    float64 `json:"error_margin"`     // a candidate passes when its error rate is below stable's plus this
	LatencyFactor  float64 `json:"latency_factor"`   // a candidate this many times slower, or more, is worse
	LatencyMargin  float64 `json:"latency_margin"`   // share of requests that must be slower for it to count
	MinRequests    int64   `json:"min_requests"`     // of the candidate, before it can pass
	MaxErrorRate   float64 `json:"max_error_rate"`   // absolute guardrail; 0 = none
	MaxP99Millis   float64 `json:"max_p99_ms"`       // absolute guardrail; 0 = none
	GuardRequests  int64   `json:"guard_requests"`   // requests before the two guardrails above act
	AllowNotFinite bool    `json:"allow_not_finite"` // NaN and Inf in answers are no fault
}

// DefaultJudge returns the thresholds that a roll-out gets when it names none.
func DefaultJudge() JudgeConfig {
	return JudgeConfig{
		Alpha: 0.05, ErrorMargin: 0.02, LatencyFactor: 1.3, LatencyMargin: 0.1, MinRequests: 200, GuardRequests: 50,
	}
}

// Validate returns an error that names every threshold out of range.
func (c JudgeConfig) Validate() error {
	switch {
	case c.Alpha <= 0 || c.Alpha >= 0.5:
		return fmt.Errorf("alpha %v: want more than 0 and less than 0.5", c.Alpha)
	case c.ErrorMargin <= 0 || c.ErrorMargin >= 1:
		return fmt.Errorf("error_margin %v: want between 0 and 1", c.ErrorMargin)
	case c.LatencyFactor < 1:
		return fmt.Errorf("latency_factor %v: want at least 1", c.LatencyFactor)
	case c.LatencyMargin < 0 || c.LatencyMargin >= 1:
		return fmt.Errorf("latency_margin %v: want 0 to 1", c.LatencyMargin)
	case c.MinRequests < 1:
		return fmt.Errorf("min_requests %v: want at least 1", c.MinRequests)
	}
	return nil
}

// Judgement is a verdict with the numbers it was made on.
type Judgement struct {
	Verdict      Verdict  `json:"verdict"`
	Reason       string   `json:"reason"`
	Stable       ArmCount `json:"stable"`
	Candidate    ArmCount `json:"candidate"`
	ErrorE       float64  `json:"error_e"`       // e-value against "the candidate errs no more often"
	ErrorLimit   float64  `json:"error_limit"`   // rollback at or above
	PassE        float64  `json:"pass_e"`        // e-value against "the candidate errs more often by the margin"
	PassLimit    float64  `json:"pass_limit"`    // pass at or above
	LatencyGap   float64  `json:"latency_gap"`   // how far the candidate's band lies below stable's; > 0 is slower
	StableP99    float64  `json:"stable_p99_ms"` //
	CandidateP99 float64  `json:"candidate_p99_ms"`
}

// budgeted is the number of metrics the error budget is split over: errors and latency, and one kept for outputs.
const budgeted = 3

// oddsGrid are the odds ratios the e-process bets on, equally.
var oddsGrid = []float64{1.25, 1.5, 2, 3, 5, 10}

// Judge looks at all groups since the candidate got its first traffic. baked says that the bake has taken its time and
// requests; only then can the candidate pass. The order of groups does not matter, and each must come once.
//
// Errors: a one-sided e-process on concurrent counts. Given that an error happened in a group, it is the candidate's
// with probability rho, its share of the votes there, if the arms err equally; with odds ratio psi it is
// theta = psi rho / (psi rho + 1 - rho). The e-value is the mean over psi of prod (theta/rho)^x ((1-theta)/(1-rho))^y;
// rejecting at 1/alpha keeps the chance of ever rejecting falsely below alpha (Ville), however often one looks
// (Lindon and Malek, arXiv:2011.03567).
//
// Latency: each arm's distribution gets a band that holds at all times (Howard and Ramdas, arXiv:1906.09925, theorem
// 2, with constant 0.85); the candidate is worse when its whole band lies below stable's, read at LatencyFactor times
// the duration, by more than LatencyMargin.
func Judge(c JudgeConfig, groups []Group, baked bool) Judgement {
	alpha := c.Alpha / budgeted
	j := Judgement{ErrorLimit: 1 / alpha, PassLimit: 1 / c.Alpha}
	for _, g := range groups {
		j.Stable.Add(g.Stable)
		j.Candidate.Add(g.Candidate)
	}
	j.ErrorE = errorE(groups)
	j.PassE = passE(j.Stable, j.Candidate, c.ErrorMargin)
	j.LatencyGap = latencyGap(j.Stable.Latency, j.Candidate.Latency, c.LatencyFactor, alpha)
	j.StableP99 = millis(LatencyQuantile(j.Stable.Latency, 0.99))
	j.CandidateP99 = millis(LatencyQuantile(j.Candidate.Latency, 0.99))
	j.Verdict, j.Reason = decide(c, j, baked)
	return j
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func decide(c JudgeConfig, j Judgement, baked bool) (Verdict, string) {
	if reason := Guard(c, j.Candidate); reason != "" {
		return Rollback, reason
	}
	switch {
	case j.ErrorE >= j.ErrorLimit:
		return Rollback, fmt.Sprintf("the candidate errs more often: %d of %d against %d of %d (e-value %.3g, limit %.3g)",
			j.Candidate.Errors, j.Candidate.Requests, j.Stable.Errors, j.Stable.Requests, j.ErrorE, j.ErrorLimit)
	case j.LatencyGap > c.LatencyMargin:
		return Rollback, fmt.Sprintf("the candidate is slower: p99 %.1f ms against %.1f ms (gap %.2f, limit %.2f)",
			j.CandidateP99, j.StableP99, j.LatencyGap, c.LatencyMargin)
	case !baked:
		return Continue, "baking"
	case j.Candidate.Requests == 0:
		return Inconclusive, "the candidate has had no traffic"
	case j.Candidate.Requests < c.MinRequests:
		return Inconclusive, fmt.Sprintf("the candidate has had %d requests of the %d needed", j.Candidate.Requests, c.MinRequests)
	case j.PassE < j.PassLimit:
		return Inconclusive, fmt.Sprintf("an error rate worse by %.3g is not excluded yet (e-value %.3g, limit %.3g)", c.ErrorMargin, j.PassE, j.PassLimit)
	}
	return Pass, fmt.Sprintf("an error rate worse by %.3g is excluded (e-value %.3g, limit %.3g)", c.ErrorMargin, j.PassE, j.PassLimit)
}

// Guard returns why an absolute guardrail trips on what one arm did, "" when none does. Guardrails need no comparison.
func Guard(c JudgeConfig, a ArmCount) string {
	if a.NotFinite > 0 && !c.AllowNotFinite {
		return fmt.Sprintf("%d answers hold NaN or Inf", a.NotFinite)
	}
	if a.Requests < max(c.GuardRequests, 1) {
		return ""
	}
	if rate := float64(a.Errors) / float64(a.Requests); c.MaxErrorRate > 0 && rate > c.MaxErrorRate {
		return fmt.Sprintf("error rate %.3f is over the limit %.3f", rate, c.MaxErrorRate)
	}
	if p99 := millis(LatencyQuantile(a.Latency, 0.99)); c.MaxP99Millis > 0 && p99 > c.MaxP99Millis {
		return fmt.Sprintf("p99 of %.1f ms is over the objective %.1f ms", p99, c.MaxP99Millis)
	}
	return ""
}

// errorE is the e-process of Judge. Special cases: 1 without groups in which both arms have votes.
func errorE(groups []Group) float64 {
	logs := make([]float64, len(oddsGrid))
	for _, g := range groups {
		nc, ns := float64(g.Candidate.Votes), float64(g.Stable.Votes)
		if nc == 0 || ns == 0 {
			continue
		}
		rho := nc / (nc + ns)
		x, y := float64(g.Candidate.VoteFails), float64(g.Stable.VoteFails)
		for i, psi := range oddsGrid {
			theta := psi * rho / (psi*rho + 1 - rho)
			logs[i] += x*math.Log(theta/rho) + y*math.Log((1-theta)/(1-rho))
		}
	}
	return meanExp(logs)
}

// passE is an e-value against "the candidate's error rate is at least stable's observed rate plus margin": the mean of
// the likelihood ratios of three smaller rates against that one. Stable's rate is a plug-in estimate.
func passE(stable, candidate ArmCount, margin float64) float64 {
	n, x := float64(candidate.Votes), float64(candidate.VoteFails)
	if n == 0 {
		return 1
	}
	base := 0.0
	if stable.Votes > 0 {
		base = float64(stable.VoteFails) / float64(stable.Votes)
	}
	null := math.Min(base+margin, 0.999)
	var logs []float64
	for _, share := range []float64{0, 0.25, 0.5} {
		rate := math.Max(base+share*margin, 1e-6)
		logs = append(logs, x*math.Log(rate/null)+(n-x)*math.Log((1-rate)/(1-null)))
	}
	return meanExp(logs)
}

// meanExp returns mean(exp(logs)), at most MaxFloat64.
func meanExp(logs []float64) float64 {
	top := math.Inf(-1)
	for _, l := range logs {
		top = math.Max(top, l)
	}
	sum := 0.0
	for _, l := range logs {
		sum += math.Exp(l - top)
	}
	return math.Min(math.Exp(top)*sum/float64(len(logs)), math.MaxFloat64)
}

// bandWidth is the half-width of a band that covers the whole distribution function at all sample sizes at once with
// probability 1 - alpha.
func bandWidth(n, alpha float64) float64 {
	return 0.85 * math.Sqrt((math.Log(math.Log(math.E*n))+0.8*math.Log(1612/alpha))/n)
}

// latencyGap returns by how much the candidate's band lies below stable's at the worst duration, each arm with half of
// alpha; at most 0 when the bands touch everywhere.
func latencyGap(stable, candidate map[int]int64, factor, alpha float64) float64 {
	lowest, highest, ns := bounds(stable)
	_, _, nc := bounds(candidate)
	if ns == 0 || nc == 0 {
		return 0
	}
	shift := int(math.Ceil(latencyPerOctave*math.Log2(factor) - 1e-9))
	width := bandWidth(float64(ns), alpha/2) + bandWidth(float64(nc), alpha/2)
	var cs, cc int64
	for b, n := range candidate {
		if b < lowest+shift {
			cc += n
		}
	}
	gap := math.Inf(-1)
	for b := lowest; b <= highest; b++ {
		cs += stable[b]
		cc += candidate[b+shift]
		gap = math.Max(gap, float64(cs)/float64(ns)-float64(cc)/float64(nc)-width)
	}
	return gap
}

// DetectableOddsRatio returns the smallest odds ratio of the grid and beyond (up to 100) whose e-process is expected to
// cross 1/alpha within n candidate and m stable votes at base error rate p; 0 when none is.
func DetectableOddsRatio(c JudgeConfig, n, m, p float64) float64 {
	limit := math.Log(budgeted / c.Alpha)
	for psi := 1.1; psi <= 100; psi *= 1.1 {
		bad := psi * p / (1 - p + psi*p)
		rho := n / (n + m)
		logs := make([]float64, len(oddsGrid))
		for i, bet := range oddsGrid {
			theta := bet * rho / (bet*rho + 1 - rho)
			logs[i] = n*bad*math.Log(theta/rho) + m*p*math.Log((1-theta)/(1-rho))
		}
		if e := meanExp(logs); e > 0 && math.Log(e) >= limit {
			return psi
		}
	}
	return 0
}
