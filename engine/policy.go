package engine

import (
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// Policy decides what a scheduler does with a model's requests. DeadlinePolicy is Orrery's; StaticPolicy is the one to
// beat.
type Policy interface {
	// urgency is where a request stands in the queue; the least goes first.
	urgency(r *request) instant
	// finish predicts the end of a request that arrives now; one that would end after its deadline is shed.
	finish(s *scheduler, q *queue, r *request, now instant) instant
	// hold says until when the batch at the head of a lane waits for company (not after now: it runs now), and why it
	// then runs.
	hold(s *scheduler, q *queue, l *lane, now instant) (until instant, reason string)
	// late says that running a waiting request makes no sense any more.
	late(q *queue, r *request, now instant) bool
	// enough says that a batch should not grow to rows rows, given the tightest deadline in it.
	enough(q *queue, rows int64, tightest, now instant) bool
}

// PolicyOf returns the policy a serving config names.
func PolicyOf(b registry.Batching) Policy {
	if b == registry.BatchStatic {
		return StaticPolicy{}
	}
	return DeadlinePolicy{}
}

// DeadlinePolicy runs the most urgent first, by deadline; sheds at once what cannot be in time; and lets a batch wait
// for company only while that costs nobody the deadline and saves more than it costs.
//
// A batch grows only as far as larger ones are cheaper by the row: where a model computes as long for two rows as for one
// twice, company only makes its requests wait for each other.
//
// The latest moment to run is Symphony's (arXiv 2308.07470): the tightest deadline less a slow run of one row more. The
// test whether waiting pays is BentoML's (CorkDispatcher): n rows that wait for a gap against the fixed cost that the
// next row would not pay again.
type DeadlinePolicy struct{}

func (DeadlinePolicy) urgency(r *request) instant {
	return min(r.deadline, r.arrived+patienceOf(r.level))
}

// finish follows the batches that would be formed of what waits: each as large as its tightest deadline allows. A
// request that would make an earlier one late, or be late itself, is shed; so the queue never holds more than can be in
// time, and batches need not shrink to save those that wait too long.
func (DeadlinePolicy) finish(s *scheduler, q *queue, r *request, now instant) instant {
	if q.idle() || !q.latency.known() {
		return now // it runs, and what it takes is learnt: else an estimate that is far too high would stay so for ever
	}
	left := r.rows
	for level := highestLevel; level <= r.level; level++ {
		left += q.atLevel[level]
	}
	free := now
	if len(q.running) >= q.config.Runners {
		free = never
		for _, end := range q.running {
			free = min(free, max(end, now))
		}
	}
	wait := q.contention(s)
	tightest := r.deadline
	if l := q.urgent(); l != nil {
		tightest = min(tightest, (*l)[0].deadline)
	}
	for {
		fits := max(q.latency.fits(tightest-free, q.most(), 2), min(r.rows, q.most()))
		if left <= fits {
			return free + q.latency.slow(left)
		}
		free += time.Duration(float64(q.latency.slow(fits)) * wait)
		if free > r.deadline {
			return free
		}
		left -= fits
		tightest = r.deadline
	}
}

func (DeadlinePolicy) hold(s *scheduler, q *queue, l *lane, now instant) (instant, string) {
	rows, tightest, first := l.ready(q.most())
	if rows >= q.most() {
		return now, "full"
	}
	// What the user allows without regard to load, then what pays while the device works anyway.
	until, reason := first+q.config.MaxDelay, "delay"
	if q.config.MaxDelay == 0 {
		reason = "idle"
	}
	if s.busy > 0 && q.gap > 0 {
		saved := q.latency.usual(rows) + q.latency.usual(1) - q.latency.usual(rows+1)
		if float64(saved) > q.gap*float64(rows) {
			if pays := q.last + 2*instant(q.gap); pays > until {
				until, reason = pays, "company"
			}
		}
	}
	if latest := tightest - q.latency.slow(rows+1); latest < until {
		return latest, "deadline"
	}
	return until, reason
}

// late drops a request that cannot be in time, and one whose deadline would keep the batch smaller than what waits: the
// simulator shows that sparing it costs the others more than it gains, at every load.
func (DeadlinePolicy) late(q *queue, r *request, now instant) bool {
	if now > r.deadline {
		return true
	}
	if r.probe || !q.latency.known() {
		return false
	}
	most := q.most()
	return q.latency.fits(r.deadline-now, most, 1) < min(max(r.rows, q.rows), most)
}

func (DeadlinePolicy) enough(q *queue, rows int64, tightest, now instant) bool {
	return rows > q.most() || !q.exploring() && now+q.latency.slow(q.padded(rows)) > tightest
}

// StaticPolicy is Triton's dynamic batcher: first come first served, a batch waits a fixed delay for company, and a
// request whose deadline has passed is noticed when its turn comes.
type StaticPolicy struct{}

func (StaticPolicy) urgency(r *request) instant { return r.arrived }

func (StaticPolicy) finish(_ *scheduler, _ *queue, _ *request, now instant) instant { return now }

func (StaticPolicy) hold(_ *scheduler, q *queue, l *lane, now instant) (instant, string) {
	rows, _, first := l.ready(q.config.MaxRows)
	switch {
	case rows >= q.config.MaxRows:
		return now, "full"
	case q.config.MaxDelay == 0:
		return now, "idle"
	}
	return first + q.config.MaxDelay, "delay"
}

func (StaticPolicy) late(_ *queue, r *request, now instant) bool { return now > r.deadline }

func (StaticPolicy) enough(*queue, int64, instant, instant) bool { return false }

// ready returns how many rows of a lane could run now (not more than limit are counted), their tightest deadline and
// the earliest arrival.
func (l lane) ready(limit int64) (rows int64, tightest, first instant) {
	tightest, first = never, never
	for _, r := range l { // in heap order: the head is the most urgent, the rest is near enough
		rows += r.rows
		tightest, first = min(tightest, r.deadline), min(first, r.arrived)
		if rows >= limit {
			break
		}
	}
	return rows, tightest, first
}
