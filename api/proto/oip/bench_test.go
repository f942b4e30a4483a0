package oip

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkDecodeJSON reads a request of many numbers.
func BenchmarkDecodeJSON(b *testing.B) {
	for _, n := range []int{10, 110_592} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			numbers := strings.Repeat("-0.12345678,1.5,", n/2)
			body := []byte(fmt.Sprintf(`{"inputs":[{"name":"x","datatype":"FP32","shape":[1,%d],"data":[%s]}]}`, n, strings.TrimSuffix(numbers, ",")))
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				_, err := decodeRequest(body, "")
				require.NoError(b, err)
			}
		})
	}
}

// BenchmarkEncodeJSON writes many numbers.
func BenchmarkEncodeJSON(b *testing.B) {
	raw, err := rawFromJSON("FP32", []byte("["+strings.TrimSuffix(strings.Repeat("-0.12345678,", 1000), ",")+"]"))
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		_, err := appendJSON(nil, "FP32", raw)
		require.NoError(b, err)
	}
}
