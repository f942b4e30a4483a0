package engine

import (
	"cmp"
	"container/heap"
	"slices"
	"time"
)

// Arrival is one request of a trace.
type Arrival struct {
	At       time.Duration
	Model    int // index into Simulation.Models
	Rows     int64
	Deadline time.Duration // after At
	Priority int
	Shape    string
}

// SimulatedModel is a model of a simulation: how its batches are formed, and what a run takes.
type SimulatedModel struct {
	Batch BatchConfig
	Run   func(rows int64) time.Duration // may draw from a seeded source: runs are asked for in order
}

// Simulation is a device in virtual time.
type Simulation struct {
	Threads int
	Models  []SimulatedModel
	Trace   []Arrival // ascending in At
}

// SimulatedModelResult is what became of a model's requests.
type SimulatedModelResult struct {
	Requests, InTime, Late, Shed, Expired int
	Rows, Batches                         int64
	Latency                               []time.Duration // of answered requests, ascending
}

// Quantile returns a quantile of the answered requests' latency, 0 when there is none.
func (r SimulatedModelResult) Quantile(q float64) time.Duration {
	if len(r.Latency) == 0 {
		return 0
	}
	return r.Latency[min(int(q*float64(len(r.Latency))), len(r.Latency)-1)]
}

// simEvent is the end of a run.
type simEvent struct {
	at    instant
	serie int // breaks ties in the order of starts
	batch *batch
	took  time.Duration
}

type simEvents []simEvent

func (e simEvents) Len() int { return len(e) }
func (e simEvents) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].serie < e[j].serie
}
func (e simEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i] }

// Push implements heap.Interface.
func (e *simEvents) Push(x any) { *e = append(*e, x.(simEvent)) } //nolint:forcetypeassert // the only type pushed

// Pop implements heap.Interface.
func (e *simEvents) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

// simulator is the state of a simulation under way.
type simulator struct {
	s      scheduler
	in     Simulation
	queues []*queue
	out    []SimulatedModelResult
	of     map[*queue]int
	ends   simEvents
	starts int
}

// Simulate runs a trace through the scheduler that serves real traffic. The same simulation gives the same result.
func Simulate(in Simulation) []SimulatedModelResult {
	sim := &simulator{s: scheduler{threads: max(in.Threads, 1)}, in: in, out: make([]SimulatedModelResult, len(in.Models)), of: map[*queue]int{}}
	for i, m := range in.Models {
		c := m.Batch
		c.QueueBytes = cmp.Or(c.QueueBytes, defaultQueueBytes)
		q := sim.s.add(c)
		sim.queues, sim.of[q] = append(sim.queues, q), i
	}
	wake := never
	for next := 0; ; {
		now := wake
		if next < len(in.Trace) {
			now = min(now, in.Trace[next].At)
		}
		if len(sim.ends) > 0 {
			now = min(now, sim.ends[0].at)
		}
		if now == never {
			break
		}
		for len(sim.ends) > 0 && sim.ends[0].at <= now {
			sim.end(heap.Pop(&sim.ends).(simEvent)) //nolint:forcetypeassert // the only type pushed
		}
		for ; next < len(in.Trace) && in.Trace[next].At <= now; next++ {
			sim.arrive(in.Trace[next], now)
		}
		wake = sim.start(now)
	}
	for i := range sim.out {
		slices.Sort(sim.out[i].Latency)
	}
	return sim.out
}

func (sim *simulator) arrive(a Arrival, now instant) {
	sim.out[a.Model].Requests++
	r := &request{rows: a.Rows, shape: a.Shape, level: a.Priority, deadline: a.At + a.Deadline}
	if sim.s.admit(sim.queues[a.Model], r, now) != nil {
		sim.out[a.Model].Shed++
	}
}

// start starts what should run and returns when to look again.
func (sim *simulator) start(now instant) instant {
	for {
		b, wake := sim.s.next(now)
		if b == nil {
			if wake <= now {
				wake = now + 1
			}
			sim.expire()
			return wake
		}
		sim.expire()
		m := sim.of[b.queue]
		took := sim.in.Models[m].Run(b.queue.padded(b.rows))
		sim.starts++
		heap.Push(&sim.ends, simEvent{at: now + took, serie: sim.starts, batch: b, took: took})
	}
}

// expire counts the requests that the scheduler gave up.
func (sim *simulator) expire() {
	for _, r := range sim.s.expired {
		sim.out[sim.of[r.queue]].Expired++
	}
	sim.s.expired = sim.s.expired[:0]
}

func (sim *simulator) end(e simEvent) {
	sim.s.ran(e.batch, e.took, true)
	out := &sim.out[sim.of[e.batch.queue]]
	out.Batches++
	out.Rows += e.batch.rows
	for _, r := range e.batch.requests {
		out.Latency = append(out.Latency, e.at-r.arrived)
		if e.at <= r.deadline {
			out.InTime++
		} else {
			out.Late++
		}
	}
}
