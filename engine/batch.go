package engine

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"

	"github.com/orrery-ml/orrery/registry"
)

// buffer is memory that batches are joined in.
type buffer struct {
	bytes   []byte
	shapes  []int64
	tensors []Tensor
}

var buffers = sync.Pool{New: func() any { return &buffer{} }}

// maxKept bounds the memory that waits to be used again, in bytes.
const maxKept = 16 << 20

func (b *buffer) giveBack() {
	if cap(b.bytes) <= maxKept {
		clear(b.tensors)
		buffers.Put(b)
	}
}

// merge joins the inputs of a batch along dimension 0 and adds rows of zeros (empty strings) until there are padded.
func (b *buffer) merge(from *batch, padded int64) []Tensor {
	first := from.requests[0].call.inputs
	if len(from.requests) == 1 && (padded == from.rows || from.requests[0].alone) {
		return first
	}
	b.bytes, b.shapes, b.tensors = b.bytes[:0], b.shapes[:0], b.tensors[:0]
	total := 0
	for i := range first {
		total += int(padded-from.rows) * rowSize(first[i])
		for _, r := range from.requests {
			total += len(r.call.inputs[i].Data)
		}
	}
	b.bytes = slices.Grow(b.bytes, total)
	for i := range first {
		at, dims := len(b.bytes), len(b.shapes)
		for _, r := range from.requests {
			b.bytes = append(b.bytes, r.call.inputs[i].Data...)
		}
		zeros := int(padded-from.rows) * rowSize(first[i])
		b.bytes = b.bytes[:len(b.bytes)+zeros]
		clear(b.bytes[len(b.bytes)-zeros:])
		b.shapes = append(append(b.shapes, padded), first[i].Shape[1:]...)
		b.tensors = append(b.tensors, Tensor{Name: first[i].Name, Datatype: first[i].Datatype, Shape: b.shapes[dims:len(b.shapes):len(b.shapes)], Data: b.bytes[at:len(b.bytes):len(b.bytes)]})
	}
	return b.tensors
}

// rowSize is the bytes of a row of zeros, or of empty strings.
func rowSize(t Tensor) int {
	n, _ := t.Datatype.Size()
	if t.Datatype == registry.Bytes {
		n = 4
	}
	for _, d := range t.Shape[1:] {
		n *= int(d)
	}
	return n
}

// split hands every request its own rows of the outputs. It fails when an output does not have one row per input row.
func split(from *batch, rows int64, outputs []Tensor) ([][]Tensor, error) {
	if len(from.requests) == 1 && (rows == from.rows || from.requests[0].alone) {
		return [][]Tensor{outputs}, nil
	}
	parts := make([][]Tensor, len(from.requests))
	all := make([]Tensor, len(from.requests)*len(outputs))
	for i := range parts {
		parts[i] = all[i*len(outputs) : (i+1)*len(outputs) : (i+1)*len(outputs)]
	}
	for o, out := range outputs {
		if len(out.Shape) == 0 || out.Shape[0] != rows {
			return nil, registry.Errorf(registry.Internal, "the model answered %d rows with output %q of shape %v", rows, out.Name, out.Shape)
		}
		rest := out.Data
		for i, r := range from.requests {
			size, err := rowBytes(out, rest, rows, r.rows)
			if err != nil {
				return nil, err
			}
			shape := slices.Clone(out.Shape)
			shape[0] = r.rows
			parts[i][o] = Tensor{Name: out.Name, Datatype: out.Datatype, Shape: shape, Data: rest[:size:size]}
			rest = rest[size:]
		}
	}
	return parts, nil
}

// rowBytes returns how many bytes of rest hold the next n rows of t.
func rowBytes(t Tensor, rest []byte, total, n int64) (int, error) {
	if t.Datatype != registry.Bytes {
		return int(int64(len(t.Data)) / total * n), nil
	}
	elements := n
	for _, d := range t.Shape[1:] {
		elements *= d
	}
	at := 0
	for range elements {
		if len(rest) < at+4 {
			return 0, fmt.Errorf("output %q ends in the middle of an element", t.Name)
		}
		at += 4 + int(binary.LittleEndian.Uint32(rest[at:]))
	}
	return at, nil
}
