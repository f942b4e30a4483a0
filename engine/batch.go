package engine

import (
	"encoding/binary"
	"fmt"

	"github.com/orrery-ml/orrery/registry"
)

// merge joins the inputs of several requests along dimension 0.
func merge(batch []*pending, rows int64) []Tensor {
	if len(batch) == 1 {
		return batch[0].inputs
	}
	merged := make([]Tensor, len(batch[0].inputs))
	for i, first := range batch[0].inputs {
		size := 0
		for _, p := range batch {
			size += len(p.inputs[i].Data)
		}
		data := make([]byte, 0, size)
		for _, p := range batch {
			data = append(data, p.inputs[i].Data...)
		}
		shape := append([]int64{rows}, first.Shape[1:]...)
		merged[i] = Tensor{Name: first.Name, Datatype: first.Datatype, Shape: shape, Data: data}
	}
	return merged
}

// split hands every request its own rows of the outputs. It fails when an output does not have one row per input row.
func split(batch []*pending, rows int64, outputs []Tensor) ([][]Tensor, error) {
	parts := make([][]Tensor, len(batch))
	for _, out := range outputs {
		if len(out.Shape) == 0 || out.Shape[0] != rows {
			return nil, registry.Errorf(registry.Internal, "the model answered %d rows with output %q of shape %v", rows, out.Name, out.Shape)
		}
		rest := out.Data
		for i, p := range batch {
			size, err := rowBytes(out, rest, rows, p.rows)
			if err != nil {
				return nil, err
			}
			shape := append([]int64{p.rows}, out.Shape[1:]...)
			parts[i] = append(parts[i], Tensor{Name: out.Name, Datatype: out.Datatype, Shape: shape, Data: rest[:size:size]})
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
