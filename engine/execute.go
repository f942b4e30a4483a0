package engine

import (
	"context"
	"time"
)

// Timing is where the time of a request went.
type Timing struct {
	Queue    time.Duration // until its batch ran
	Input    time.Duration // joining the batch
	Infer    time.Duration // the run
	Output   time.Duration // taking the batch apart
	Rows     int64         // of the batch
	CacheHit bool
}

// execute runs a batch and answers its requests. It returns what became ready by that.
func (d *Device) execute(b *batch) []*batch {
	m := b.requests[0].call.model
	ctx := b.requests[0].call.ctx
	if len(b.requests) > 1 {
		ctx = d.shared(b)
		defer b.cancel()
	}
	scratch := buffers.Get().(*buffer) //nolint:forcetypeassert // the pool's only type
	t0 := d.now()
	inputs := scratch.merge(b, m.queue.padded(b.rows))
	t1 := d.now()
	outputs, err := m.session.Run(ctx, inputs)
	t2 := d.now()
	var parts [][]Tensor
	if err == nil {
		parts, err = split(b, m.queue.padded(b.rows), outputs)
	}
	t3 := d.now()
	scratch.giveBack()
	timing := Timing{Input: t1 - t0, Infer: t2 - t1, Output: t3 - t2, Rows: b.rows}

	d.mu.Lock()
	d.s.ran(b, t2-t1, err == nil)
	alone := err != nil && len(b.requests) > 1 && b.live > 0
	ready := d.dispatch(nil)
	d.drained(b.queue)
	d.mu.Unlock()
	m.ran(b, timing, err)
	if alone {
		d.spawn(ready)
		d.isolate(b, t3)
		return nil
	}
	for i, r := range b.requests {
		t := timing
		t.Queue = b.began - r.arrived
		var mine []Tensor
		if err == nil {
			mine = parts[i]
		}
		r.call.answer(mine, err, t)
	}
	return ready
}

// ran counts a run.
func (m *Model) ran(b *batch, t Timing, err error) {
	m.counters.ran(b, t, err)
	if err == nil && m.onRun != nil {
		m.onRun(b.rows, t.Infer)
	}
}

// shared returns the context of a run that several requests wait for: it ends when the last of them has given up.
func (d *Device) shared(b *batch) context.Context {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.requests[0].call.ctx))
	d.mu.Lock()
	defer d.mu.Unlock()
	b.cancel = cancel
	if b.live == 0 {
		cancel()
	}
	return ctx
}

// isolate runs the requests of a batch that failed one by one, so that one that the model cannot take fails alone.
func (d *Device) isolate(b *batch, began instant) {
	for _, r := range b.requests {
		c := r.call
		if c.ctx.Err() != nil {
			c.answer(nil, c.ctx.Err(), Timing{})
			continue
		}
		at := d.now()
		outputs, err := c.model.session.Run(c.ctx, c.inputs)
		t := Timing{Queue: began - r.arrived, Infer: d.now() - at, Rows: r.rows}
		one := &batch{queue: b.queue, requests: []*request{r}, rows: r.rows}
		c.model.ran(one, t, err)
		c.answer(outputs, err, t)
	}
}
