package registry

import (
	"fmt"
	"slices"
	"strings"
)

// Datatype is a tensor element type by its Open Inference Protocol name.
type Datatype string

// The datatypes of the protocol that Orrery serves.
const (
	Bool   Datatype = "BOOL"
	Uint8  Datatype = "UINT8"
	Uint16 Datatype = "UINT16"
	Uint32 Datatype = "UINT32"
	Uint64 Datatype = "UINT64"
	Int8   Datatype = "INT8"
	Int16  Datatype = "INT16"
	Int32  Datatype = "INT32"
	Int64  Datatype = "INT64"
	FP16   Datatype = "FP16"
	BF16   Datatype = "BF16"
	FP32   Datatype = "FP32"
	FP64   Datatype = "FP64"
	Bytes  Datatype = "BYTES"
)

var datatypeSizes = map[Datatype]int{
	Bool: 1, Uint8: 1, Uint16: 2, Uint32: 4, Uint64: 8, Int8: 1, Int16: 2, Int32: 4, Int64: 8,
	FP16: 2, BF16: 2, FP32: 4, FP64: 8, Bytes: 0,
}

// Size returns the bytes of one element, 0 for BYTES, and false for a datatype that is not known.
func (d Datatype) Size() (int, bool) {
	n, ok := datatypeSizes[d]
	return n, ok
}

// Tensor describes one input or output. A dimension of -1 may be any size.
type Tensor struct {
	Name     string   `json:"name"`
	Datatype Datatype `json:"datatype"`
	Shape    []int64  `json:"shape"`
	Features []string `json:"features,omitempty"` // names along the last axis, when known
}

// Signature is what a version takes and gives.
type Signature struct {
	Inputs  []Tensor `json:"inputs"`
	Outputs []Tensor `json:"outputs"`
	// Batched says that dimension 0 of every input and output is the batch and free.
	Batched bool `json:"batched"`
}

// Input returns the named input.
func (s Signature) Input(name string) (Tensor, bool) { return findTensor(s.Inputs, name) }

// Output returns the named output.
func (s Signature) Output(name string) (Tensor, bool) { return findTensor(s.Outputs, name) }

func findTensor(ts []Tensor, name string) (Tensor, bool) {
	i := slices.IndexFunc(ts, func(t Tensor) bool { return t.Name == name })
	if i < 0 {
		return Tensor{}, false
	}
	return ts[i], true
}

// TensorNames lists the names of ts, for messages.
func TensorNames(ts []Tensor) []string {
	names := make([]string, len(ts))
	for i, t := range ts {
		names[i] = t.Name
	}
	return names
}

// Compatible returns nil when every request that s takes is taken by next too and next answers with every output
// of s, in the same type; otherwise an Invalid error that lists the differences.
func (s Signature) Compatible(next Signature) error {
	var faults []string
	for _, in := range next.Inputs {
		old, ok := s.Input(in.Name)
		if !ok {
			faults = append(faults, fmt.Sprintf("input %q is new", in.Name))
			continue
		}
		faults = append(faults, tensorFaults("input", old, in)...)
	}
	for _, in := range s.Inputs {
		if _, ok := next.Input(in.Name); !ok {
			faults = append(faults, fmt.Sprintf("input %q is gone", in.Name))
		}
	}
	for _, out := range s.Outputs {
		got, ok := next.Output(out.Name)
		if !ok {
			faults = append(faults, fmt.Sprintf("output %q is gone", out.Name))
			continue
		}
		faults = append(faults, tensorFaults("output", out, got)...)
	}
	if len(faults) > 0 {
		return Errorf(Invalid, "signatures differ: %s", strings.Join(faults, "; "))
	}
	return nil
}

func tensorFaults(kind string, old, got Tensor) []string {
	var faults []string
	if old.Datatype != got.Datatype {
		faults = append(faults, fmt.Sprintf("%s %q was %s and is %s", kind, old.Name, old.Datatype, got.Datatype))
	}
	if !ShapeFits(old.Shape, got.Shape) {
		faults = append(faults, fmt.Sprintf("%s %q was %v and is %v", kind, old.Name, old.Shape, got.Shape))
	}
	return faults
}

// ShapeFits says whether a tensor of shape got may be used where want (with -1 for any size) is declared.
func ShapeFits(got, want []int64) bool {
	return slices.EqualFunc(got, want, func(g, w int64) bool { return w < 0 || g == w })
}
