package engine_test

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/engine"
)

// poisson makes a trace of single rows at a rate per second.
func poisson(seed uint64, rate float64, length, deadline time.Duration) []engine.Arrival {
	r := rand.New(rand.NewPCG(seed, 1))
	var out []engine.Arrival
	for at := 0.0; at < length.Seconds(); at += r.ExpFloat64() / rate {
		out = append(out, engine.Arrival{At: time.Duration(at * 1e9), Rows: 1, Deadline: deadline})
	}
	return out
}

// affineCost is a run of fixed + 1 ms a row, with a log-normal noise of 10 %.
func affineCost(seed uint64, fixed time.Duration) func(int64) time.Duration {
	r := rand.New(rand.NewPCG(seed, 2))
	return func(rows int64) time.Duration {
		return time.Duration(float64(fixed+time.Duration(rows)*time.Millisecond) * math.Exp(0.1*r.NormFloat64()))
	}
}

func goodput(policy engine.Policy, delay time.Duration, load float64) (float64, engine.SimulatedModelResult) {
	const fixed, most = 5 * time.Millisecond, 32 // saturated at 32 rows in 37 ms: 865 rows a second
	const saturated = most / (0.005 + most*0.001)
	const length = 60 * time.Second
	out := engine.Simulate(engine.Simulation{
		Threads: 1, Trace: poisson(7, load*saturated, length, 50*time.Millisecond),
		Models: []engine.SimulatedModel{{
			Batch: engine.BatchConfig{Policy: policy, MaxRows: most, MaxDelay: delay, QueueRows: 4096, Runners: 1, Threads: 1},
			Run:   affineCost(7, fixed),
		}},
	})
	return float64(out[0].InTime) / length.Seconds(), out[0]
}

func TestSimulate_GoodputHoldsBeyondSaturation(t *testing.T) {
	t.Parallel()
	peak, static := 0.0, 0.0
	for _, load := range []float64{0.25, 0.5, 0.75, 0.9, 1, 1.25, 1.5, 2, 3} {
		ours, r := goodput(engine.DeadlinePolicy{}, 0, load)
		theirs, s := goodput(engine.StaticPolicy{}, 5*time.Millisecond, load)
		t.Logf("%.2fx: ours %.0f/s (p50 %v p99 %v, %.1f rows a batch, shed %d, expired %d, late %d); static %.0f/s (p99 %v)", load, ours,
			r.Quantile(0.5), r.Quantile(0.99), float64(r.Rows)/float64(r.Batches), r.Shed, r.Expired, r.Late, theirs, s.Quantile(0.99))
		peak = max(peak, ours)
		if load >= 2 {
			require.GreaterOrEqual(t, ours, 0.9*peak, "at %v times saturation", load)
		}
		static = max(static, theirs)
		require.GreaterOrEqual(t, ours, 0.97*theirs, "never behind the baseline, at %v", load)
		require.LessOrEqual(t, float64(r.Late), 0.02*float64(r.InTime), "who is admitted is in time")
	}
}

// Two models that want a device share it by their weights, whatever their runs cost; one that asks for little gets it.
func TestSimulate_SharesADeviceByWeight(t *testing.T) {
	t.Parallel()
	var trace []engine.Arrival
	for model, rate := range []float64{2000, 2000, 20} {
		for _, a := range poisson(uint64(model), rate, 20*time.Second, time.Second) {
			a.Model = model
			trace = append(trace, a)
		}
	}
	slices.SortStableFunc(trace, func(a, b engine.Arrival) int { return cmp.Compare(a.At, b.At) })
	model := func(weight float64, fixed time.Duration) engine.SimulatedModel {
		return engine.SimulatedModel{
			Batch: engine.BatchConfig{Policy: engine.DeadlinePolicy{}, MaxRows: 8, QueueRows: 4096, Runners: 1, Threads: 1, Weight: weight},
			Run:   affineCost(3, fixed),
		}
	}
	out := engine.Simulate(engine.Simulation{Threads: 1, Trace: trace, Models: []engine.SimulatedModel{
		model(1, 4*time.Millisecond), model(3, 12*time.Millisecond), model(1, 2*time.Millisecond),
	}})
	busy := func(i int, fixed float64) float64 { return float64(out[i].Batches)*fixed + float64(out[i].Rows)*0.001 }
	require.InDelta(t, 3, busy(1, 0.012)/busy(0, 0.004), 0.3, "time on the device by weight")
	require.GreaterOrEqual(t, out[2].InTime, out[2].Requests*97/100, "who asks for less than its share is served")
	require.Less(t, out[2].Quantile(0.99), 100*time.Millisecond)
}

// Under a stream of high priority that fills the device, low priority still gets through.
func TestSimulate_StarvesNobody(t *testing.T) {
	t.Parallel()
	var trace []engine.Arrival
	for priority, rate := range map[int]float64{1: 900, 8: 20} {
		for _, a := range poisson(uint64(priority), rate, 20*time.Second, 5*time.Second) {
			a.Priority = priority
			a.Shape = strconv.Itoa(priority) // never in one batch
			trace = append(trace, a)
		}
	}
	slices.SortStableFunc(trace, func(a, b engine.Arrival) int {
		return cmp.Or(cmp.Compare(a.At, b.At), cmp.Compare(a.Priority, b.Priority))
	})
	in := engine.Simulation{Threads: 1, Trace: trace, Models: []engine.SimulatedModel{{
		Batch: engine.BatchConfig{Policy: engine.DeadlinePolicy{}, MaxRows: 8, QueueRows: 100_000, Runners: 1, Threads: 1},
		Run:   affineCost(5, time.Millisecond),
	}}}
	out := engine.Simulate(in)[0]
	require.GreaterOrEqual(t, out.InTime, out.Requests*80/100)
	require.Equal(t, out, engine.Simulate(engine.Simulation{Threads: 1, Trace: trace, Models: []engine.SimulatedModel{{
		Batch: in.Models[0].Batch, Run: affineCost(5, time.Millisecond),
	}}})[0], "the same simulation gives the same result")
	low := 0
	for _, a := range trace {
		if a.Priority == 8 {
			low++
		}
	}
	t.Logf("%d requests, %d of them low: in time %d, shed %d, expired %d, p99 %v", out.Requests, low, out.InTime, out.Shed, out.Expired, out.Quantile(0.99))
	require.Less(t, out.Shed+out.Expired, out.Requests*20/100)
}
