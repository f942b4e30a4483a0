package monitor

import (
	"math"
	"runtime"
	"slices"
	"sync"
)

// Scenario is the traffic of a simulated bake.
type Scenario struct {
	Name       string
	PerMinute  float64 // requests of both arms
	Base       float64 // error rate of the stable arm
	Candidate  float64 // error rate of the candidate
	Slower     float64 // the candidate's durations are multiplied by it; 0 = 1
	Shifted    float64 // share of the candidate's answers that are different
	Burst      int     // requests of one caller in a row, which all succeed or all fail; 0 = 1
	BrokenRate float64 // share of the traffic that comes from one caller whose requests always fail
	Incident   bool    // for five minutes a third of all requests fails, on both arms
}

// Plan is the roll-out that is simulated.
type Plan struct {
	Steps   []float64 // shares of the candidate
	Minutes int       // of all steps together
	Judge   JudgeConfig
}

// DefaultPlan is the ramp that the table in docs/rollouts.md is about.
func DefaultPlan() Plan {
	return Plan{Steps: []float64{0.05, 0.10, 0.25, 0.50}, Minutes: 60, Judge: DefaultJudge()}
}

// Proportion is a share of n runs with a 95 % confidence interval (Wilson 1927).
type Proportion struct {
	Share, Lower, Upper float64
}

func proportion(x, n int) Proportion {
	const z = 1.959964
	p, m := float64(x)/float64(n), float64(n)
	middle := (p + z*z/(2*m)) / (1 + z*z/m)
	half := z / (1 + z*z/m) * math.Sqrt(p*(1-p)/m+z*z/(4*m*m))
	return Proportion{Share: p, Lower: math.Max(0, middle-half), Upper: math.Min(1, middle+half)}
}

// RivalResult is what one judge did in a scenario.
type RivalResult struct {
	Judge      string
	RolledBack Proportion
	Minutes    float64    // median time of the rollback; 0 when there was none
	Within5    Proportion // rolled back within five minutes
	Promoted   Proportion // judges that can say inconclusive: ours
}

// The judges that are compared.
const (
	OurJudge      = "Orrery"
	Oracle        = "one that knew both error rates"
	ThresholdRule = "error rate > 5 % in any minute"
	PeekedZ       = "z-test, 0.05, every minute"
	MannWhitney   = "Mann-Whitney, every 10 minutes"
)

// Rivals are the judges in the order of the table.
var Rivals = []string{OurJudge, Oracle, ThresholdRule, PeekedZ, MannWhitney}

// simulated is one bake: when each judge rolled back, 0 for never, and our last verdict.
type simulated struct {
	at     [5]float64
	last   Verdict
	minute []float64 // our e-value at the end of every minute
}

// Simulate runs a scenario so many times, each run with a source of its own, and says what every judge does. It uses all
// processors; the result depends on nothing but its arguments.
func Simulate(s Scenario, p Plan, runs int, source func(run int) Source) []RivalResult {
	all := make([]simulated, runs)
	var workers sync.WaitGroup
	for w := range runtime.NumCPU() {
		workers.Go(func() {
			for i := w; i < runs; i += runtime.NumCPU() {
				all[i] = simulateOnce(s, p, source(i))
			}
		})
	}
	workers.Wait()
	out := make([]RivalResult, len(Rivals))
	promoted := 0
	for r, name := range Rivals {
		var times []float64
		soon := 0
		for _, one := range all {
			if one.at[r] > 0 {
				times = append(times, one.at[r])
			}
			if one.at[r] > 0 && one.at[r] <= 5 {
				soon++
			}
			if r == 0 && one.last == Pass {
				promoted++
			}
		}
		out[r] = RivalResult{Judge: name, RolledBack: proportion(len(times), runs), Within5: proportion(soon, runs)}
		if len(times) > 0 {
			slices.Sort(times)
			out[r].Minutes = times[len(times)/2]
		}
	}
	out[0].Promoted = proportion(promoted, runs)
	return out
}

// Trace returns the e-value of the errors at the end of every minute of one simulated bake.
func Trace(s Scenario, p Plan, r Source) []float64 {
	return simulateOnce(s, p, r).minute
}

const (
	simWindows = 12        // groups a minute
	simMedian  = 10 * 1000 // microseconds
	simSpread  = 0.5
)

// simulateOnce runs one bake under all judges. The bake goes on after a rollback, so that every judge sees all of it.
func simulateOnce(s Scenario, p Plan, r Source) simulated {
	out := simulated{last: Continue}
	var tally Tally
	var rivals rivalState
	broken := r.Float64() // where the broken caller's hash lies
	step, known := -1, 0.0
	for minute := range p.Minutes {
		now := minute * len(p.Steps) / p.Minutes
		fresh := now != step
		step = now
		var counts [2]minuteCount
		for window := range simWindows {
			g := s.window(r, p.Steps[step], minute)
			s.breakIn(&g, broken < p.Steps[step], fresh && window == 0)
			g.Revision = int64(step)
			tally.Add(g)
			counts[0].add(g.Stable)
			counts[1].add(g.Candidate)
			at := float64(minute) + float64(window+1)/simWindows
			if known += s.likelihood(g.Candidate); out.at[1] == 0 && known >= -math.Log(p.Judge.MetricBudget()) {
				out.at[1] = at
			}
			if out.at[0] == 0 && meanExp(tally.Bets) >= 1/p.Judge.MetricBudget() {
				out.at[0] = at
			}
		}
		j := Judge(p.Judge, tally, Beside{Guard: tally.Candidate, Baked: minute == p.Minutes-1})
		out.minute = append(out.minute, j.ErrorE)
		if out.at[0] == 0 {
			out.last = j.Verdict
			if j.Verdict == Rollback {
				out.at[0] = float64(minute + 1)
			}
		}
		rivals.see(counts)
		for i, trips := range []bool{rivals.threshold(), rivals.z(), rivals.mannWhitney()} {
			if trips && out.at[i+2] == 0 {
				out.at[i+2] = float64(minute + 1)
			}
		}
	}
	if out.at[0] > 0 {
		out.last = Rollback
	}
	return out
}

