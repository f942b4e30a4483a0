package engine_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// echo is a session that passes two inputs through, rows at a time, and knows what it was asked.
type echo struct {
	pause  time.Duration
	hang   bool // until the context ends
	refuse byte // rows that hold this byte fail the run
	most   atomic.Int64
	runs   atomic.Int64
	at     atomic.Int64 // runs under way
	peak   atomic.Int64
	closed atomic.Bool
}

var errRefused = errors.New("the model cannot take that")

func (*echo) Signature() registry.Signature {
	in := []registry.Tensor{{Name: "a", Datatype: registry.Uint8, Shape: []int64{-1, -1}}, {Name: "s", Datatype: registry.Bytes, Shape: []int64{-1}}}
	return registry.Signature{Inputs: in, Outputs: []registry.Tensor{{Name: "b", Datatype: registry.Uint8, Shape: []int64{-1, -1}}, {Name: "t", Datatype: registry.Bytes, Shape: []int64{-1}}}, Batched: true}
}
func (*echo) Provider() string { return "echo" }
func (e *echo) Close() error   { e.closed.Store(true); return nil }

func (e *echo) Run(ctx context.Context, inputs []engine.Tensor) ([]engine.Tensor, error) {
	e.runs.Add(1)
	e.peak.Store(max(e.peak.Load(), e.at.Add(1)))
	defer e.at.Add(-1)
	e.most.Store(max(e.most.Load(), inputs[0].Shape[0]))
	if e.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if e.pause > 0 {
		time.Sleep(e.pause)
	}
	if e.refuse != 0 && bytes.IndexByte(inputs[0].Data, e.refuse) >= 0 {
		return nil, errRefused
	}
	out := []engine.Tensor{
		{Name: "b", Datatype: registry.Uint8, Shape: slices.Clone(inputs[0].Shape), Data: slices.Clone(inputs[0].Data)},
		{Name: "t", Datatype: registry.Bytes, Shape: slices.Clone(inputs[1].Shape), Data: slices.Clone(inputs[1].Data)},
	}
	return out, ctx.Err()
}

// ask makes the inputs of a request whose every byte is tag.
func ask(tag byte, rows, width int64) []engine.Tensor {
	var text []byte
	for range rows {
		text = binary.LittleEndian.AppendUint32(text, uint32(tag%7))
		text = append(text, bytes.Repeat([]byte{tag}, int(tag%7))...)
	}
	return []engine.Tensor{
		{Name: "a", Datatype: registry.Uint8, Shape: []int64{rows, width}, Data: bytes.Repeat([]byte{tag}, int(rows*width))},
		{Name: "s", Datatype: registry.Bytes, Shape: []int64{rows}, Data: text},
	}
}

func serving(change func(*registry.ServingConfig)) registry.ServingConfig {
	c := registry.DefaultServingConfig()
	if change != nil {
		change(&c)
	}
	return c
}

// Any interleaving of requests of any shape gives every request exactly its own rows of the outputs it asked for; who
// gives up disturbs nobody.
func TestDevice_EveryRequestGetsItsOwnRows(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]registry.ServingConfig{
		"deadline": serving(func(c *registry.ServingConfig) { c.MaxBatch = 8; c.Runners = 2 }),
		"static": serving(func(c *registry.ServingConfig) {
			c.MaxBatch = 8
			c.Batching = registry.BatchStatic
			c.MaxDelayMicros = 200
		}),
		"padded": serving(func(c *registry.ServingConfig) { c.MaxBatch = 8; c.BatchSizes = []int{4, 8} }),
		"cached": serving(func(c *registry.ServingConfig) { c.MaxBatch = 8; c.CacheBytes = 4096 }),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, s := engine.NewDevice(2), &echo{pause: 50 * time.Microsecond}
			m := engine.NewModel(d, s, c, nil)
			var wg sync.WaitGroup
			for worker := range 16 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(worker), 9))
					for range 200 {
						tag, rows, width := byte(r.IntN(256)), 1+r.Int64N(10), 1+r.Int64N(3)
						ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
						if r.IntN(5) == 0 {
							cancel()
							ctx, cancel = context.WithTimeout(t.Context(), time.Duration(r.IntN(200))*time.Microsecond)
						}
						wanted := [][]string{nil, {"t", "b"}, {"b"}}[r.IntN(3)]
						in := ask(tag, rows, width)
						out, _, err := m.Infer(ctx, engine.Request{Inputs: in, Outputs: wanted, Priority: r.IntN(4)})
						cancel()
						if err != nil {
							if ctx.Err() == nil && registry.CodeOf(err) != registry.Exhausted {
								t.Errorf("unexpected: %v", err)
							}
							continue
						}
						for i, o := range out {
							source := map[string]engine.Tensor{"b": in[0], "t": in[1]}[o.Name]
							if !bytes.Equal(o.Data, source.Data) || !slices.Equal(o.Shape, source.Shape) || len(wanted) > 0 && wanted[i] != o.Name {
								t.Errorf("asked for %v of %d rows of %d and got %q %v %v", wanted, rows, width, o.Name, o.Shape, o.Data)
							}
						}
					}
				})
			}
			wg.Wait()
			require.NoError(t, m.Close(t.Context()))
			d.Close()
			require.True(t, s.closed.Load())
			require.LessOrEqual(t, s.most.Load(), int64(10), "a batch over the limit is one request alone")
			require.LessOrEqual(t, s.peak.Load(), int64(c.Runners))
			require.Less(t, s.runs.Load(), int64(16*200), "requests shared runs")
		})
	}
}

