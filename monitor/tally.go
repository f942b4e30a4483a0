package monitor

import "math"

// ArmCount is what was counted of one arm.
type ArmCount struct {
	Requests    int64         `json:"requests"`
	Errors      int64         `json:"errors"`
	Votes       int64         `json:"votes"` // callers, each at most once in a vote epoch and not after its first failure in a step
	VoteFails   int64         `json:"vote_fails"`
	NotFinite   int64         `json:"not_finite"`
	Callers     int64         `json:"callers,omitempty"`      // seen for the first time in this roll-out
	Latency     map[int]int64 `json:"latency,omitempty"`      // all answers, by LatencyBucket
	VoteLatency map[int]int64 `json:"vote_latency,omitempty"` // answers that voted
	Outputs     map[int]int64 `json:"outputs,omitempty"`      // answers that voted, by OutputKey
	Feedback    Moments       `json:"feedback,omitzero"`
}

// Add adds o to a.
func (a *ArmCount) Add(o ArmCount) {
	a.Requests += o.Requests
	a.Errors += o.Errors
	a.Votes += o.Votes
	a.VoteFails += o.VoteFails
	a.NotFinite += o.NotFinite
	a.Callers += o.Callers
	a.Feedback.Merge(o.Feedback)
	a.Latency = addCounts(a.Latency, o.Latency)
	a.VoteLatency = addCounts(a.VoteLatency, o.VoteLatency)
	a.Outputs = addCounts(a.Outputs, o.Outputs)
}

// Plain returns a without its distributions: what people read.
func (a ArmCount) Plain() ArmCount {
	a.Latency, a.VoteLatency, a.Outputs = nil, nil, nil
	return a
}

func addCounts(into, from map[int]int64) map[int]int64 {
	if into == nil && len(from) > 0 {
		into = make(map[int]int64, len(from))
	}
	for k, n := range from {
		into[k] += n
	}
	return into
}

// Moments are a mergeable summary of real values.
type Moments struct {
	N       int64   `json:"n"`
	Sum     float64 `json:"sum"`
	Squares float64 `json:"squares"`
}

// Merge adds o to m.
func (m *Moments) Merge(o Moments) {
	m.N += o.N
	m.Sum += o.Sum
	m.Squares += o.Squares
}

// Mean returns the mean, 0 of nothing.
func (m Moments) Mean() float64 {
	if m.N == 0 {
		return 0
	}
	return m.Sum / float64(m.N)
}

// Variance returns the sample variance, 0 of fewer than two values.
func (m Moments) Variance() float64 {
	if m.N < 2 {
		return 0
	}
	n := float64(m.N)
	return math.Max(0, (m.Squares-m.Sum*m.Sum/n)/(n-1))
}

// PairCount is what a shadow and the stable arm did with the same requests.
type PairCount struct {
	Pairs        int64         `json:"pairs"`
	OnlyFailed   int64         `json:"only_failed"`    // the shadow alone failed
	OnlyAnswered int64         `json:"only_answered"`  // the stable arm alone failed
	Gaps         map[int]int64 `json:"gaps,omitempty"` // pairs that both answered, by GapBucket
}

// Group is what two arms did at the same time, at the same gateway, under the same route revision.
type Group struct {
	Stable    ArmCount
	Candidate ArmCount
	Pairs     PairCount // of a shadow; its errors are then compared pair by pair
	Revision  int64
	Share     float64 // of the callers that the route sends to the candidate, of both arms' together; 0 = a shadow
}

// Split is how many callers each arm got under one revision of the route.
type Split struct {
	Share     float64 `json:"share"`
	Stable    int64   `json:"stable"`
	Candidate int64   `json:"candidate"`
}

// Tally is all that the judge needs of a comparison so far. Groups are folded into it one by one, each once and in any
// order, so that the judge's work does not grow with the length of the bake.
type Tally struct {
	Stable    ArmCount        `json:"stable"`
	Candidate ArmCount        `json:"candidate"`
	Pairs     PairCount       `json:"pairs,omitzero"`
	Bets      []float64       `json:"bets"`             // log e-values of the bets on errors, in the order of the grid
	Splits    map[int64]Split `json:"splits,omitempty"` // by revision
}