// likelihood is the logarithm of how much likelier the candidate's votes are at its true error rate than at the stable
// arm's. Its sum is the sequential probability ratio test (Wald 1945): no test with the same chance of a false rollback is
// faster on average (Wald and Wolfowitz 1948), but it has to know both rates.
func (s Scenario) likelihood(c ArmCount) float64 {
	failed := float64(c.VoteFails)
	return failed*math.Log(s.Candidate/s.Base) + (float64(c.Votes)-failed)*math.Log((1-s.Candidate)/(1-s.Base))
}

// window is five seconds of traffic.
func (s Scenario) window(r Source, share float64, minute int) Group {
	g := Group{Share: share}
	burst := max(s.Burst, 1)
	mean := s.PerMinute * (1 - s.BrokenRate) / simWindows / float64(burst)
	extra := 0.0
	if s.Incident && minute >= 20 && minute < 25 {
		extra = 1.0 / 3
	}
	for range poisson(r, mean) {
		arm, rate, slower, shifted := &g.Stable, s.Base, 1.0, 0.0
		if r.Float64() < share {
			arm, rate, slower, shifted = &g.Candidate, s.Candidate, math.Max(s.Slower, 1), s.Shifted
		}
		failed := r.Float64() < rate+extra
		arm.Requests += int64(burst)
		arm.Callers++
		arm.Votes++
		if failed {
			arm.Errors += int64(burst)
			arm.VoteFails++
			continue
		}
		us := math.Log2(simMedian*slower) + simSpread/math.Ln2*r.NormFloat64()
		arm.VoteLatency = addCounts(arm.VoteLatency, map[int]int64{int(math.Ceil(latencyPerOctave * us)): 1})
		score := r.Float64()
		if shifted > 0 && r.Float64() < shifted {
			score = 1 + score
		}
		if key, ok := OutputKey(0, score); ok {
			arm.Outputs = addCounts(arm.Outputs, map[int]int64{key: 1})
		}
	}
	return g
}

// breakIn adds five seconds of the broken caller, who is on the candidate or not.
func (s Scenario) breakIn(g *Group, onCandidate, firstOfStep bool) {
	if s.BrokenRate == 0 {
		return
	}
	arm := &g.Stable
	if onCandidate {
		arm = &g.Candidate
	}
	n := int64(s.PerMinute * s.BrokenRate / simWindows)
	arm.Requests += n
	arm.Errors += n
	if firstOfStep { // the only one of its failures that counts under this revision
		arm.Votes++
		arm.VoteFails++
	}
}

// poisson draws from a Poisson distribution by multiplication (Knuth), in parts so that exp does not underflow.
func poisson(r Source, mean float64) int {
	n := 0
	for mean > 0 {
		part := math.Min(mean, 50)
		mean -= part
		limit, product := math.Exp(-part), r.Float64()
		for product > limit {
			n++
			product *= r.Float64()
		}
	}
	return n
}

type minuteCount struct{ n, errors float64 }

func (m *minuteCount) add(a ArmCount) {
	m.n += float64(a.Requests)
	m.errors += float64(a.Errors)
}

func (m minuteCount) rate() float64 { return m.errors / m.n }

// rivalState is what the other judges have seen: counts of every minute, stable first.
type rivalState struct {
	last    [2]minuteCount
	total   [2]minuteCount
	rates   [2][]float64
	minutes int
}

func (v *rivalState) see(counts [2]minuteCount) {
	v.last = counts
	v.minutes++
	for i, c := range counts {
		v.total[i].n += c.n
		v.total[i].errors += c.errors
		if c.n > 0 {
			v.rates[i] = append(v.rates[i], c.rate())
		}
	}
}

// threshold is a rule as Argo Rollouts and Flagger users write it, with a failure limit of 0.
func (v *rivalState) threshold() bool { return v.last[1].n > 0 && v.last[1].rate() > 0.05 }

// z is the one-sided two-proportion test at 0.05 on all counts so far.
func (v *rivalState) z() bool {
	s, c := v.total[0], v.total[1]
	if s.n == 0 || c.n == 0 {
		return false
	}
	pooled := (s.errors + c.errors) / (s.n + c.n)
	se := math.Sqrt(pooled * (1 - pooled) * (1/s.n + 1/c.n))
	return se > 0 && (c.rate()-s.rate())/se > 1.644854
}

// mannWhitney is Kayenta's classifier (MannWhitneyClassifier.scala) on error rates by minute, each ten minutes: High
// when the lower end of the 98 % interval of the shift is over a quarter of its estimate.
func (v *rivalState) mannWhitney() bool {
	if v.minutes%10 != 0 || len(v.rates[1]) == 0 {
		return false
	}
	var shifts []float64
	for _, c := range v.rates[1] {
		for _, s := range v.rates[0] {
			shifts = append(shifts, c-s)
		}
	}
	slices.Sort(shifts)
	n, m := float64(len(v.rates[0])), float64(len(v.rates[1]))
	estimate := shifts[len(shifts)/2]
	const z = 2.326348
	k := int(math.Floor(n*m/2 - z*math.Sqrt(n*m*(n+m+1)/12)))
	if k < 0 {
		return false
	}
	return shifts[k] > 0.25*math.Abs(estimate) && estimate > 0
}
