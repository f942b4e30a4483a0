package engine

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// Batcher decides when which requests run together.
type Batcher interface {
	// Do queues a request, waits for its turn and returns its own rows of every output. It ends in Exhausted, at once,
	// when the queue is full, and with ctx's error when ctx ends first; queued work is then removed.
	Do(ctx context.Context, inputs []Tensor, rows int64) ([]Tensor, error)
	// Queued returns the rows that wait.
	Queued() int64
	// Close refuses new requests, waits until the queued ones are answered or ctx ends, and stops.
	Close(ctx context.Context) error
}

// BatchConfig bounds a batcher.
type BatchConfig struct {
	MaxRows   int64         // of a batch
	MaxDelay  time.Duration // longest the first request of a batch waits for company while a runner is free
	QueueRows int64         // that may wait
	Runners   int           // batches that run at once
}

// errDraining is what a batcher that closes answers.
var errDraining = registry.Errorf(registry.Unavailable, "the version is being unloaded")

// queueBatcher gathers whatever waits when a runner comes free, so batches grow by themselves under load and a lone
// request never waits unless MaxDelay says so.
type queueBatcher struct {
	session Session
	config  BatchConfig
	observe func(rows int64, took time.Duration)
	done    sync.WaitGroup
	wake    chan struct{} // one token for each runner that should look

	mu     sync.Mutex
	queue  []*pending
	rows   int64
	closed bool
}

type pending struct {
	ctx    context.Context //nolint:containedctx // a request lives as long as its context
	inputs []Tensor
	rows   int64
	key    string
	since  time.Time
	answer chan answer
}

type answer struct {
	outputs []Tensor
	err     error
}

// NewBatcher starts the runners; Close stops them. observe is told of every batch that ran.
func NewBatcher(s Session, c BatchConfig, observe func(rows int64, took time.Duration)) Batcher {
	b := &queueBatcher{session: s, config: c, observe: observe, wake: make(chan struct{}, c.Runners)}
	for range c.Runners {
		b.done.Go(b.runner)
	}
	return b
}

func (b *queueBatcher) Do(ctx context.Context, inputs []Tensor, rows int64) ([]Tensor, error) {
	p := &pending{ctx: ctx, inputs: inputs, rows: rows, key: shapeKey(inputs), since: time.Now(), answer: make(chan answer, 1)}
	if err := b.push(p); err != nil {
		return nil, err
	}
	select {
	case a := <-p.answer:
		return a.outputs, a.err
	case <-ctx.Done():
		b.remove(p)
		return nil, ctx.Err()
	}
}

func (b *queueBatcher) push(p *pending) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return errDraining
	}
	if b.rows+p.rows > b.config.QueueRows && b.rows > 0 {
		return registry.Errorf(registry.Exhausted, "%d rows wait already, of at most %d", b.rows, b.config.QueueRows)
	}
	b.queue = append(b.queue, p)
	b.rows += p.rows
	b.signal()
	return nil
}

// signal wakes a runner if one sleeps.
func (b *queueBatcher) signal() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *queueBatcher) remove(p *pending) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(b.queue, p); i >= 0 {
		b.queue = slices.Delete(b.queue, i, i+1)
		b.rows -= p.rows
	}
}

func (b *queueBatcher) Queued() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rows
}

func (b *queueBatcher) Close(ctx context.Context) error {
	b.mu.Lock()
	if !b.closed {
		b.closed = true
		close(b.wake)
		b.wake = nil // push never signals again
	}
	b.mu.Unlock()
	stopped := make(chan struct{})
	go func() { b.done.Wait(); close(stopped) }() // ends with the runners
	select {
	case <-stopped:
		return nil
	case <-ctx.Done():
		b.failQueued()
		<-stopped
		return ctx.Err()
	}
}

func (b *queueBatcher) failQueued() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.queue {
		p.answer <- answer{err: errDraining}
	}
	b.queue, b.rows = nil, 0
}

func (b *queueBatcher) runner() {
	b.mu.Lock()
	wake := b.wake
	b.mu.Unlock()
	for open := true; open; {
		_, open = <-wake
		for {
			batch, rows, wait := b.take(time.Now(), !open)
			if wait > 0 {
				select {
				case <-time.After(wait):
				case _, open = <-wake:
				}
				continue
			}
			if len(batch) == 0 {
				break
			}
			b.run(batch, rows)
		}
	}
}

// take removes the next batch from the queue, or says how long its head may still wait for company.
func (b *queueBatcher) take(now time.Time, draining bool) (batch []*pending, rows int64, wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = slices.DeleteFunc(b.queue, func(p *pending) bool {
		if p.ctx.Err() == nil {
			return false
		}
		b.rows -= p.rows
		return true
	})
	if len(b.queue) == 0 {
		return nil, 0, 0
	}
	key := b.queue[0].key
	for _, p := range b.queue {
		if p.key == key && (rows == 0 || rows+p.rows <= b.config.MaxRows) {
			rows += p.rows
			batch = append(batch, p)
		}
	}
	if left := b.config.MaxDelay - now.Sub(b.queue[0].since); left > 0 && rows < b.config.MaxRows && !draining {
		return nil, 0, left
	}
	b.queue = slices.DeleteFunc(b.queue, func(p *pending) bool { return slices.Contains(batch, p) })
	b.rows -= rows
	if len(b.queue) > 0 && !b.closed {
		b.signal()
	}
	return batch, rows, 0
}

// run runs a batch until the last of its requests has given up.
func (b *queueBatcher) run(batch []*pending, rows int64) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(batch[0].ctx))
	defer cancel()
	var waiting sync.WaitGroup
	for _, p := range batch {
		waiting.Add(1)
		stop := context.AfterFunc(p.ctx, waiting.Done)
		defer func() {
			if stop() {
				waiting.Done()
			}
		}()
	}
	go func() { waiting.Wait(); cancel() }() // ends when every request has, at the latest with this function
	began := time.Now()
	outputs, err := b.session.Run(ctx, merge(batch, rows))
	b.observe(rows, time.Since(began))
	if err == nil && len(batch) == 1 {
		batch[0].answer <- answer{outputs: outputs}
		return
	}
	var parts [][]Tensor
	if err == nil {
		parts, err = split(batch, rows, outputs)
	}
	for i, p := range batch {
		if err != nil {
			p.answer <- answer{err: err}
			continue
		}
		p.answer <- answer{outputs: parts[i]}
	}
}
