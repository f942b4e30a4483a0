package engine

import (
	"maps"
	"sync"
	"time"
)

// Sum is how often something happened and how long it took in all.
type Sum struct {
	Count int64
	Time  time.Duration
}

func (s *Sum) add(t time.Duration) {
	s.Count++
	s.Time += t
}

// BatchSums are the runs of one batch size.
type BatchSums struct{ Input, Infer, Output Sum }

// Stats is what a model has done since it was loaded, in the terms of the protocol's statistics extension: sums are of
// requests, so a run counts once for every request in its batch; Batches are of runs.
type Stats struct {
	Last       time.Time // end of the last successful request
	Rows       int64     // inferred with success; answers from the cache are not
	Executions int64     // runs with success

	Success, Fail, Queue, Input, Infer, Output, CacheHit, CacheMiss Sum

	Batches map[int64]BatchSums // by rows
	Reasons map[string]int64    // dispatches and sheds by reason
	Queued  int64               // rows that wait
	Memory  int64               // bytes, 0 when not known
}

// counters counts.
type counters struct {
	mu sync.Mutex
	s  Stats
}

// ran counts a run.
func (c *counters) ran(b *batch, t Timing, err error) {
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.Executions++
	c.s.Rows += b.rows
	if c.s.Batches == nil {
		c.s.Batches = map[int64]BatchSums{}
	}
	sums := c.s.Batches[b.rows]
	sums.Input.add(t.Input)
	sums.Infer.add(t.Infer)
	sums.Output.add(t.Output)
	c.s.Batches[b.rows] = sums
}

// ended counts a request.
func (c *counters) ended(t Timing, took time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.s.Fail.add(took)
		return
	}
	c.s.Last = time.Now()
	c.s.Success.add(took)
	if t.CacheHit {
		c.s.CacheHit.add(took)
		return
	}
	c.s.Queue.add(t.Queue)
	c.s.Input.add(t.Input)
	c.s.Infer.add(t.Infer)
	c.s.Output.add(t.Output)
}

func (c *counters) missed(took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s.CacheMiss.add(took)
}

func (c *counters) snapshot() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.s
	out.Batches = maps.Clone(c.s.Batches)
	return out
}
