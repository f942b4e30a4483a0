package engine

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// Probe makes inputs of zeros (empty strings for BYTES) with the given rows; other free dimensions become 1.
func Probe(s registry.Signature, rows int64) []Tensor {
	inputs := make([]Tensor, len(s.Inputs))
	for i, in := range s.Inputs {
		shape := slices.Clone(in.Shape)
		n := int64(1)
		for d := range shape {
			if shape[d] < 0 {
				shape[d] = 1
			}
			if d == 0 && s.Batched {
				shape[d] = rows
			}
			n *= shape[d]
		}
		size, _ := in.Datatype.Size()
		if in.Datatype == registry.Bytes {
			size = 4 // the length of an empty string
		}
		inputs[i] = Tensor{Name: in.Name, Datatype: in.Datatype, Shape: shape, Data: make([]byte, n*int64(size))}
	}
	return inputs
}

// warmBudget bounds the part of a warm-up that is only there to learn.
const warmBudget = 2 * time.Second

// Warm runs the session with one row and with a full batch, so that the first request pays for no allocation or kernel
// choice, and, while the budget lasts, with the sizes between. It returns what the fastest of three runs of each took.
func Warm(ctx context.Context, s Session, maxBatch int) ([]registry.BatchLatency, error) {
	began := time.Now()
	var out []registry.BatchLatency
	for _, rows := range batchSizes(s.Signature(), maxBatch) {
		if rows != 1 && rows != maxBatch && time.Since(began) > warmBudget {
			continue
		}
		inputs := Probe(s.Signature(), int64(rows))
		took := time.Duration(math.MaxInt64)
		for range 3 { // the first pays for what is done once
			start := time.Now()
			if _, err := s.Run(ctx, inputs); err != nil {
				return nil, err
			}
			took = min(took, time.Since(start))
		}
		out = append(out, registry.BatchLatency{Rows: rows, P50: took.Microseconds(), P95: took.Microseconds(), Sample: 1})
	}
	return out, nil
}

// Measure returns the latency of a run for batches of 1, 2, 4, … up to maxBatch rows, within about budget in all.
func Measure(ctx context.Context, s Session, maxBatch int, budget time.Duration) ([]registry.BatchLatency, error) {
	sizes := batchSizes(s.Signature(), maxBatch)
	share := budget / time.Duration(len(sizes))
	var out []registry.BatchLatency
	for _, rows := range sizes {
		inputs := Probe(s.Signature(), int64(rows))
		var took []time.Duration
		for began := time.Now(); len(took) < 3 || (time.Since(began) < share && len(took) < 200); {
			start := time.Now()
			if _, err := s.Run(ctx, inputs); err != nil {
				return nil, err
			}
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		out = append(out, registry.BatchLatency{
			Rows: rows, P50: took[len(took)/2].Microseconds(), P95: took[len(took)*95/100].Microseconds(), Sample: len(took),
		})
	}
	return out, nil
}

func batchSizes(s registry.Signature, maxBatch int) []int {
	if !s.Batched {
		return []int{1}
	}
	var sizes []int
	for n := 1; n < maxBatch; n *= 2 {
		sizes = append(sizes, n)
	}
	return append(sizes, maxBatch)
}
