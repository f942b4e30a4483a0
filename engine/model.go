package engine

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// Model is a session that serves on a device.
type Model struct {
	device     *Device
	queue      *queue
	session    Session
	config     registry.ServingConfig
	fixedShape bool // requests differ in their rows alone
	cache      *cache
	counters   counters
	onRun      func(rows int64, took time.Duration)
}

// defaultQueueBytes bounds the inputs that wait where the serving config does not.
const defaultQueueBytes = 256 << 20

// NewModel starts serving a session on a device as the serving config says. measured is what runs are known to take.
func NewModel(d *Device, s Session, c registry.ServingConfig, measured []registry.BatchLatency) *Model {
	m := &Model{device: d, session: s, config: c, fixedShape: true}
	bc := BatchConfig{
		Policy: PolicyOf(c.Batching), MaxRows: int64(c.MaxBatch), MaxDelay: time.Duration(c.MaxDelayMicros) * time.Microsecond,
		QueueRows: int64(c.QueueRows), QueueBytes: cmp.Or(c.QueueBytes, defaultQueueBytes), Runners: c.Runners, Threads: c.Threads, Weight: c.Weight,
	}
	for _, n := range c.BatchSizes {
		bc.PadTo = append(bc.PadTo, int64(n))
	}
	if !s.Signature().Batched {
		bc.MaxRows, bc.MaxDelay, bc.PadTo = 1, 0, nil
	}
	for _, in := range s.Signature().Inputs {
		for i, dim := range in.Shape {
			m.fixedShape = m.fixedShape && (i == 0 || dim >= 0)
		}
	}
	if c.CacheBytes > 0 {
		m.cache = newCache(c.CacheBytes)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m.queue = d.s.add(bc)
	m.queue.latency.seed(measured)
	return m
}

// OnRun sets what is told of every run that succeeds. It is called before the first Infer, if at all.
func (m *Model) OnRun(f func(rows int64, took time.Duration)) { m.onRun = f }

// Signature returns the model's signature.
func (m *Model) Signature() registry.Signature { return m.session.Signature() }

// Request is what a model is asked.
type Request struct {
	Inputs   []Tensor
	Outputs  []string // wanted, in this order; none: all
	Priority int      // 1 goes first; 0 is 2
}

// Infer runs the model and says where the time went. It ends in Invalid for tensors the model does not take, TooLarge,
// Exhausted (see RetryAfter) when the request is shed, ErrDraining, or with ctx's error.
func (m *Model) Infer(ctx context.Context, r Request) ([]Tensor, Timing, error) {
	began := time.Now()
	out, t, err := m.infer(ctx, r)
	m.counters.ended(t, time.Since(began), err)
	return out, t, err
}

func (m *Model) infer(ctx context.Context, r Request) ([]Tensor, Timing, error) {
	s := m.session.Signature()
	ordered, rows, err := CheckInputs(s, r.Inputs)
	if err != nil {
		return nil, Timing{}, err
	}
	if rows > int64(m.config.MaxRequestRows) {
		return nil, Timing{}, registry.Errorf(registry.TooLarge, "%d rows in one request, of at most %d: send them in parts, or score them as a batch", rows, m.config.MaxRequestRows)
	}
	picked, err := SelectOutputs(s, r.Outputs)
	if err != nil {
		return nil, Timing{}, err
	}
	all, t, err := m.answer(ctx, ordered, rows, r)
	if err != nil {
		return nil, t, err
	}
	if len(r.Outputs) == 0 {
		return all, t, nil
	}
	out := make([]Tensor, len(picked))
	for i, p := range picked {
		out[i] = all[p]
	}
	return out, t, nil
}

// answer asks the cache, if there is one, and the device.
func (m *Model) answer(ctx context.Context, ordered []Tensor, rows int64, r Request) ([]Tensor, Timing, error) {
	if m.cache == nil {
		return m.device.do(ctx, m, ordered, rows, r.Priority)
	}
	began := time.Now()
	var t Timing
	all, hit, err := m.cache.get(ctx, keyOf(ordered), func() ([]Tensor, error) {
		m.counters.missed(time.Since(began))
		all, ran, err := m.device.do(ctx, m, ordered, rows, r.Priority)
		t = ran
		if err != nil {
			return nil, err
		}
		return own(all), nil
	})
	t.CacheHit = hit
	return all, t, err
}

// own copies outputs out of the memory of their batch, which a cache would keep alive.
func own(outputs []Tensor) []Tensor {
	out := make([]Tensor, len(outputs))
	for i, t := range outputs {
		out[i] = t
		out[i].Data = append([]byte{}, t.Data...)
	}
	return out
}

// Stats returns the model's counters.
func (m *Model) Stats() Stats {
	out := m.counters.snapshot()
	m.device.mu.Lock()
	defer m.device.mu.Unlock()
	out.Queued = m.queue.rows
	out.Reasons = maps.Clone(m.queue.counts)
	return out
}

// Close drains the queue until ctx ends and frees the session.
func (m *Model) Close(ctx context.Context) error {
	return errors.Join(m.device.close(ctx, m.queue), m.session.Close())
}
