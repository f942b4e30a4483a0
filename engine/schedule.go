package engine

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// instant is a point on the scheduler's clock, in nanoseconds.
type instant = time.Duration

// never is later than everything.
const never = instant(1<<63 - 1)

// BatchConfig bounds a model's batches and its queue.
type BatchConfig struct {
	Policy     Policy
	MaxRows    int64         // of a batch
	MaxDelay   time.Duration // longest the first request of a batch waits for company while a runner is free
	QueueRows  int64         // that may wait
	QueueBytes int64         // of inputs that may wait
	Runners    int           // batches that run at once
	Threads    int           // of each, out of the device's
	Weight     float64       // share of the device against other models that want it
	PadTo      []int64       // sizes batches are padded up to, ascending; none: batches run as they are
}

// Levels is how many levels of priority there are, and DefaultLevel that of requests that name none.
const (
	Levels       = lowestLevel
	DefaultLevel = defaultLevel
)

// Levels of priority: 1 goes first. A level lower costs patienceOf more patience, and no request waits longer than its
// patience for others that came later, so no level starves.
const (
	highestLevel = 1
	defaultLevel = 2
	lowestLevel  = 8
)

func patienceOf(level int) time.Duration { return time.Duration(level) * 100 * time.Millisecond }

// request is one caller's rows in a queue.
type request struct {
	rows, bytes int64
	shape       string // requests of one shape may share a batch
	alone       bool   // it has no rows, so there is nothing to share
	probe       bool   // it came to an idle queue, and runs whatever that is thought to take
	level       int
	arrived     instant
	deadline    instant
	urgency     instant // order in the queue
	place       int     // in its lane; -1 when it does not wait
	serial      uint64  // of admission
	queue       *queue

	call *call // who waits for it; nil in a simulation
}

// lane holds the waiting requests of one shape, the most urgent first. It is a heap.
type lane []*request

func (l lane) Len() int           { return len(l) }
func (l lane) Less(i, j int) bool { return before(l[i], l[j]) }
func (l lane) Swap(i, j int) {
	l[i], l[j] = l[j], l[i]
	l[i].place, l[j].place = i, j
}

// Push implements heap.Interface.
func (l *lane) Push(x any) {
	r := x.(*request) //nolint:forcetypeassert // the only type pushed
	r.place = len(*l)
	*l = append(*l, r)
}

// Pop implements heap.Interface.
func (l *lane) Pop() any {
	old := *l
	r := old[len(old)-1]
	old[len(old)-1] = nil
	*l = old[:len(old)-1]
	r.place = -1
	return r
}

// queue is one model's place in a scheduler.
type queue struct {
	config     BatchConfig
	latency    latency
	lanes      map[string]*lane
	rows       int64                  // waiting
	bytes      int64                  // waiting
	atLevel    [lowestLevel + 1]int64 // rows waiting by level
	running    []instant              // expected ends of the batches under way
	used       float64                // share of the device taken so far, by weight: the least goes first
	gap        float64                // smoothed time between arrivals, ns
	last       instant                // arrival
	counts     map[string]int64       // dispatches and sheds by reason
	dispatched int64
	closed     bool
	empty      chan struct{} // closed when nothing waits or runs any more
}

// batch is what runs together.
type batch struct {
	queue    *queue
	requests []*request
	rows     int64
	reason   string // why now
	began    instant
	expected instant // end

	live   int                // requests somebody waits for; guarded by the device's lock
	cancel context.CancelFunc // stops the run; guarded by the device's lock
}

// scheduler decides, for the models that share a device, which requests run together and when. It is a state machine
// without goroutines or clock: a Device drives it in real time, a simulation in virtual time.
type scheduler struct {
	threads int // that may run at once
	busy    int
	queues  []*queue
	floor   float64 // used of the queue that was last served: who was idle does not save up
	expired []*request
	serial  uint64
}

func (s *scheduler) add(c BatchConfig) *queue {
	q := &queue{config: c, lanes: map[string]*lane{}, used: s.floor, counts: map[string]int64{}}
	q.config.Threads = min(max(c.Threads, 1), s.threads) // who wants more than there is gets what there is
	q.config.Weight = cmp.Or(c.Weight, 1)
	s.queues = append(s.queues, q)
	return q
}

