package monitor

import (
	"fmt"
	"maps"
	"math"
	"slices"
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

// JudgeConfig are the judge's thresholds. They are the same in production and in the demo.
type JudgeConfig struct {
	Alpha           float64 `json:"alpha"`            // chance of a false rollback over the whole roll-out, split over the metrics
	PassAlpha       float64 `json:"pass_alpha"`       // chance that a candidate passes whose error rate is worse by error_margin
	ErrorMargin     float64 `json:"error_margin"`     // a candidate passes when its error rate is below stable's plus this
	LatencyFactor   float64 `json:"latency_factor"`   // a candidate this many times slower, or more, is worse
	LatencyMargin   float64 `json:"latency_margin"`   // share of requests that must be slower for it to count
	OutputMargin    float64 `json:"output_margin"`    // share of answers that may be distributed differently; 1 = not compared
	MinRequests     int64   `json:"min_requests"`     // of the candidate, before it can pass
	MaxErrorRate    float64 `json:"max_error_rate"`   // absolute guardrail; 0 = none
	MaxP99Millis    float64 `json:"max_p99_ms"`       // absolute guardrail; 0 = none
	MaxCrashes      int     `json:"max_crashes"`      // absolute guardrail: this many workers that died while running it; 0 = none
	GuardRequests   int64   `json:"guard_requests"`   // requests before the guardrails on errors and p99 act
	AllowNotFinite  bool    `json:"allow_not_finite"` // NaN and Inf in answers are no fault
	ShadowTolerance float64 `json:"shadow_tolerance"` // gap up to which two answers agree
	MaxDisagreement float64 `json:"max_disagreement"` // share of pairs that may disagree
	MaxLossGain     float64 `json:"max_loss_gain"`    // labels: the candidate's mean loss may exceed stable's by this much; 0 = not compared
}

// DefaultJudge returns the thresholds that a roll-out gets when it names none.
func DefaultJudge() JudgeConfig {
	return JudgeConfig{
		Alpha: 0.03, PassAlpha: 0.05, ErrorMargin: 0.02, LatencyFactor: 1.3, LatencyMargin: 0.1, OutputMargin: 0.3, MinRequests: 200,
		MaxCrashes: 2, GuardRequests: 50, ShadowTolerance: 0.05, MaxDisagreement: 0.1,
	}
}

// Validate returns an error that names the first threshold out of range.
func (c JudgeConfig) Validate() error {
	switch {
	case c.Alpha <= 0 || c.Alpha >= 0.5:
		return fmt.Errorf("alpha %v: want more than 0 and less than 0.5", c.Alpha)
	case c.PassAlpha <= 0 || c.PassAlpha >= 0.5:
		return fmt.Errorf("pass_alpha %v: want more than 0 and less than 0.5", c.PassAlpha)
	case c.ErrorMargin <= 0 || c.ErrorMargin >= 1:
		return fmt.Errorf("error_margin %v: want between 0 and 1", c.ErrorMargin)
	case c.LatencyFactor < 1:
		return fmt.Errorf("latency_factor %v: want at least 1", c.LatencyFactor)
	case c.LatencyMargin < 0 || c.LatencyMargin >= 1:
		return fmt.Errorf("latency_margin %v: want 0 to 1", c.LatencyMargin)
	case c.OutputMargin < 0 || c.OutputMargin > 1:
		return fmt.Errorf("output_margin %v: want 0 to 1 (not compared)", c.OutputMargin)
	case c.MinRequests < 1:
		return fmt.Errorf("min_requests %v: want at least 1", c.MinRequests)
	case c.MaxErrorRate < 0 || c.MaxErrorRate > 1:
		return fmt.Errorf("max_error_rate %v: want 0 (none) to 1", c.MaxErrorRate)
	case c.MaxP99Millis < 0 || c.MaxCrashes < 0 || c.GuardRequests < 0 || c.MaxLossGain < 0:
		return fmt.Errorf("max_p99_ms %v, max_crashes %d, guard_requests %d, max_loss_gain %v: want 0 or more", c.MaxP99Millis, c.MaxCrashes, c.GuardRequests, c.MaxLossGain)
	case c.ShadowTolerance < 0 || c.MaxDisagreement <= 0 || c.MaxDisagreement >= 1:
		return fmt.Errorf("shadow_tolerance %v, max_disagreement %v: want 0 or more, and between 0 and 1", c.ShadowTolerance, c.MaxDisagreement)
	}
	return nil
}

// Judgement is a verdict with the numbers it was made on.
type Judgement struct {
	Verdict       Verdict      `json:"verdict"`
	Reason        string       `json:"reason"`
	Stable        ArmCount     `json:"stable"`
	Candidate     ArmCount     `json:"candidate"`
	ErrorE        float64      `json:"error_e"`       // e-value against "the candidate errs no more often"
	ErrorLimit    float64      `json:"error_limit"`   // rollback at or above
	PassE         float64      `json:"pass_e"`        // e-value against "the candidate errs more often by the margin"
	PassLimit     float64      `json:"pass_limit"`    // pass at or above
	LatencyGap    float64      `json:"latency_gap"`   // how far the candidate's band lies below stable's; > 0 is slower
	StableP99     float64      `json:"stable_p99_ms"` //
	CandidateP99  float64      `json:"candidate_p99_ms"`
	OutputGap     float64      `json:"output_gap"`              // how far apart the outputs' bands are; > 0 is different
	SplitE        float64      `json:"split_e"`                 // e-value against "callers were split as the route says"
	Pairs         int64        `json:"pairs,omitempty"`         // shadow: requests that both answered
	Disagreements int64        `json:"disagreements,omitempty"` // of them, with a gap over the tolerance
	DisagreeE     float64      `json:"disagree_e,omitempty"`    // e-value against "they disagree no more often than allowed"
	AgreeE        float64      `json:"agree_e,omitempty"`       // e-value against "they disagree more often than allowed"
	Loss          *Difference  `json:"loss,omitempty"`          // labels: of the candidate's mean loss against stable's
	Crashes       int          `json:"crashes,omitempty"`       // workers that died while running the candidate
	Metric        []Difference `json:"metric,omitempty"`        // experiment: of every variant against stable
	Winner        int          `json:"winner,omitempty"`        // experiment: the version that is better, for certain
}

// MetricBudget is the part of the error budget that each metric gets: errors, latency, outputs, and labels where they are
// compared.
func (c JudgeConfig) MetricBudget() float64 {
	if c.MaxLossGain > 0 {
		return c.Alpha / 4
	}
	return c.Alpha / 3
}

// SplitLimit is the e-value at which the split of callers is not believed any more.
const SplitLimit = 1000

// oddsGrid are the odds ratios the e-process bets on, equally.
var oddsGrid = []float64{1.5, 2, 3, 5, 10}

// Beside is what the judge is told beside the tally.
type Beside struct {
	Guard   ArmCount    // all that is known of the candidate, seconds that are not folded yet included; guardrails act on it
	Crashes int         // workers that died while running the candidate
	Loss    *Difference // of mean losses on labelled requests
	Baked   bool        // the bake has taken its time and requests; only then can the candidate pass
}

// Judge looks at a tally since the candidate got its first traffic.
//
// Errors: a one-sided e-process on concurrent counts. Given that an error happened in a group, it is the candidate's
// with probability rho, its share of the votes there, if the arms err equally; with odds ratio psi it is
// theta = psi rho / (psi rho + 1 - rho). The e-value is the mean over psi of prod (theta/rho)^x ((1-theta)/(1-rho))^y;
// rejecting at 1/alpha keeps the chance of ever rejecting falsely below alpha (Ville), however often one looks
// (Lindon and Malek, arXiv:2011.03567). A caller with a key leaves the votes after its first failure in a step, as in a
// log-rank test, so that one broken caller is one error.
//
// Latency and outputs: each arm's distribution gets a band that holds at all times (Howard and Ramdas,
// arXiv:1906.09925, theorem 2, with constant 0.85). The candidate is slower when its whole band lies below stable's,
// read at LatencyFactor times the duration, by more than LatencyMargin; its answers are different when the bands are
// further apart than OutputMargin anywhere, in any of the first eight columns.
//
// Pass: a mixture likelihood ratio against an error rate worse by ErrorMargin. Split: a beta-binomial Bayes factor
// against the route's own shares (Lindon and Malek, section 3), whose rejection makes everything else inconclusive.
func Judge(c JudgeConfig, t Tally, b Beside) Judgement {
	j := Judgement{
		Stable: t.Stable.Plain(), Candidate: t.Candidate.Plain(), ErrorLimit: 1 / c.MetricBudget(), PassLimit: 1 / c.PassAlpha,
		ErrorE: meanExp(t.Bets), PassE: passE(t.Stable, t.Candidate, c.ErrorMargin), SplitE: splitE(t.Splits),
		LatencyGap: latencyGap(t.Stable.VoteLatency, t.Candidate.VoteLatency, c.LatencyFactor, c.MetricBudget()),
		StableP99:  millis(LatencyQuantile(t.Stable.Latency, 0.99)), CandidateP99: millis(LatencyQuantile(t.Candidate.Latency, 0.99)),
		Loss: b.Loss, Crashes: b.Crashes,
	}
	if t.Pairs.Pairs > 0 {
		j.Disagreements, j.Pairs = t.Pairs.disagreements(c.ShadowTolerance)
		j.DisagreeE = rateE(j.Disagreements, j.Pairs, c.MaxDisagreement, 1.25*c.MaxDisagreement, 1.5*c.MaxDisagreement, 2*c.MaxDisagreement, 4*c.MaxDisagreement)
		j.AgreeE = rateE(j.Disagreements, j.Pairs, c.MaxDisagreement, 0.01*c.MaxDisagreement, 0.25*c.MaxDisagreement, 0.5*c.MaxDisagreement)
	} else if c.OutputMargin < 1 {
		j.OutputGap = outputGap(t.Stable.Outputs, t.Candidate.Outputs, c.MetricBudget())
	}
	j.Verdict, j.Reason = decide(c, j, b)
	return j
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func decide(c JudgeConfig, j Judgement, b Beside) (Verdict, string) {
	if reason := Guard(c, b.Guard, b.Crashes); reason != "" {
		return Rollback, reason
	}
	if reason := worse(c, j); reason != "" {
		return Rollback, reason
	}
	switch {
	case j.SplitE >= SplitLimit:
		return Inconclusive, fmt.Sprintf("callers were not split as the route says, so nothing can be compared (e-value %.3g, limit %d)", j.SplitE, SplitLimit)
	case !b.Baked:
		return Continue, "baking"
	case j.Candidate.Requests == 0:
		return Inconclusive, "the candidate has had no traffic"
	case j.Candidate.Requests < c.MinRequests:
		return Inconclusive, fmt.Sprintf("the candidate has had %d requests of the %d needed", j.Candidate.Requests, c.MinRequests)
	case j.PassE < j.PassLimit:
		return Inconclusive, fmt.Sprintf("an error rate worse by %.3g is not excluded yet (e-value %.3g, limit %.3g)", c.ErrorMargin, j.PassE, j.PassLimit)
	case j.Pairs > 0 && j.AgreeE < j.PassLimit:
		return Inconclusive, fmt.Sprintf("%d of %d answers disagree; that it is less than %.3g is not certain yet (e-value %.3g, limit %.3g)",
			j.Disagreements, j.Pairs, c.MaxDisagreement, j.AgreeE, j.PassLimit)
	case c.MaxLossGain > 0 && (j.Loss == nil || j.Loss.Upper > c.MaxLossGain):
		return Inconclusive, "labels do not exclude yet that the candidate predicts worse"
	}
	return Pass, fmt.Sprintf("an error rate worse by %.3g is excluded (e-value %.3g, limit %.3g)", c.ErrorMargin, j.PassE, j.PassLimit)
}

// worse returns why a comparison sends the candidate back, "" when none does.
func worse(c JudgeConfig, j Judgement) string {
	switch {
	case j.ErrorE >= j.ErrorLimit:
		return fmt.Sprintf("the candidate errs more often: %d of %d against %d of %d (e-value %.3g, limit %.3g)",
			j.Candidate.Errors, j.Candidate.Requests, j.Stable.Errors, j.Stable.Requests, j.ErrorE, j.ErrorLimit)
	case j.LatencyGap > c.LatencyMargin:
		return fmt.Sprintf("the candidate is slower: p99 %.1f ms against %.1f ms (gap %.2f, limit %.2f)",
			j.CandidateP99, j.StableP99, j.LatencyGap, c.LatencyMargin)
	case j.OutputGap > c.OutputMargin:
		return fmt.Sprintf("the candidate's answers are distributed differently (gap %.2f, limit %.2f)", j.OutputGap, c.OutputMargin)
	case j.DisagreeE >= 1/c.MetricBudget():
		return fmt.Sprintf("%d of %d answers disagree, more than %.3g (e-value %.3g, limit %.3g)",
			j.Disagreements, j.Pairs, c.MaxDisagreement, j.DisagreeE, 1/c.MetricBudget())
	case c.MaxLossGain > 0 && j.Loss != nil && j.Loss.Lower > c.MaxLossGain:
		return fmt.Sprintf("labels say that the candidate predicts worse: its mean loss is higher by %.3g to %.3g", j.Loss.Lower, j.Loss.Upper)
	}
	return ""
}

// Guard returns why an absolute guardrail trips on what one arm did, "" when none does. Guardrails need no comparison.
func Guard(c JudgeConfig, a ArmCount, crashes int) string {
	if a.NotFinite > 0 && !c.AllowNotFinite {
		return fmt.Sprintf("%d answers hold NaN or Inf", a.NotFinite)
	}
	if c.MaxCrashes > 0 && crashes >= c.MaxCrashes {
		return fmt.Sprintf("%d workers died while they ran it", crashes)
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

// passE is an e-value against "the candidate's error rate is at least stable's observed rate plus margin": the mean of
// the likelihood ratios of three smaller rates against that one. Stable's rate is a plug-in estimate.
func passE(stable, candidate ArmCount, margin float64) float64 {
	base := 0.0
	if stable.Votes > 0 {
		base = float64(stable.VoteFails) / float64(stable.Votes)
	}
	return rateE(candidate.VoteFails, candidate.Votes, math.Min(base+margin, 0.999), base, base+margin/4, base+margin/2)
}

// rateE is an e-value against "the rate of x in n is null, or further from the bets": the mean of the likelihood ratios
// of the bets, which lie all on one side of null, against it. 1 when n is 0.
func rateE(x, n int64, null float64, bets ...float64) float64 {
	if n == 0 {
		return 1
	}
	logs := make([]float64, len(bets))
	for i, b := range bets {
		b = math.Min(math.Max(b, 1e-6), 1-1e-6)
		logs[i] = float64(x)*math.Log(b/null) + float64(n-x)*math.Log((1-b)/(1-null))
	}
	return meanExp(logs)
}

// meanExp returns mean(exp(logs)), at most MaxFloat64; 1 of nothing.
func meanExp(logs []float64) float64 {
	if len(logs) == 0 {
		return 1
	}
	top := slices.Max(logs)
	sum := 0.0
	for _, l := range logs {
		sum += math.Exp(l - top)
	}
	return math.Min(math.Exp(top)*sum/float64(len(logs)), math.MaxFloat64)
}

// splitPrior is the weight of the prior of splitE, in callers.
const splitPrior = 100

// splitE is the product over revisions of the Bayes factor of "the candidate's share is anything near the route's"
// (beta, centred there) against "it is the route's".
func splitE(splits map[int64]Split) float64 {
	sum := 0.0
	for _, revision := range slices.Sorted(maps.Keys(splits)) {
		s := splits[revision]
		if s.Share <= 0 || s.Share >= 1 {
			continue
		}
		a, b := splitPrior*s.Share, splitPrior*(1-s.Share)
		c, st := float64(s.Candidate), float64(s.Stable)
		sum += logBeta(a+c, b+st) - logBeta(a, b) - c*math.Log(s.Share) - st*math.Log(1-s.Share)
	}
	return math.Min(math.Exp(sum), math.MaxFloat64)
}

func logBeta(a, b float64) float64 {
	la, _ := math.Lgamma(a)
	lb, _ := math.Lgamma(b)
	lab, _ := math.Lgamma(a + b)
	return la + lb - lab
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

// outputGap returns how far apart the two arms' bands are at the worst value of the worst column; at most 0 when they
// touch everywhere. Alpha is split over columns and arms.
func outputGap(stable, candidate map[int]int64, alpha float64) float64 {
	type column struct{ ns, nc, cs, cc, apart float64 }
	columns := map[int]*column{}
	of := func(key int) *column {
		c := columns[key/outputSpan]
		if c == nil {
			c = &column{}
			columns[key/outputSpan] = c
		}
		return c
	}
	for k, n := range stable {
		of(k).ns += float64(n)
	}
	for k, n := range candidate {
		of(k).nc += float64(n)
	}
	keys := slices.AppendSeq(slices.Collect(maps.Keys(stable)), maps.Keys(candidate))
	slices.Sort(keys)
	for _, k := range slices.Compact(keys) {
		c := of(k)
		c.cs += float64(stable[k])
		c.cc += float64(candidate[k])
		if c.ns > 0 && c.nc > 0 {
			c.apart = math.Max(c.apart, math.Abs(c.cs/c.ns-c.cc/c.nc))
		}
	}
	gap, share := math.Inf(-1), alpha/2/float64(max(len(columns), 1))
	for _, c := range columns {
		if c.ns > 0 && c.nc > 0 {
			gap = math.Max(gap, c.apart-bandWidth(c.ns, share)-bandWidth(c.nc, share))
		}
	}
	return finiteOr0(gap)
}

// Expected is the traffic a step of a bake can count on, in votes.
type Expected struct {
	Candidate float64
	Stable    float64
}

// DetectableOddsRatio returns the smallest odds ratio from 1.1 to 100 whose e-process is expected to cross its limit
// within the steps at base error rate p; 0 when none is.
func DetectableOddsRatio(c JudgeConfig, steps []Expected, p float64) float64 {
	limit := -math.Log(c.MetricBudget())
	for psi := 1.1; psi <= 100; psi *= 1.1 {
		bad := psi * p / (1 - p + psi*p)
		logs := make([]float64, len(oddsGrid))
		for _, s := range steps {
			if s.Candidate <= 0 || s.Stable <= 0 {
				continue
			}
			rho := s.Candidate / (s.Candidate + s.Stable)
			for i, bet := range oddsGrid {
				theta := bet * rho / (bet*rho + 1 - rho)
				logs[i] += s.Candidate*bad*math.Log(theta/rho) + s.Stable*p*math.Log((1-theta)/(1-rho))
			}
		}
		if e := meanExp(logs); e > 0 && math.Log(e) >= limit {
			return psi
		}
	}
	return 0
}