// One request that the model cannot take fails alone.
func TestDevice_IsolatesWhatTheModelCannotTake(t *testing.T) {
	t.Parallel()
	d, s := engine.NewDevice(1), &echo{pause: 2 * time.Millisecond, refuse: 66}
	m := engine.NewModel(d, s, serving(nil), nil)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			tag := byte(1)
			if i == 7 {
				tag = 66
			}
			out, _, err := m.Infer(t.Context(), engine.Request{Inputs: ask(tag, 1, 1)})
			if tag == 66 {
				if !errors.Is(err, errRefused) {
					t.Errorf("want %v, got %v", errRefused, err)
				}
			} else if err != nil || out[0].Data[0] != tag {
				t.Errorf("request %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	require.Less(t, s.runs.Load(), int64(25))
	require.NoError(t, m.Close(t.Context()))
	d.Close()
}

// A run that hangs is cut at the deadline of the last that waits for it; the runner then serves others.
func TestDevice_CutsARunThatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, s := engine.NewDevice(1), &echo{hang: true}
		m := engine.NewModel(d, s, serving(nil), nil)
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				limit := time.Duration(i+1) * 100 * time.Millisecond
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				_, _, err := m.Infer(ctx, engine.Request{Inputs: ask(1, 1, 1)})
				if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != limit {
					t.Errorf("request %d ended in %v after %v", i, err, time.Since(began))
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		s.hang = false
		_, _, err := m.Infer(t.Context(), engine.Request{Inputs: ask(1, 1, 1)})
		require.NoError(t, err)
		require.NoError(t, m.Close(t.Context()))
		d.Close()
	})
}

// A queued request leaves when its deadline passes, not when a runner comes free, and never runs.
func TestDevice_ExpiresByTimer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, s := engine.NewDevice(1), &echo{pause: time.Second}
		m := engine.NewModel(d, s, serving(nil), nil)
		var wg sync.WaitGroup
		wg.Go(func() { _, _, _ = m.Infer(t.Context(), engine.Request{Inputs: ask(1, 1, 1)}) })
		synctest.Wait()
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		_, _, err := m.Infer(ctx, engine.Request{Inputs: ask(2, 1, 1)})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 10*time.Millisecond, time.Since(began))
		require.Zero(t, m.Stats().Queued)
		wg.Wait()
		require.EqualValues(t, 1, s.runs.Load())
		// What is known of the model now says that 10 ms are not enough: the answer is immediate.
		began = time.Now()
		wg.Go(func() { _, _, _ = m.Infer(t.Context(), engine.Request{Inputs: ask(1, 1, 1)}) })
		synctest.Wait()
		again, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		_, _, err = m.Infer(again, engine.Request{Inputs: ask(2, 1, 1)})
		require.Equal(t, registry.Exhausted, registry.CodeOf(err))
		require.Zero(t, time.Since(began))
		require.Greater(t, engine.RetryAfter(err), 900*time.Millisecond)
		wg.Wait()
		require.NoError(t, m.Close(t.Context()))
		d.Close()
	})
}

