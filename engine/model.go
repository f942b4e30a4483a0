package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// Model is a session with its batcher.
type Model struct {
	session Session
	batcher Batcher
	config  registry.ServingConfig

	executions atomic.Int64
	rows       atomic.Int64
	busyMicros atomic.Int64
}

// NewModel starts serving a session as the serving config says.
func NewModel(s Session, c registry.ServingConfig) *Model {
	m := &Model{session: s, config: c}
	bc := BatchConfig{
		MaxRows: int64(c.MaxBatch), MaxDelay: time.Duration(c.MaxDelayMicros) * time.Microsecond, QueueRows: int64(c.QueueRows),
		Runners: c.Runners,
	}
	if !s.Signature().Batched {
		bc.MaxRows, bc.MaxDelay = 1, 0
	}
	m.batcher = NewBatcher(s, bc, func(rows int64, took time.Duration) {
		m.executions.Add(1)
		m.rows.Add(rows)
		m.busyMicros.Add(took.Microseconds())
	})
	return m
}

// Signature returns the model's signature.
func (m *Model) Signature() registry.Signature { return m.session.Signature() }

// Infer runs the model on inputs and returns the named outputs, all when none are named. It ends in Invalid for
// tensors the model does not take, Exhausted when the queue is full, or with ctx's error.
func (m *Model) Infer(ctx context.Context, inputs []Tensor, outputs []string) ([]Tensor, error) {
	s := m.session.Signature()
	ordered, rows, err := CheckInputs(s, inputs)
	if err != nil {
		return nil, err
	}
	if rows > int64(m.config.MaxRequestRows) {
		return nil, registry.Errorf(registry.TooLarge, "%d rows in one request, of at most %d: send them in parts, or score them as a batch", rows, m.config.MaxRequestRows)
	}
	picked, err := SelectOutputs(s, outputs)
	if err != nil {
		return nil, err
	}
	all, err := m.batcher.Do(ctx, ordered, rows)
	if err != nil {
		return nil, err
	}
	out := make([]Tensor, len(picked))
	for i, p := range picked {
		out[i] = all[p]
	}
	return out, nil
}

// Stats is what a model has done since it was loaded.
type Stats struct {
	Executions int64
	Rows       int64
	Busy       time.Duration
	Queued     int64
}

// Stats returns the model's counters.
func (m *Model) Stats() Stats {
	return Stats{
		Executions: m.executions.Load(), Rows: m.rows.Load(), Busy: time.Duration(m.busyMicros.Load()) * time.Microsecond,
		Queued: m.batcher.Queued(),
	}
}

// Close drains the queue until ctx ends and frees the session.
func (m *Model) Close(ctx context.Context) error {
	return errors.Join(m.batcher.Close(ctx), m.session.Close())
}
