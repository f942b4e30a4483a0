//go:build cgo

package worker

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkService is one request through the worker's service without the network: decode, queue, run, encode.
func BenchmarkService(b *testing.B) {
	bench := newBench(b)
	bench.cache.hold("s", []held{bench.version("m", 1, 0, nil)})
	_, err := bench.ask(b.Context(), "m", 1)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := bench.ask(b.Context(), "m", 1); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkService_Shed is a request that is refused because it cannot be in time.
func BenchmarkService_Shed(b *testing.B) {
	bench := newBench(b)
	bench.cache.hold("s", []held{bench.version("m", 1, 0, nil)})
	_, err := bench.ask(b.Context(), "m", 1)
	require.NoError(b, err)
	ctx, cancel := context.WithDeadline(b.Context(), time.Now())
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := bench.ask(ctx, "m", 1); err == nil {
			b.Fatal("it was answered")
		}
	}
}

// BenchmarkService_NoMetrics is BenchmarkService without Prometheus, for the difference.
func BenchmarkService_NoMetrics(b *testing.B) {
	bench := newBench(b)
	bench.cache.metrics = nil
	bench.cache.hold("s", []held{bench.version("m", 1, 0, nil)})
	_, err := bench.ask(b.Context(), "m", 1)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := bench.ask(b.Context(), "m", 1); err != nil {
			b.Fatal(err)
		}
	}
}
