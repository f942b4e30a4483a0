package main

import (
	"context"
	"math"
	"math/rand/v2"
	"time"

	"github.com/orrery-ml/orrery/engine"
)

// policy simulates both batchers on the same arrivals, at a scale no machine here has.
func (b *benchmark) policy(context.Context) error {
	const length, deadline = 2 * time.Minute, 50 * time.Millisecond
	b.printf("## The policies in the simulator: the scheduler that serves, in virtual time, deadline %v\n\nA run takes a + b x rows with 10 %% of log-normal noise.\n\n", deadline)
	b.printf("| run | batching | offered | goodput/s | of its peak | p99 ms | rows a batch |\n|---|---|---|---|---|---|---|\n")
	for _, shape := range []struct {
		name       string
		fixed, per time.Duration
		most       int64
		runners    int
	}{
		{"5 ms + 1 ms x rows, 32 at most, 1 runner", 5 * time.Millisecond, time.Millisecond, 32, 1},
		{"4 ms + 0.1 ms x rows, 64 at most, 2 runners", 4 * time.Millisecond, 100 * time.Microsecond, 64, 2},
		{"10 ms x rows, 32 at most, 1 runner", 0, 10 * time.Millisecond, 32, 1},
	} {
		saturated := float64(shape.runners) * float64(shape.most) / (shape.fixed + time.Duration(shape.most)*shape.per).Seconds()
		for _, p := range []struct {
			name   string
			policy engine.Policy
			delay  time.Duration
		}{{"deadline", engine.DeadlinePolicy{}, 0}, {"static, 5 ms", engine.StaticPolicy{}, 5 * time.Millisecond}} {
			peak := 0.0
			for _, load := range []float64{0.5, 0.75, 1, 1.25, 1.5, 2, 3} {
				noise := rand.New(rand.NewPCG(21, 22)) //nolint:gosec // the same on every run
				out := engine.Simulate(engine.Simulation{
					Threads: shape.runners, Trace: poisson(load*saturated, length, deadline),
					Models: []engine.SimulatedModel{{
						Batch: engine.BatchConfig{Policy: p.policy, MaxRows: shape.most, MaxDelay: p.delay, QueueRows: 4096, Runners: shape.runners, Threads: 1},
						Run: func(rows int64) time.Duration {
							return time.Duration(float64(shape.fixed+time.Duration(rows)*shape.per) * math.Exp(0.1*noise.NormFloat64()))
						},
					}},
				})[0]
				good := float64(out.InTime) / length.Seconds()
				peak = math.Max(peak, good)
				b.printf("| %s | %s | %.2fx | %.0f | %.2f | %s | %.1f |\n", shape.name, p.name, load, good, good/peak, ms(out.Quantile(0.99)), float64(out.Rows)/math.Max(float64(out.Batches), 1))
				if load == 2 {
					b.ratio("simulated %s at twice saturation: %s batching %.2f of its peak goodput", shape.name, p.name, good/peak)
				}
			}
		}
	}
	b.printf("\n")
	return nil
}

func poisson(rate float64, length, deadline time.Duration) []engine.Arrival {
	r := rand.New(rand.NewPCG(23, 24)) //nolint:gosec // the same on every run
	var out []engine.Arrival
	for at := 0.0; at < length.Seconds(); at += r.ExpFloat64() / rate {
		out = append(out, engine.Arrival{At: time.Duration(at * 1e9), Rows: 1, Deadline: deadline})
	}
	return out
}
