package monitor

import (
	"math"
	"time"
)

// LatencyBuckets per doubling of the duration: neighbouring bounds differ by 2^(1/8), about 9 %.
const latencyPerOctave = 8

// LatencyBucket returns the bucket of a duration: bucket b holds durations in (2^((b-1)/8), 2^(b/8)] microseconds.
// Durations of up to a microsecond are in bucket 0.
func LatencyBucket(d time.Duration) int {
	us := float64(d) / float64(time.Microsecond)
	if us <= 1 {
		return 0
	}
	return int(math.Ceil(latencyPerOctave*math.Log2(us) - 1e-9))
}

// LatencyBound returns the upper bound of a bucket.
func LatencyBound(bucket int) time.Duration {
	return time.Duration(math.Exp2(float64(bucket)/latencyPerOctave) * float64(time.Microsecond))
}

// LatencyQuantile returns the bound of the bucket that holds the q-quantile (0 < q <= 1) of counts by bucket, 0 when
// there are none. It is at most 9 % over the true quantile.
func LatencyQuantile(counts map[int]int64, q float64) time.Duration {
	lowest, highest, total := bounds(counts)
	if total == 0 {
		return 0
	}
	need := int64(math.Ceil(q * float64(total)))
	var seen int64
	for b := lowest; b < highest; b++ {
		if seen += counts[b]; seen >= need {
			return LatencyBound(b)
		}
	}
	return LatencyBound(highest)
}

func bounds(counts map[int]int64) (lowest, highest int, total int64) {
	lowest, highest = math.MaxInt, math.MinInt
	for b, n := range counts {
		lowest, highest, total = min(lowest, b), max(highest, b), total+n
	}
	return lowest, highest, total
}
