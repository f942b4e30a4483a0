package gateway

import (
	"encoding/binary"
	"math"

	"github.com/cespare/xxhash/v2"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/monitor"
)

// numbers reads at most limit numbers of any datatype but BYTES; limit < 0 reads all.
func numbers(datatype string, raw []byte, limit int) []float64 {
	size, read := reader(datatype)
	if size == 0 {
		return nil
	}
	n := len(raw) / size
	if limit >= 0 {
		n = min(n, limit)
	}
	out := make([]float64, n)
	for i := range out {
		out[i] = read(raw[i*size:])
	}
	return out
}

// reader returns the size of a datatype's elements and how to read the first one, 0 for what is no number.
func reader(datatype string) (size int, read func([]byte) float64) {
	le := binary.LittleEndian
	switch datatype {
	case "FP64":
		return 8, func(b []byte) float64 { return math.Float64frombits(le.Uint64(b)) }
	case "FP32":
		return 4, func(b []byte) float64 { return float64(math.Float32frombits(le.Uint32(b))) }
	case "BF16":
		return 2, func(b []byte) float64 { return float64(math.Float32frombits(uint32(le.Uint16(b)) << 16)) }
	case "FP16":
		return 2, func(b []byte) float64 { return half(le.Uint16(b)) }
	case "INT64":
		return 8, func(b []byte) float64 { return float64(int64(le.Uint64(b))) } //nolint:gosec // the bits are kept
	case "UINT64":
		return 8, func(b []byte) float64 { return float64(le.Uint64(b)) }
	case "INT32":
		return 4, func(b []byte) float64 { return float64(int32(le.Uint32(b))) } //nolint:gosec // the bits are kept
	case "UINT32":
		return 4, func(b []byte) float64 { return float64(le.Uint32(b)) }
	case "INT16":
		return 2, func(b []byte) float64 { return float64(int16(le.Uint16(b))) } //nolint:gosec // the bits are kept
	case "UINT16":
		return 2, func(b []byte) float64 { return float64(le.Uint16(b)) }
	case "INT8":
		return 1, func(b []byte) float64 { return float64(int8(b[0])) } //nolint:gosec // the bits are kept
	case "UINT8", "BOOL":
		return 1, func(b []byte) float64 { return float64(b[0]) }
	}
	return 0, nil
}

// half reads an IEEE 754 half-precision number.
func half(bits uint16) float64 {
	sign, exponent, fraction := 1.0, int(bits>>10&0x1f), float64(bits&0x3ff)
	if bits&0x8000 != 0 {
		sign = -1
	}
	switch exponent {
	case 0:
		return sign * math.Ldexp(fraction, -24)
	case 31:
		if fraction != 0 {
			return math.NaN()
		}
		return math.Inf(int(sign))
	}
	return sign * math.Ldexp(1+fraction/1024, exponent-15)
}

// comparedColumns of an answer's first row are counted for the judge, outputs in order.
const comparedColumns = 8

// outputKeys returns the keys under which the first row of an answer is counted. A request of many rows is still one
// caller's, so the other rows are left out.
func outputKeys(a *inference.ModelInferResponse) []int {
	var keys []int
	column := 0
	for i, o := range a.GetOutputs() {
		if i >= len(a.GetRawOutputContents()) || column >= comparedColumns {
			break
		}
		width := rowWidth(o.GetShape(), comparedColumns-column)
		raw := a.GetRawOutputContents()[i]
		if o.GetDatatype() == "BYTES" {
			for k, text := range firstTexts(raw, width) {
				if key, ok := monitor.OutputText(column+k, xxhash.Sum64(text)); ok {
					keys = append(keys, key)
				}
			}
		}
		for k, v := range numbers(o.GetDatatype(), raw, width) {
			if key, ok := monitor.OutputKey(column+k, v); ok {
				keys = append(keys, key)
			}
		}
		column += width
	}
	return keys
}

// rowWidth returns the number of elements in a row, at most limit.
func rowWidth(shape []int64, limit int) int {
	width := int64(1)
	for i, d := range shape {
		if i > 0 && d >= 0 {
			width = min(width*d, int64(limit))
		}
	}
	return int(width)
}

// firstTexts reads the first elements of a BYTES tensor.
func firstTexts(raw []byte, n int) [][]byte {
	var out [][]byte
	for len(out) < n && len(raw) >= 4 {
		size := int(binary.LittleEndian.Uint32(raw))
		if size > len(raw)-4 {
			break
		}
		out = append(out, raw[4:4+size])
		raw = raw[4+size:]
	}
	return out
}

// maxCompared elements of two answers are compared.
const maxCompared = 4096

// answerGap returns how far apart two answers to one request are: the largest gap of any element. Labels (text, whole
// numbers, booleans) that differ, and answers of different form, are 1 apart.
func answerGap(a, b *inference.ModelInferResponse) float64 {
	if len(a.GetOutputs()) != len(b.GetOutputs()) || len(a.GetRawOutputContents()) != len(b.GetRawOutputContents()) {
		return 1
	}
	gap := 0.0
	for i, o := range a.GetOutputs() {
		if i >= len(a.GetRawOutputContents()) {
			break
		}
		ra, rb := a.GetRawOutputContents()[i], b.GetRawOutputContents()[i]
		if string(ra) == string(rb) {
			continue
		}
		switch datatype := o.GetDatatype(); {
		case datatype != b.GetOutputs()[i].GetDatatype() || len(ra) != len(rb):
			return 1
		case datatype == "FP32", datatype == "FP64", datatype == "FP16", datatype == "BF16":
			other := numbers(datatype, rb, maxCompared)
			for k, v := range numbers(datatype, ra, maxCompared) {
				gap = math.Max(gap, monitor.Gap(v, other[k]))
			}
		default:
			return 1
		}
	}
	return gap
}
