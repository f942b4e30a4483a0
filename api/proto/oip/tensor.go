package oip

import (
	"encoding/binary"
	"fmt"
	"math"

	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// sizes are the bytes of one element by datatype; BYTES elements vary.
var sizes = map[string]int{
	"BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
	"FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8, "BYTES": 0,
}

// Elements returns the product of a shape. It fails for a negative dimension or an overflow; a zero is legal.
func Elements(shape []int64) (int64, error) {
	n := int64(1)
	for _, d := range shape {
		if d < 0 {
			return 0, fmt.Errorf("shape %v has a negative dimension", shape)
		}
		if d > 0 && n > math.MaxInt32/d {
			return 0, fmt.Errorf("shape %v has more than %d elements", shape, math.MaxInt32)
		}
		n *= d
	}
	return n, nil
}

// CheckRaw fails unless raw holds exactly the elements of a tensor of the datatype and shape.
func CheckRaw(name, datatype string, shape []int64, raw []byte) error {
	size, known := sizes[datatype]
	if !known {
		return fmt.Errorf("tensor %q: unknown datatype %q", name, datatype)
	}
	n, err := Elements(shape)
	if err != nil {
		return fmt.Errorf("tensor %q: %w", name, err)
	}
	if size > 0 {
		if want := n * int64(size); int64(len(raw)) != want {
			return fmt.Errorf("tensor %q: %s of shape %v takes %d bytes, got %d", name, datatype, shape, want, len(raw))
		}
		return nil
	}
	if got := countBytes(raw); got != n {
		return fmt.Errorf("tensor %q: BYTES of shape %v holds %d elements, got %d", name, shape, n, got)
	}
	return nil
}

// countBytes walks the length prefixes and returns the number of elements, -1 when they do not add up.
func countBytes(raw []byte) int64 {
	var n int64
	for len(raw) > 0 {
		if len(raw) < 4 {
			return -1
		}
		size := uint64(binary.LittleEndian.Uint32(raw))
		if uint64(len(raw)-4) < size { //nolint:gosec // not negative, see above
			return -1
		}
		raw = raw[4+size:]
		n++
	}
	return n
}

// SplitBytes returns the elements of a BYTES tensor that CheckRaw has passed; they share raw's memory.
func SplitBytes(raw []byte) [][]byte {
	var out [][]byte
	for len(raw) >= 4 {
		size := binary.LittleEndian.Uint32(raw)
		out = append(out, raw[4:4+size])
		raw = raw[4+size:]
	}
	return out
}

// AppendBytes appends one BYTES element.
func AppendBytes(raw, element []byte) []byte {
	raw = binary.LittleEndian.AppendUint32(raw, uint32(len(element))) //nolint:gosec // messages are far below 4 GiB
	return append(raw, element...)
}

// RawInputs returns the raw bytes of each input of the request, in order, converting typed contents. It fails when raw
// and typed contents are mixed, a content is in the wrong field for its datatype, or sizes do not fit shapes.
func RawInputs(r *inference.ModelInferRequest) ([][]byte, error) {
	raws := r.GetRawInputContents()
	if len(raws) > 0 && len(raws) != len(r.GetInputs()) {
		return nil, fmt.Errorf("%d raw_input_contents for %d inputs", len(raws), len(r.GetInputs()))
	}
	out := make([][]byte, len(r.GetInputs()))
	for i, in := range r.GetInputs() {
		if _, shared := in.GetParameters()["shared_memory_region"]; shared {
			return nil, fmt.Errorf("input %q: %s", in.GetName(), status.Convert(ErrSharedMemory).Message())
		}
		switch {
		case len(raws) > 0 && in.GetContents() != nil:
			return nil, fmt.Errorf("input %q has contents although raw_input_contents are given", in.GetName())
		case len(raws) > 0:
			out[i] = raws[i]
		default:
			raw, err := rawOf(in.GetDatatype(), in.GetContents())
			if err != nil {
				return nil, fmt.Errorf("input %q: %w", in.GetName(), err)
			}
			out[i] = raw
		}
		if err := CheckRaw(in.GetName(), in.GetDatatype(), in.GetShape(), out[i]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func rawOf(datatype string, c *inference.InferTensorContents) ([]byte, error) {
	var raw []byte
	switch datatype {
	case "BOOL":
		for _, v := range c.GetBoolContents() {
			raw = append(raw, boolByte(v))
		}
	case "INT8", "INT16", "INT32":
		return packInts(datatype, c.GetIntContents())
	case "INT64":
		for _, v := range c.GetInt64Contents() {
			raw = binary.LittleEndian.AppendUint64(raw, uint64(v)) //nolint:gosec // the bits are kept
		}
	case "UINT8", "UINT16", "UINT32":
		return packUints(datatype, c.GetUintContents())
	case "UINT64":
		for _, v := range c.GetUint64Contents() {
			raw = binary.LittleEndian.AppendUint64(raw, v)
		}
	case "FP32":
		for _, v := range c.GetFp32Contents() {
			raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(v))
		}
	case "FP64":
		for _, v := range c.GetFp64Contents() {
			raw = binary.LittleEndian.AppendUint64(raw, math.Float64bits(v))
		}
	case "BYTES":
		for _, v := range c.GetBytesContents() {
			raw = AppendBytes(raw, v)
		}
	case "FP16", "BF16":
		return nil, fmt.Errorf("%s has no typed contents; use raw_input_contents", datatype)
	default:
		return nil, fmt.Errorf("unknown datatype %q", datatype)
	}
	return raw, nil
}

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

func packInts(datatype string, values []int32) ([]byte, error) {
	var raw []byte
	bits := sizes[datatype] * 8
	for _, v := range values {
		if int64(v) < -(1<<(bits-1)) || int64(v) >= 1<<(bits-1) {
			return nil, fmt.Errorf("%d does not fit %s", v, datatype)
		}
		raw = appendUint(raw, uint64(v), sizes[datatype]) //nolint:gosec // the low bits are kept
	}
	return raw, nil
}

func packUints(datatype string, values []uint32) ([]byte, error) {
	var raw []byte
	bits := sizes[datatype] * 8
	for _, v := range values {
		if uint64(v) >= 1<<bits {
			return nil, fmt.Errorf("%d does not fit %s", v, datatype)
		}
		raw = appendUint(raw, uint64(v), sizes[datatype])
	}
	return raw, nil
}

func appendUint(raw []byte, v uint64, size int) []byte {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	return append(raw, b[:size]...)
}

// Finite says whether no element of a FP32 or FP64 tensor is NaN or infinite; tensors of other types are finite.
func Finite(datatype string, raw []byte) bool {
	switch datatype {
	case "FP32":
		for i := 0; i+4 <= len(raw); i += 4 {
			if binary.LittleEndian.Uint32(raw[i:])&0x7f800000 == 0x7f800000 {
				return false
			}
		}
	case "FP64":
		for i := 0; i+8 <= len(raw); i += 8 {
			if binary.LittleEndian.Uint64(raw[i:])&0x7ff0000000000000 == 0x7ff0000000000000 {
				return false
			}
		}
	}
	return true
}
