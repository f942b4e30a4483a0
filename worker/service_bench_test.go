//go:build cgo

package worker

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkService is one request through the worker's service without the network: decode, queue, run, encode.
func BenchmarkService(b *testing.B) {
	bench := newBench(b, 0)
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