// The queue has bounds in rows and in bytes, and closing answers everybody.
func TestDevice_BoundsItsQueueAndDrains(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, s := engine.NewDevice(1), &echo{pause: time.Second}
		m := engine.NewModel(d, s, serving(func(c *registry.ServingConfig) { c.QueueRows, c.QueueBytes, c.MaxBatch = 4, 60, 2 }), nil)
		var wg sync.WaitGroup
		answers := make([]error, 5)
		for i := range answers {
			wg.Go(func() { _, _, answers[i] = m.Infer(t.Context(), engine.Request{Inputs: ask(byte(i), 1, 1)}) })
			synctest.Wait()
		}
		_, _, err := m.Infer(t.Context(), engine.Request{Inputs: ask(1, 1, 1)})
		require.ErrorContains(t, err, "4 rows wait already, of at most 4")
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, m.Close(ctx), context.DeadlineExceeded)
		wg.Wait()
		ended := fmt.Sprint(answers)
		require.NoError(t, errors.Join(answers[:3]...), ended)
		require.ErrorIs(t, answers[4], engine.ErrDraining, ended)
		_, _, err = m.Infer(t.Context(), engine.Request{Inputs: ask(1, 1, 1)})
		require.ErrorIs(t, err, engine.ErrDraining)
		d.Close()
	})
}

// Requests with equal inputs that come together run once.
func TestModel_CacheRunsOnce(t *testing.T) {
	t.Parallel()
	d, s := engine.NewDevice(1), &echo{pause: 5 * time.Millisecond}
	m := engine.NewModel(d, s, serving(func(c *registry.ServingConfig) { c.CacheBytes = 1 << 20 }), nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			out, _, err := m.Infer(t.Context(), engine.Request{Inputs: ask(9, 2, 3), Outputs: []string{"b"}})
			if err != nil || !bytes.Equal(out[0].Data, ask(9, 2, 3)[0].Data) {
				t.Errorf("got %v, %v", out, err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, s.runs.Load())
	stats := m.Stats()
	require.EqualValues(t, 19, stats.CacheHit.Count)
	require.EqualValues(t, 1, stats.CacheMiss.Count)
	require.EqualValues(t, 20, stats.Success.Count)
	require.EqualValues(t, 2, stats.Rows, "answers from memory are not inferred")
	require.NoError(t, m.Close(t.Context()))
	d.Close()
}

// still is a session that allocates nothing.
type still struct{ outputs []engine.Tensor }

func (*still) Signature() registry.Signature {
	return registry.Signature{Inputs: []registry.Tensor{{Name: "x", Datatype: registry.FP32, Shape: []int64{-1, 4}}}, Outputs: []registry.Tensor{{Name: "y", Datatype: registry.FP32, Shape: []int64{-1, 4}}}, Batched: true}
}
func (*still) Provider() string { return "still" }
func (*still) Close() error     { return nil }
func (s *still) Run(context.Context, []engine.Tensor) ([]engine.Tensor, error) {
	return s.outputs, nil
}

// What the batcher allocates does not depend on the rows.
func TestDevice_AllocatesNothingPerRow(t *testing.T) {
	measure := func(rows int64) float64 {
		d := engine.NewDevice(1)
		data := make([]byte, rows*16)
		m := engine.NewModel(d, &still{[]engine.Tensor{{Name: "y", Datatype: registry.FP32, Shape: []int64{rows, 4}, Data: data}}}, serving(nil), nil)
		in := engine.Request{Inputs: []engine.Tensor{{Name: "x", Datatype: registry.FP32, Shape: []int64{rows, 4}, Data: data}}}
		n := testing.AllocsPerRun(200, func() {
			if _, _, err := m.Infer(context.Background(), in); err != nil {
				t.Error(err)
			}
		})
		if err := errors.Join(m.Close(t.Context())); err != nil {
			t.Error(err)
		}
		d.Close()
		return n
	}
	one, many := measure(1), measure(512)
	t.Logf("%v allocations for a request of one row, %v for one of 512", one, many)
	require.Equal(t, one, many) //nolint:testifylint // whole numbers
}

// A stall that made one run look endless does not keep the model from answering: what it takes is learnt anew.
func TestDevice_ForgetsAStall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, s := engine.NewDevice(1), &echo{pause: time.Minute}
		m := engine.NewModel(d, s, serving(nil), nil)
		_, _, err := m.Infer(t.Context(), engine.Request{Inputs: ask(1, 1, 1)})
		require.NoError(t, err)
		s.pause = time.Millisecond
		refused := 0
		for range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			var wg sync.WaitGroup
			for range 2 { // the second comes while the first runs, so it is judged
				wg.Go(func() {
					if _, _, err := m.Infer(ctx, engine.Request{Inputs: ask(1, 1, 1)}); err != nil {
						refused++
					}
				})
				synctest.Wait()
			}
			wg.Wait()
			cancel()
		}
		require.Less(t, refused, 20, "of 200")
		require.Positive(t, refused, "at first it was believed")
		require.NoError(t, m.Close(t.Context()))
		d.Close()
	})
}