func (s *scheduler) drop(q *queue) {
	s.queues = slices.DeleteFunc(s.queues, func(o *queue) bool { return o == q })
}

// shed is why a request was not admitted.
type shed struct {
	reason string
	after  time.Duration // when it makes sense to come back
	err    error
}

// Error implements error.
func (s *shed) Error() string { return s.err.Error() }

// Unwrap returns the error with its code.
func (s *shed) Unwrap() error { return s.err }

// RetryAfter returns when it makes sense to come back after an error, 0 when the error does not say.
func RetryAfter(err error) time.Duration {
	if s, ok := errors.AsType[*shed](err); ok {
		return s.after
	}
	return 0
}

// admit puts a request into a queue, or says why not.
func (s *scheduler) admit(q *queue, r *request, now instant) *shed {
	r.arrived, r.place, r.queue, r.probe = now, -1, q, q.idle()
	r.level = min(max(cmp.Or(r.level, defaultLevel), highestLevel), lowestLevel)
	if refused := s.refuse(q, r, now); refused != nil {
		q.counts["shed_"+refused.reason]++
		return refused
	}
	r.urgency = q.config.Policy.urgency(r)
	s.serial++
	r.serial = s.serial
	l := q.lanes[r.shape]
	if l == nil {
		l = &lane{}
		q.lanes[r.shape] = l
	}
	if r.probe {
		q.used = max(q.used, s.floor)
	}
	heap.Push(l, r)
	q.count(r, 1)
	if q.last > 0 {
		q.gap += (float64(now-q.last) - q.gap) / 8
	}
	q.last = now
	return nil
}

// idle says that nothing waits or runs.
func (q *queue) idle() bool { return q.rows == 0 && len(q.running) == 0 }

func (q *queue) count(r *request, sign int64) {
	q.rows += sign * r.rows
	q.bytes += sign * r.bytes
	q.atLevel[r.level] += sign * r.rows
}

func (s *scheduler) refuse(q *queue, r *request, now instant) *shed {
	c := &q.config
	switch {
	case q.closed:
		return &shed{"draining", time.Second, errDraining}
	case q.rows > 0 && q.rows+r.rows > c.QueueRows:
		return &shed{"queue_rows", q.drain(s), registry.Errorf(registry.Exhausted, "%d rows wait already, of at most %d", q.rows, c.QueueRows)}
	case q.bytes > 0 && q.bytes+r.bytes > c.QueueBytes:
		return &shed{"queue_bytes", q.drain(s), registry.Errorf(registry.Exhausted, "%d bytes wait already, of at most %d", q.bytes, c.QueueBytes)}
	}
	if end := c.Policy.finish(s, q, r, now); end > r.deadline {
		return &shed{"deadline", end - r.deadline, registry.Errorf(registry.Exhausted, "%d rows wait already: the answer would take %v, and the deadline is in %v",
			q.rows, (end - now).Round(10*time.Microsecond), (r.deadline - now).Round(10*time.Microsecond))}
	}
	return nil
}

// drain is how long what waits will take.
func (q *queue) drain(s *scheduler) time.Duration {
	return q.work(s, q.rows)
}

// work is how long the device takes for rows rows of the model.
func (q *queue) work(s *scheduler, rows int64) time.Duration {
	took := time.Duration(rows/q.most()) * q.latency.slow(q.most())
	if rest := rows % q.most(); rest > 0 {
		took += q.latency.slow(rest)
	}
	return time.Duration(float64(took) * q.contention(s))
}

// contention is how much longer the model waits for its batches because other models want the device too, less what its
// own runners do at once.
func (q *queue) contention(s *scheduler) float64 {
	wanted := 0.0
	for _, o := range s.queues {
		if o == q || o.rows > 0 || len(o.running) > 0 {
			wanted += o.config.Weight
		}
	}
	return wanted / q.config.Weight / float64(max(min(q.config.Runners, s.threads/q.config.Threads), 1))
}

// remove takes a waiting request out; false when it runs already.
func (s *scheduler) remove(r *request) bool {
	if r.place < 0 {
		return false
	}
	q := r.queue
	l := q.lanes[r.shape]
	heap.Remove(l, r.place)
	q.count(r, -1)
	if l.Len() == 0 {
		delete(q.lanes, r.shape)
	}
	return true
}