// Add folds a group in.
func (t *Tally) Add(g Group) {
	if g.Pairs.Pairs > 0 {
		g.Stable.Votes, g.Stable.VoteFails = g.Pairs.Pairs, g.Pairs.OnlyAnswered
		g.Candidate.Votes, g.Candidate.VoteFails = g.Pairs.Pairs, g.Pairs.OnlyFailed
	}
	t.Stable.Add(g.Stable)
	t.Candidate.Add(g.Candidate)
	t.Pairs.Pairs += g.Pairs.Pairs
	t.Pairs.OnlyFailed += g.Pairs.OnlyFailed
	t.Pairs.OnlyAnswered += g.Pairs.OnlyAnswered
	t.Pairs.Gaps = addCounts(t.Pairs.Gaps, g.Pairs.Gaps)
	if g.Share > 0 && g.Stable.Callers+g.Candidate.Callers > 0 {
		if t.Splits == nil {
			t.Splits = map[int64]Split{}
		}
		s := t.Splits[g.Revision]
		t.Splits[g.Revision] = Split{Share: g.Share, Stable: s.Stable + g.Stable.Callers, Candidate: s.Candidate + g.Candidate.Callers}
	}
	t.bet(g)
}

// bet settles the bets on who the group's errors belong to. A group in which one arm has no votes says nothing.
func (t *Tally) bet(g Group) {
	if t.Bets == nil {
		t.Bets = make([]float64, len(oddsGrid))
	}
	nc, ns := float64(g.Candidate.Votes), float64(g.Stable.Votes)
	if nc == 0 || ns == 0 {
		return
	}
	rho := nc / (nc + ns)
	x, y := float64(g.Candidate.VoteFails), float64(g.Stable.VoteFails)
	for i, psi := range oddsGrid {
		theta := psi * rho / (psi*rho + 1 - rho)
		t.Bets[i] += x*math.Log(theta/rho) + y*math.Log((1-theta)/(1-rho))
	}
}

const (
	outputColumns = 8       // of an answer that are compared
	outputSpan    = 1 << 12 // keys of one column
	outputOctave  = 8       // buckets per doubling of a value
	outputLowest  = -16     // values below 2^-16 are 0
	gapOctave     = 4
	gapLowest     = -20
)

// OutputKey returns the key under which a value of an output's column (0 to 7) is counted: the column and the value's
// bucket, which is 9 % wide. False for further columns and NaN.
func OutputKey(column int, v float64) (int, bool) {
	if column < 0 || column >= outputColumns || math.IsNaN(v) {
		return 0, false
	}
	bucket := 0
	if size := math.Abs(v); size >= math.Ldexp(1, outputLowest) {
		bucket = 1 + int(math.Min(outputOctave*(math.Log2(size)-outputLowest), outputSpan/2-2))
		if v < 0 {
			bucket = -bucket
		}
	}
	return column*outputSpan + outputSpan/2 + bucket, true
}

// OutputText is OutputKey for text, of which only a hash is kept.
func OutputText(column int, hash uint64) (int, bool) {
	if column >= outputColumns {
		return 0, false
	}
	return column*outputSpan + int(hash%(outputSpan-1)) + 1, true
}

// Gap says how far apart two answers to the same request are: |a-b| / max(1, |a|, |b|), which is the difference itself
// for probabilities and relative for what is large. NaN against anything else is 1.
func Gap(a, b float64) float64 {
	switch {
	case a == b || math.IsNaN(a) && math.IsNaN(b):
		return 0
	case math.IsNaN(a) || math.IsNaN(b) || math.IsInf(a, 0) || math.IsInf(b, 0):
		return 1
	}
	return math.Abs(a-b) / math.Max(1, math.Max(math.Abs(a), math.Abs(b)))
}

// GapBucket returns the bucket of a gap, 0 for none; bucket b > 0 holds gaps in (2^((b-1)/4-20), 2^(b/4-20)].
func GapBucket(gap float64) int {
	if gap <= 0 {
		return 0
	}
	return max(1, int(math.Ceil(gapOctave*(math.Log2(gap)-gapLowest)-1e-9)))
}

// disagreements counts the pairs whose gap is over the tolerance.
func (p PairCount) disagreements(tolerance float64) (differ, of int64) {
	limit := GapBucket(tolerance)
	for b, n := range p.Gaps {
		of += n
		if b > limit {
			differ += n
		}
	}
	return differ, of
}
