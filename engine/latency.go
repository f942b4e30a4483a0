package engine

import (
	"math"
	"math/bits"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// latency is what a run is expected to take by its number of rows. It is learnt online: for each power of two a mean and
// a mean deviation, smoothed as TCP smooths its round trips (RFC 6298: gains 1/8 and 1/4), of which mean + 2 deviations
// stands for a slow run. Between the observed sizes it is linear, beyond them proportional.
//
// Stalls of the machine only ever make a run look slower, so what is learnt from them is forgotten fast: one run counts
// for at most four times the mean, a run below half of the mean counts at once, and a size is never thought to take
// longer than a larger one.
type latency struct {
	sizes [sizeCount]estimate // runs of (2^(i-1), 2^i] rows
	runs  int                 // observed in all
	best  int64               // the smallest size whose rows cost hardly more than anywhere; 0 while none is known to be
}

const sizeCount = 17

type estimate struct {
	rows, mean, deviation float64 // of rows, in nanoseconds
	runs                  int
	seen                  int // latency.runs when it was last observed
}

func sizeOf(rows int64) int { return min(bits.Len64(uint64(max(rows, 1)-1)), 16) }

// seed takes measured latencies as if they had been observed.
func (l *latency) seed(measured []registry.BatchLatency) {
	for _, m := range measured {
		l.observe(int64(m.Rows), time.Duration(m.P50)*time.Microsecond)
		l.observe(int64(m.Rows), time.Duration(m.P95)*time.Microsecond)
	}
}

// observe learns from a run.
func (l *latency) observe(rows int64, took time.Duration) {
	e, t := &l.sizes[sizeOf(rows)], float64(took)
	l.runs++
	e.runs++
	e.seen = l.runs
	if e.runs == 1 {
		e.rows, e.mean, e.deviation = float64(rows), t, t/4
		l.weigh()
		return
	}
	t = min(t, 4*e.mean)
	miss, gain := t-e.mean, 1.0/8
	if t < e.mean/2 { // something made runs slow that is over
		gain = 1.0 / 2
	}
	e.rows += (float64(rows) - e.rows) / 8
	e.mean += gain * miss
	e.deviation += max(gain, 1.0/4) * (max(miss, -miss) - e.deviation)
	l.weigh()
}

// hardly is how much more a row may cost than at the best size to count as the same.
const hardly = 1.02

// weigh finds the best size: beyond it a larger batch only makes its requests wait for each other. The largest size that
// is known is no bound: larger ones may be cheaper still.
func (l *latency) weigh() {
	least, largest := math.Inf(1), -1
	for i := range l.sizes {
		if e := &l.sizes[i]; e.runs > 0 {
			least, largest = min(least, e.mean/e.rows), i
		}
	}
	l.best = 0
	for i := range largest {
		if e := &l.sizes[i]; e.runs > 0 && e.mean/e.rows <= hardly*least {
			l.best = int64(math.Ceil(e.rows))
			return
		}
	}
}

// known says whether anything was observed.
func (l *latency) known() bool {
	for i := range l.sizes {
		if l.sizes[i].runs > 0 {
			return true
		}
	}
	return false
}

// slow returns what a slow run of rows rows takes; 0 while nothing is known.
func (l *latency) slow(rows int64) time.Duration { return l.at(rows, 2) }

// usual returns the mean.
func (l *latency) usual(rows int64) time.Duration { return l.at(rows, 0) }

func (l *latency) at(rows int64, deviations float64) time.Duration {
	var took [sizeCount]float64
	ceiling := math.Inf(1)
	for i := sizeCount - 1; i >= 0; i-- {
		if e := &l.sizes[i]; e.runs > 0 {
			ceiling = min(ceiling, e.mean+deviations*e.deviation)
			took[i] = ceiling
		}
	}
	want := float64(max(rows, 1))
	atRows, at := 0.0, 0.0 // the point below
	for i := range l.sizes {
		e := &l.sizes[i]
		if e.runs == 0 {
			continue
		}
		switch {
		case e.rows >= want && at == 0: // below the smallest that is known
			return time.Duration(took[i])
		case e.rows >= want:
			return time.Duration(at + (took[i]-at)*(want-atRows)/(e.rows-atRows))
		}
		atRows, at = e.rows, took[i]
	}
	if atRows == 0 {
		return 0
	}
	return time.Duration(at * want / atRows)
}

// stale says that a size was not observed for long, so that what is thought of it may be wrong.
func (l *latency) stale() bool {
	for i := range l.sizes {
		if e := &l.sizes[i]; e.runs > 0 && l.runs-e.seen > 4*exploreEvery {
			return true
		}
	}
	return false
}

// fits returns the most rows, up to limit, whose run takes no longer than the time given; 0 when not even one does.
func (l *latency) fits(in time.Duration, limit int64, deviations float64) int64 {
	low, high := int64(0), limit // low fits, what is over high does not
	for low < high {
		middle := (low + high + 1) / 2
		if l.at(middle, deviations) <= in {
			low = middle
		} else {
			high = middle - 1
		}
	}
	return low
}