// next returns a batch to run now, or nil and when to ask again; anything that is admitted, removed or done is a reason
// to ask before. Requests that can no longer be in time are moved to s.expired.
func (s *scheduler) next(now instant) (*batch, instant) {
	wake := never
	for len(s.queues) > 0 {
		q, until := s.neediest(now, wake)
		wake = until
		if q == nil {
			return nil, wake
		}
		if s.busy > 0 && s.busy+q.config.Threads > s.threads {
			return nil, wake // its turn: nobody smaller slips past
		}
		if b := s.take(q, now); b != nil {
			return b, wake
		}
	}
	return nil, wake
}

// neediest returns the queue that has a batch ready and used the least of its share.
func (s *scheduler) neediest(now, wake instant) (*queue, instant) {
	var best *queue
	for _, q := range s.queues {
		if q.rows == 0 || len(q.running) >= q.config.Runners {
			continue
		}
		l := q.urgent()
		if until, _ := q.config.Policy.hold(s, q, l, now); until > now && !q.closed {
			wake = min(wake, until)
			continue
		}
		if best == nil || q.used < best.used {
			best = q
		}
	}
	return best, wake
}

// urgent returns the lane whose head is the most urgent.
func (q *queue) urgent() *lane {
	var best *lane
	for _, l := range q.lanes {
		if best == nil || before((*l)[0], (*best)[0]) {
			best = l
		}
	}
	return best
}

// before orders requests; of equally urgent ones the first to come goes first.
func before(a, b *request) bool {
	return a.urgency < b.urgency || a.urgency == b.urgency && a.serial < b.serial
}

// take forms a batch of the most urgent lane.
func (s *scheduler) take(q *queue, now instant) *batch {
	l := q.urgent()
	_, reason := q.config.Policy.hold(s, q, l, now)
	b := &batch{queue: q, reason: reason, began: now}
	tightest := never
	for l.Len() > 0 {
		r := (*l)[0]
		if q.config.Policy.late(q, r, now) {
			heap.Pop(l)
			q.count(r, -1)
			q.counts["shed_late"]++
			s.expired = append(s.expired, r)
			continue
		}
		tight := min(tightest, r.deadline)
		if len(b.requests) > 0 && (r.alone || b.rows+r.rows > q.config.MaxRows || q.config.Policy.enough(q, b.rows+r.rows, tight, now)) {
			break
		}
		tightest = tight
		b.rows += r.rows
		b.requests = append(b.requests, r)
		heap.Pop(l)
		q.count(r, -1)
	}
	if l.Len() == 0 {
		for shape, o := range q.lanes {
			if o == l {
				delete(q.lanes, shape)
			}
		}
	}
	if len(b.requests) == 0 {
		return nil
	}
	took := q.latency.usual(q.padded(b.rows))
	b.expected = now + took
	q.running = append(q.running, b.expected)
	s.busy += q.config.Threads
	s.floor = max(s.floor, q.used)
	q.counts["dispatch_"+reason]++
	q.dispatched++
	return b
}

// exploreEvery is how often a batch is formed without regard to what is thought of its size, while some size was not seen
// for long: a thought that is wrong would otherwise keep itself alive.
const exploreEvery = 64

func (q *queue) exploring() bool {
	return q.dispatched%exploreEvery == exploreEvery-1 && q.latency.stale()
}

// most is how many rows a batch should have at most.
func (q *queue) most() int64 {
	if q.latency.best == 0 || q.exploring() {
		return q.config.MaxRows
	}
	return min(q.latency.best, q.config.MaxRows)
}

// padded is how many rows a batch of rows rows runs with.
func (q *queue) padded(rows int64) int64 {
	for _, size := range q.config.PadTo {
		if size >= rows {
			return size
		}
	}
	return rows
}

// ran says that a batch has ended.
func (s *scheduler) ran(b *batch, took time.Duration, ok bool) {
	q := b.queue
	if i := slices.Index(q.running, b.expected); i >= 0 {
		q.running = slices.Delete(q.running, i, i+1)
	}
	s.busy -= q.config.Threads
	q.used += float64(took) * float64(q.config.Threads) / q.config.Weight
	if ok {
		q.latency.observe(q.padded(b.rows), took)
	}
}
