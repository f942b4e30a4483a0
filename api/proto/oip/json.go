package oip

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"unsafe"
)

// rawFromJSON turns the `data` of a JSON tensor, nested or flat, into raw bytes. Integers never pass through float64.
func rawFromJSON(datatype string, data []byte) ([]byte, error) {
	switch datatype {
	case "FP16", "BF16":
		return nil, fmt.Errorf("%s has no JSON form; use the binary extension", datatype)
	}
	size, known := sizes[datatype]
	if !known {
		return nil, fmt.Errorf("unknown datatype %q", datatype)
	}
	out := make([]byte, 0, len(data))
	var err error
	for i := 0; i < len(data); {
		switch c := data[i]; c {
		case '[', ']', ',', ' ', '\n', '\r', '\t':
			i++
		default:
			end := i + tokenLength(data[i:])
			if out, err = appendElement(out, datatype, size, data[i:end]); err != nil {
				return nil, err
			}
			i = end
		}
	}
	return out, nil
}

// tokenLength returns the length of the JSON scalar at the head of s, which the JSON decoder has found well-formed.
func tokenLength(s []byte) int {
	if s[0] == '"' {
		for i := 1; i < len(s); i++ {
			switch s[i] {
			case '\\':
				i++
			case '"':
				return i + 1
			}
		}
		return len(s)
	}
	for i, c := range s {
		if c == ',' || c == ']' || c == ' ' || c == '\n' || c == '\r' || c == '\t' {
			return max(i, 1)
		}
	}
	return len(s)
}

func appendElement(out []byte, datatype string, size int, token []byte) ([]byte, error) {
	switch datatype {
	case "BYTES":
		var s string
		if err := json.Unmarshal(token, &s); err != nil {
			return nil, fmt.Errorf("%s is no string, as BYTES needs", token)
		}
		return AppendBytes(out, []byte(s)), nil
	case "BOOL":
		var v bool
		if err := json.Unmarshal(token, &v); err != nil {
			return nil, fmt.Errorf("%s is no boolean", token)
		}
		return append(out, boolByte(v)), nil
	case "FP32", "FP64":
		return appendFloat(out, size, view(token))
	case "UINT8", "UINT16", "UINT32", "UINT64":
		v, err := strconv.ParseUint(view(token), 10, size*8)
		if err != nil {
			return nil, fmt.Errorf("%s is no %s", token, datatype)
		}
		return appendUint(out, v, size), nil
	}
	v, err := strconv.ParseInt(view(token), 10, size*8)
	if err != nil {
		return nil, fmt.Errorf("%s is no %s", token, datatype)
	}
	return appendUint(out, uint64(v), size), nil //nolint:gosec // the low bits are kept
}

// view is the bytes as a string, without a copy: it is read while they stay as they are.
func view(token []byte) string { return unsafe.String(unsafe.SliceData(token), len(token)) } //nolint:gosec // see above

func appendFloat(out []byte, size int, token string) ([]byte, error) {
	v, err := strconv.ParseFloat(token, size*8)
	if err != nil || math.IsInf(v, 0) || math.IsNaN(v) {
		return nil, fmt.Errorf("%s is no FP%d", token, size*8)
	}
	if size == 4 {
		return binary.LittleEndian.AppendUint32(out, math.Float32bits(float32(v))), nil
	}
	return binary.LittleEndian.AppendUint64(out, math.Float64bits(v)), nil
}

// errNotJSON says that a value has no JSON form, so that the caller must ask for binary data.
var errNotJSON = errors.New("NaN and Inf have no JSON form; ask for binary data")

// appendJSON appends raw elements as a flat JSON array.
func appendJSON(out []byte, datatype string, raw []byte) ([]byte, error) {
	if datatype == "FP16" || datatype == "BF16" {
		return nil, fmt.Errorf("%s has no JSON form; ask for binary data", datatype)
	}
	out = append(out, '[')
	if datatype == "BYTES" {
		for i, e := range SplitBytes(raw) {
			if i > 0 {
				out = append(out, ',')
			}
			quoted, err := json.Marshal(string(e))
			if err != nil {
				return nil, err
			}
			out = append(out, quoted...)
		}
		return append(out, ']'), nil
	}
	size := sizes[datatype]
	for i := 0; i+size <= len(raw); i += size {
		if i > 0 {
			out = append(out, ',')
		}
		var err error
		if out, err = appendNumber(out, datatype, raw[i:i+size]); err != nil {
			return nil, err
		}
	}
	return append(out, ']'), nil
}

func appendNumber(out []byte, datatype string, raw []byte) ([]byte, error) {
	switch datatype {
	case "BOOL":
		return strconv.AppendBool(out, raw[0] != 0), nil
	case "UINT8", "UINT16", "UINT32", "UINT64":
		return strconv.AppendUint(out, readUint(raw), 10), nil
	case "FP32":
		v := float64(math.Float32frombits(binary.LittleEndian.Uint32(raw)))
		if math.IsInf(v, 0) || math.IsNaN(v) {
			return nil, errNotJSON
		}
		return strconv.AppendFloat(out, v, 'g', -1, 32), nil
	case "FP64":
		v := math.Float64frombits(binary.LittleEndian.Uint64(raw))
		if math.IsInf(v, 0) || math.IsNaN(v) {
			return nil, errNotJSON
		}
		return strconv.AppendFloat(out, v, 'g', -1, 64), nil
	}
	shift := 64 - 8*len(raw)
	return strconv.AppendInt(out, int64(readUint(raw)<<shift)>>shift, 10), nil //nolint:gosec // sign extension
}

func readUint(raw []byte) uint64 {
	var b [8]byte
	copy(b[:], raw)
	return binary.LittleEndian.Uint64(b[:])
}
