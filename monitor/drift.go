package monitor

import (
	"math"
	"slices"
	"sort"
)

// PSI returns the population stability index sum((r-c) ln(r/c)) of two vectors of counts over the same bins. It
// follows Evidently: a share of 0 is replaced by 0.0001, or by a millionth of the smallest share when that is not
// above 0.0001; shares are not renormalised. Special cases: 0 when either vector is empty of counts.
func PSI(reference, current []int64) float64 {
	r, c := filled(shares(reference)), filled(shares(current))
	if r == nil || c == nil {
		return 0
	}
	sum := 0.0
	for i := range r {
		sum += (r[i] - c[i]) * math.Log(r[i]/c[i])
	}
	return sum
}

func shares(counts []int64) []float64 {
	total := 0.0
	for _, n := range counts {
		total += float64(n)
	}
	if total == 0 {
		return nil
	}
	out := make([]float64, len(counts))
	for i, n := range counts {
		out[i] = float64(n) / total
	}
	return out
}

func filled(p []float64) []float64 {
	if p == nil {
		return nil
	}
	smallest := math.Inf(1)
	for _, v := range p {
		if v > 0 {
			smallest = math.Min(smallest, v)
		}
	}
	fill := 0.0001
	if smallest <= fill {
		fill = smallest / 1e6
	}
	for i, v := range p {
		if v == 0 {
			p[i] = fill
		}
	}
	return p
}

// KolmogorovSmirnov returns the two-sample statistic D of two samples, the largest distance of their distribution
// functions. It equals scipy.stats.ks_2samp's. Special cases: 0 when a sample is empty.
func KolmogorovSmirnov(x, y []float64) float64 {
	if len(x) == 0 || len(y) == 0 {
		return 0
	}
	x, y = slices.Sorted(slices.Values(x)), slices.Sorted(slices.Values(y))
	top, i, j := 0.0, 0, 0
	for i < len(x) && j < len(y) {
		v := math.Min(x[i], y[j])
		for i < len(x) && x[i] <= v {
			i++
		}
		for j < len(y) && y[j] <= v {
			j++
		}
		top = math.Max(top, math.Abs(float64(i)/float64(len(x))-float64(j)/float64(len(y))))
	}
	return top
}

// BinnedKS returns D read at the edges of common bins: at most the largest bin's mass below the exact one.
func BinnedKS(reference, current []int64) float64 {
	r, c := shares(reference), shares(current)
	if r == nil || c == nil {
		return 0
	}
	top, fr, fc := 0.0, 0.0, 0.0
	for i := range r {
		fr += r[i]
		fc += c[i]
		top = math.Max(top, math.Abs(fr-fc))
	}
	return top
}

// KSPValue returns the two-sided p-value of D for samples of n and m, by Kolmogorov's series with Stephens' correction
// of the argument (JRSS B 32, 1970): (sqrt(e) + 0.12 + 0.11/sqrt(e)) D, where e = nm/(n+m). scipy's asymptotic p-value
// is within 3 % of it for e above 100.
func KSPValue(d float64, n, m int64) float64 {
	if n == 0 || m == 0 || d <= 0 {
		return 1
	}
	root := math.Sqrt(float64(n) * float64(m) / float64(n+m))
	lambda := (root + 0.12 + 0.11/root) * d
	sum, sign := 0.0, 1.0
	for k := 1.0; k <= 100; k++ {
		term := math.Exp(-2 * k * k * lambda * lambda)
		sum += sign * term
		sign = -sign
		if term < 1e-16 {
			break
		}
	}
	return math.Min(math.Max(2*sum, 0), 1)
}

// BenjaminiHochberg returns the adjusted p-values min over j >= i of p_(j) n / j, in the order given.
func BenjaminiHochberg(p []float64) []float64 {
	order := make([]int, len(p))
	for i := range order {
		order[i] = i
	}
	sort.SliceStable(order, func(a, b int) bool { return p[order[a]] < p[order[b]] })
	out := make([]float64, len(p))
	least := 1.0
	for rank, i := range slices.Backward(order) {
		least = math.Min(least, p[i]*float64(len(p))/float64(rank+1))
		out[i] = least
	}
	return out
}

// DriftStatus is the verdict on a feature or a window.
type DriftStatus string

// The three levels. TOO_FEW says that there were not enough rows to tell.
const (
	NoDrift       DriftStatus = "NONE"
	PossibleDrift DriftStatus = "POSSIBLE"
	Drift         DriftStatus = "DRIFT"
	TooFew        DriftStatus = "TOO_FEW"
)

// DriftConfig are the thresholds of a drift check. Drift needs effect size, sample size and significance.
type DriftConfig struct {
	MinRows  int64   `json:"min_rows"`
	Possible float64 `json:"possible_psi"`
	Drifted  float64 `json:"drift_psi"`
	Alpha    float64 `json:"alpha"` // of the false-discovery rate over features
	Share    float64 `json:"share"` // of drifted features that makes the window drift
}

// DefaultDrift returns the usual bands of PSI (0.1 and 0.25) at 500 rows.
func DefaultDrift() DriftConfig {
	return DriftConfig{MinRows: 500, Possible: 0.1, Drifted: 0.25, Alpha: 0.05, Share: 0.3}
}

