package engine

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// errDraining is what a model that closes answers.
var errDraining = registry.Errorf(registry.Unavailable, "the version is being unloaded")

// ErrDraining says that a model was closed; the same version may have been loaded again meanwhile.
var ErrDraining error = errDraining

// errLate is what a request ends in that could not be answered by its deadline any more.
var errLate = context.DeadlineExceeded

// Device is what models run on together: so many threads, shared fairly. It drives the scheduler in real time.
type Device struct {
	start time.Time
	tasks sync.WaitGroup
	calls sync.Pool // of *call

	mu    sync.Mutex
	s     scheduler
	timer *time.Timer
	wake  instant // when the timer rings
}

// NewDevice makes a device on which runs may take so many threads at once.
func NewDevice(threads int) *Device {
	d := &Device{start: time.Now(), s: scheduler{threads: max(threads, 1)}, wake: never}
	d.calls.New = func() any { return &call{done: make(chan struct{}, 1)} }
	d.timer = time.AfterFunc(time.Hour, d.tick)
	return d
}

// Close waits until everything that runs has ended. The models on it are closed before.
func (d *Device) Close() {
	d.timer.Stop()
	d.tasks.Wait()
}

func (d *Device) now() instant { return time.Since(d.start) }

// tick runs what waited for company long enough.
func (d *Device) tick() {
	d.mu.Lock()
	d.wake = never
	ready := d.dispatch(nil)
	d.mu.Unlock()
	d.spawn(ready)
}

// dispatch takes what should run now, answers what is late, and sets the timer; d.mu is held.
func (d *Device) dispatch(ready []*batch) []*batch {
	now := d.now()
	for {
		b, wake := d.s.next(now)
		for _, r := range d.s.expired {
			q := r.queue // once answered, the request is its caller's again
			r.call.answer(nil, errLate, Timing{Queue: now - r.arrived})
			d.drained(q)
		}
		clear(d.s.expired)
		d.s.expired = d.s.expired[:0]
		if b == nil {
			if wake < d.wake {
				d.wake = wake
				d.timer.Reset(max(wake-now, 0))
			}
			return ready
		}
		b.live = len(b.requests)
		for _, r := range b.requests {
			r.call.batch = b
		}
		ready = append(ready, b)
	}
}

// spawn runs batches in goroutines of their own.
func (d *Device) spawn(ready []*batch) {
	for _, b := range ready {
		d.tasks.Go(func() { d.work(b) })
	}
}

// work runs a batch, and then what became ready by its end, until there is nothing left.
func (d *Device) work(b *batch) {
	for b != nil {
		ready := d.execute(b)
		b = nil
		if len(ready) > 0 {
			b = ready[0]
			d.spawn(ready[1:])
		}
	}
}

// call is a request and who waits for it. It is used again unless it was given up.
type call struct {
	request

	model   *Model
	ctx     context.Context //nolint:containedctx // a request lives as long as its context
	inputs  []Tensor
	done    chan struct{} // holds one token when there is an answer
	outputs []Tensor
	err     error
	timing  Timing
	batch   *batch // that it runs in; guarded by the device's lock
}

func (c *call) answer(outputs []Tensor, err error, t Timing) {
	c.outputs, c.err, c.timing = outputs, err, t
	c.done <- struct{}{}
}

// do queues rows for a model and waits for their outputs. A request whose turn comes at once, alone, runs on the
// caller's goroutine.
func (d *Device) do(ctx context.Context, m *Model, inputs []Tensor, rows int64, level int) ([]Tensor, Timing, error) {
	c := d.calls.Get().(*call) //nolint:forcetypeassert // the pool's only type
	c.model, c.ctx, c.inputs, c.outputs, c.err, c.batch, c.timing = m, ctx, inputs, nil, nil, nil, Timing{}
	c.request = request{rows: rows, bytes: bytesOf(inputs), level: level, deadline: never, call: c}
	switch {
	case rows == 0:
		c.rows, c.alone, c.shape = 1, true, "empty"
	case !m.fixedShape:
		c.shape = shapeKey(inputs)
	}
	if t, ok := ctx.Deadline(); ok {
		c.deadline = t.Sub(d.start)
	}
	d.mu.Lock()
	if refused := d.s.admit(m.queue, &c.request, d.now()); refused != nil {
		d.mu.Unlock()
		c.err = refused
		return d.result(c)
	}
	var few [2]*batch
	ready := d.dispatch(few[:0])
	d.mu.Unlock()
	for i, b := range ready {
		if len(b.requests) == 1 && b.requests[0] == &c.request {
			d.spawn(ready[:i])
			d.spawn(ready[i+1:])
			d.spawn(d.execute(b))
			<-c.done // answered: nobody else waits for it, so its own end is not watched
			return d.result(c)
		}
	}
	d.spawn(ready)
	select {
	case <-c.done:
		return d.result(c)
	case <-ctx.Done():
		d.abandon(c)
		return nil, Timing{Queue: d.now() - c.arrived}, ctx.Err()
	}
}

// result takes the answer out and gives the call back.
func (d *Device) result(c *call) ([]Tensor, Timing, error) {
	outputs, t, err := c.outputs, c.timing, c.err
	c.model, c.ctx, c.inputs, c.outputs, c.batch = nil, nil, nil, nil, nil
	d.calls.Put(c)
	return outputs, t, err
}

func bytesOf(inputs []Tensor) int64 {
	n := 0
	for i := range inputs {
		n += len(inputs[i].Data)
	}
	return int64(n)
}

// abandon takes a request out of the queue or, when it was the last one its batch ran for, stops the run.
func (d *Device) abandon(c *call) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.s.remove(&c.request) {
		d.drained(c.queue)
		return
	}
	if b := c.batch; b != nil {
		if b.live--; b.live == 0 && b.cancel != nil {
			b.cancel()
		}
	}
}

// drained tells whoever closes a model that nothing of it is left; d.mu is held.
func (d *Device) drained(q *queue) {
	if q.closed && q.rows == 0 && len(q.running) == 0 && q.empty != nil {
		close(q.empty)
		q.empty = nil
	}
}

// close refuses new requests, waits until the others are answered or ctx ends, and takes the model off the device.
func (d *Device) close(ctx context.Context, q *queue) error {
	d.mu.Lock()
	q.closed = true
	empty := make(chan struct{})
	q.empty = empty
	ready := d.dispatch(nil)
	d.drained(q)
	d.mu.Unlock()
	d.spawn(ready)
	var err error
	select {
	case <-empty:
	case <-ctx.Done():
		err = ctx.Err()
		d.failWaiting(q)
		<-empty
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.s.drop(q)
	return err
}

func (d *Device) failWaiting(q *queue) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range q.lanes {
		for _, r := range slices.Clone(*l) {
			d.s.remove(r)
			r.call.answer(nil, errDraining, Timing{})
		}
	}
	d.drained(q)
}
