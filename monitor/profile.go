package monitor

import (
	"math"
	"slices"
	"sort"
	"strconv"
)

// FeatureKind says how a feature is summarised.
type FeatureKind string

// Numeric features get histogram edges, categorical ones counts by value.
const (
	Numeric     FeatureKind = "numeric"
	Categorical FeatureKind = "categorical"
)

const (
	maxCategories = 10  // an integer feature with at most this many values in the baseline is categorical
	profileBins   = 50  // equal-mass bins of a numeric feature: KS read from them is at most 1/50 off
	otherCategory = "…" // values a profile has no room for
	maxProfiled   = 64  // values a profile counts by name
)

// Baseline is what the training data looked like: for every feature the frozen edges, and its own profile on them.
// Edges are frozen once, because recomputing them on each sample hides any shift.
type Baseline struct {
	Features []FeatureBaseline `json:"features"`
	Rows     int64             `json:"rows"`
}

// FeatureBaseline is one feature of a baseline, or the score.
type FeatureBaseline struct {
	Name    string      `json:"name"`
	Kind    FeatureKind `json:"kind"`
	Edges   []float64   `json:"edges,omitempty"` // inner edges, ascending; the outer bins are open
	Profile Profile     `json:"profile"`
}

// Profile is a mergeable summary of one feature's values on a baseline's edges. Merging is adding, so a window is the
// sum of its parts and does not depend on how it was split.
type Profile struct {
	Count      int64            `json:"count"`   // values, missing ones included
	Missing    int64            `json:"missing"` // NaN or infinite
	Bins       []int64          `json:"bins,omitempty"`
	Categories map[string]int64 `json:"categories,omitempty"`
	Sum        float64          `json:"sum"`
	SumSquares float64          `json:"sum_squares"`
	Min        float64          `json:"min"`
	Max        float64          `json:"max"`
}

// BuildBaseline freezes a baseline from columns of values: names[i] has values[i].
func BuildBaseline(names []string, values [][]float64) Baseline {
	b := Baseline{}
	for i, column := range values {
		name := names[i]
		f := FeatureBaseline{Name: name, Kind: Numeric}
		if distinct := distinctIntegers(column); distinct > 0 && distinct <= maxCategories {
			f.Kind = Categorical
		} else {
			f.Edges = quantileEdges(column, profileBins)
		}
		for _, v := range column {
			f.Profile.Add(f, v)
		}
		b.Features = append(b.Features, f)
		b.Rows = int64(len(column))
	}
	return b
}

// distinctIntegers counts distinct values up to one more than a categorical feature may have; 0 when a value is no
// integer.
func distinctIntegers(values []float64) int {
	seen := map[float64]bool{}
	for _, v := range values {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			continue
		}
		if v != math.Trunc(v) {
			return 0
		}
		if seen[v] = true; len(seen) > maxCategories {
			break
		}
	}
	return len(seen)
}

// quantileEdges returns the distinct inner edges of bins of equal mass. A value equal to an edge belongs to the bin
// above it.
func quantileEdges(values []float64, bins int) []float64 {
	var sorted []float64
	for _, v := range values {
		if !math.IsNaN(v) && !math.IsInf(v, 0) {
			sorted = append(sorted, v)
		}
	}
	slices.Sort(sorted)
	var edges []float64
	for i := 1; i < bins && len(sorted) > 0; i++ {
		e := sorted[min(i*len(sorted)/bins, len(sorted)-1)]
		if e > sorted[0] && (len(edges) == 0 || e > edges[len(edges)-1]) {
			edges = append(edges, e)
		}
	}
	return edges
}

// Add counts one value of the feature the profile is of.
func (p *Profile) Add(f FeatureBaseline, v float64) {
	p.Count++
	if math.IsNaN(v) || math.IsInf(v, 0) {
		p.Missing++
		return
	}
	if p.Count-p.Missing == 1 {
		p.Min, p.Max = v, v
	}
	p.Sum += v
	p.SumSquares += v * v
	p.Min, p.Max = math.Min(p.Min, v), math.Max(p.Max, v)
	if f.Kind == Categorical {
		p.category(strconv.FormatFloat(v, 'g', -1, 64), 1)
		return
	}
	if p.Bins == nil {
		p.Bins = make([]int64, len(f.Edges)+1)
	}
	p.Bins[sort.Search(len(f.Edges), func(i int) bool { return f.Edges[i] > v })]++
}

func (p *Profile) category(name string, n int64) {
	if p.Categories == nil {
		p.Categories = map[string]int64{}
	}
	if _, known := p.Categories[name]; !known && len(p.Categories) >= maxProfiled {
		name = otherCategory
	}
	p.Categories[name] += n
}

// Merge adds o, a profile on the same edges.
func (p *Profile) Merge(o Profile) {
	if o.Count-o.Missing > 0 {
		if p.Count-p.Missing == 0 {
			p.Min, p.Max = o.Min, o.Max
		}
		p.Min, p.Max = math.Min(p.Min, o.Min), math.Max(p.Max, o.Max)
	}
	p.Count += o.Count
	p.Missing += o.Missing
	p.Sum += o.Sum
	p.SumSquares += o.SumSquares
	if p.Bins == nil && o.Bins != nil {
		p.Bins = make([]int64, len(o.Bins))
	}
	for i, n := range o.Bins {
		p.Bins[i] += n
	}
	for _, name := range sortedNames(o.Categories) {
		p.category(name, o.Categories[name])
	}
}

func sortedNames(m map[string]int64) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Mean returns the mean of the values that are not missing, NaN when there are none.
func (p Profile) Mean() float64 { return p.Sum / float64(p.Count-p.Missing) }