// FeatureDrift is how far one feature is from its baseline.
type FeatureDrift struct {
	Name     string      `json:"name"`
	Kind     FeatureKind `json:"kind"`
	Status   DriftStatus `json:"status"`
	PSI      float64     `json:"psi"` // Evidently's convention, on deciles of the baseline
	KS       float64     `json:"ks"`  // numeric: read on 50 bins of the baseline
	P        float64     `json:"p"`   // of KS, Benjamini-Hochberg adjusted over the features
	Missing  float64     `json:"missing_share"`
	New      float64     `json:"new_share"` // categorical: share of values the baseline has not
	Baseline float64     `json:"baseline_mean"`
	Mean     float64     `json:"mean"`
}

// DriftReport is the result of a drift check.
type DriftReport struct {
	Status   DriftStatus    `json:"status"`
	Rows     int64          `json:"rows"`
	Share    float64        `json:"drifted_share"`
	Features []FeatureDrift `json:"features"`
}

// decileBins is how many bins PSI is computed on: ten is the convention its bands belong to.
const decileBins = 10

// CheckDrift compares the profiles of a window with the baseline, by feature name.
func CheckDrift(b Baseline, window map[string]Profile, c DriftConfig) DriftReport {
	r := DriftReport{Status: NoDrift}
	var ps []float64
	for _, f := range b.Features {
		p := window[f.Name]
		d := compareFeature(f, p)
		r.Rows = max(r.Rows, p.Count)
		r.Features = append(r.Features, d)
		ps = append(ps, d.P)
	}
	drifted, possible := 0, 0
	for i, p := range BenjaminiHochberg(ps) {
		d := &r.Features[i]
		d.P = p
		if d.Status = featureStatus(*d, window[d.Name].Count, c); d.Status == Drift {
			drifted++
		} else if d.Status == PossibleDrift {
			possible++
		}
	}
	r.Share = float64(drifted) / math.Max(float64(len(r.Features)), 1)
	switch {
	case r.Rows < c.MinRows:
		r.Status = TooFew
	case drifted > 0 && r.Share >= c.Share:
		r.Status = Drift
	case drifted+possible > 0:
		r.Status = PossibleDrift
	}
	return r
}

func featureStatus(d FeatureDrift, rows int64, c DriftConfig) DriftStatus {
	switch {
	case rows < c.MinRows:
		return TooFew
	case d.PSI >= c.Drifted && d.P < c.Alpha:
		return Drift
	case d.PSI >= c.Possible:
		return PossibleDrift
	}
	return NoDrift
}

func compareFeature(f FeatureBaseline, p Profile) FeatureDrift {
	d := FeatureDrift{Name: f.Name, Kind: f.Kind, P: 1, Baseline: finiteOr0(f.Profile.Mean()), Mean: finiteOr0(p.Mean())}
	if p.Count == 0 {
		return d
	}
	d.Missing = float64(p.Missing) / float64(p.Count)
	if f.Kind == Categorical {
		reference, current, added := alignCategories(f.Profile.Categories, p.Categories)
		d.PSI, d.New = PSI(reference, current), added
		d.KS = BinnedKS(reference, current) // over the categories in order of name
	} else {
		d.PSI = PSI(coarse(f.Profile.Bins, decileBins), coarse(p.Bins, decileBins))
		d.KS = BinnedKS(f.Profile.Bins, p.Bins)
	}
	d.P = KSPValue(d.KS, f.Profile.Count-f.Profile.Missing, p.Count-p.Missing)
	return d
}

func finiteOr0(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	return v
}

// coarse joins neighbouring bins into at most n.
func coarse(bins []int64, n int) []int64 {
	if len(bins) <= n {
		return bins
	}
	out := make([]int64, n)
	for i, v := range bins {
		out[i*n/len(bins)] += v
	}
	return out
}

func alignCategories(reference, current map[string]int64) (r, c []int64, added float64) {
	names := sortedNames(reference)
	var fresh, total int64
	for _, name := range sortedNames(current) {
		total += current[name]
		if _, known := reference[name]; !known {
			fresh += current[name]
			names = append(names, name)
		}
	}
	for _, name := range names {
		r, c = append(r, reference[name]), append(c, current[name])
	}
	if total > 0 {
		added = float64(fresh) / float64(total)
	}
	return r, c, added
}

// LogLoss returns the mean log loss of probabilities p of outcomes y (0 or 1), with p clipped to [1e-15, 1-1e-15] as
// scikit-learn does.
func LogLoss(p, y []float64) float64 {
	sum := 0.0
	for i := range p {
		q := math.Min(math.Max(p[i], 1e-15), 1-1e-15)
		sum -= y[i]*math.Log(q) + (1-y[i])*math.Log(1-q)
	}
	return sum / float64(len(p))
}

// Brier returns the mean squared error of probabilities p of outcomes y (0 or 1).
func Brier(p, y []float64) float64 {
	sum := 0.0
	for i := range p {
		sum += (p[i] - y[i]) * (p[i] - y[i])
	}
	return sum / float64(len(p))
}
