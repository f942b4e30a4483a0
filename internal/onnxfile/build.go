package onnxfile

import (
	"encoding/binary"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// ElemType is an ONNX tensor element type.
type ElemType int32

// The element types.
const (
	Float   ElemType = 1
	Uint8   ElemType = 2
	Int8    ElemType = 3
	Uint16  ElemType = 4
	Int16   ElemType = 5
	Int32   ElemType = 6
	Int64   ElemType = 7
	String  ElemType = 8
	Bool    ElemType = 9
	Float16 ElemType = 10
	Double  ElemType = 11
	Uint32  ElemType = 12
	Uint64  ElemType = 13
	BFloat  ElemType = 16
)

// Value is a graph input or output; a dimension of -1 is free.
type Value struct {
	Name  string
	Type  ElemType
	Shape []int64
}

// Tensor is an initializer. External, when set, is the file its data lies in.
type Tensor struct {
	Name     string
	Type     ElemType
	Dims     []int64
	Raw      []byte
	External string
}

// Floats makes a FLOAT initializer.
func Floats(name string, dims []int64, values []float64) Tensor {
	raw := make([]byte, 0, 4*len(values))
	for _, v := range values {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(float32(v)))
	}
	return Tensor{Name: name, Type: Float, Dims: dims, Raw: raw}
}

// Int64s makes an INT64 initializer.
func Int64s(name string, dims, values []int64) Tensor {
	raw := make([]byte, 0, 8*len(values))
	for _, v := range values {
		raw = binary.LittleEndian.AppendUint64(raw, uint64(v)) //nolint:gosec // the bits are kept
	}
	return Tensor{Name: name, Type: Int64, Dims: dims, Raw: raw}
}

// Node is an operator of the graph. Attributes are int64, float64, string, or slices of them.
type Node struct {
	Op         string
	Domain     string
	Inputs     []string
	Outputs    []string
	Attributes map[string]any
}

// Function is a function of the model's own, called by a node of its domain and name.
type Function struct {
	Domain  string
	Name    string
	Inputs  []string
	Outputs []string
	Nodes   []Node
}

// Model is a model to write.
type Model struct {
	Name         string
	Opset        int64
	Inputs       []Value
	Outputs      []Value
	Initializers []Tensor
	Nodes        []Node
	Functions    []Function
	Imports      map[string]int64 // opsets of domains beside the standard one
	Metadata     map[string]string
}

// Build returns the bytes of the model file.
func Build(m Model) []byte {
	var b []byte
	b = number(b, 1, 8) // IR version 8 goes with opsets up to 17
	b = text(b, 2, "orrery")
	b = message(b, 7, graph(m))
	b = message(b, 8, number(nil, 2, uint64(m.Opset))) //nolint:gosec // opsets are small and positive
	for _, domain := range sortedKeys(m.Imports) {
		b = message(b, 8, number(text(nil, 1, domain), 2, uint64(m.Imports[domain]))) //nolint:gosec // opsets are small and positive
	}
	for _, f := range m.Functions {
		b = message(b, 8, number(text(nil, 1, f.Domain), 2, 1))
		b = message(b, 25, function(f, m.Opset))
	}
	for _, key := range sortedKeys(m.Metadata) {
		b = message(b, 14, text(text(nil, 1, key), 2, m.Metadata[key]))
	}
	return b
}

func graph(m Model) []byte {
	var g []byte
	for _, n := range m.Nodes {
		g = message(g, 1, node(n))
	}
	g = text(g, 2, m.Name)
	for _, t := range m.Initializers {
		g = message(g, 5, tensor(t))
	}
	for _, v := range m.Inputs {
		g = message(g, 11, value(v))
	}
	for _, v := range m.Outputs {
		g = message(g, 12, value(v))
	}
	return g
}

func function(f Function, opset int64) []byte {
	b := text(nil, 1, f.Name)
	for _, s := range f.Inputs {
		b = text(b, 4, s)
	}
	for _, s := range f.Outputs {
		b = text(b, 5, s)
	}
	for _, n := range f.Nodes {
		b = message(b, 7, node(n))
	}
	b = message(b, 9, number(nil, 2, uint64(opset))) //nolint:gosec // opsets are small and positive
	b = message(b, 9, number(text(nil, 1, f.Domain), 2, 1))
	return text(b, 10, f.Domain)
}

func node(n Node) []byte {
	var b []byte
	for _, s := range n.Inputs {
		b = text(b, 1, s)
	}
	for _, s := range n.Outputs {
		b = text(b, 2, s)
	}
	b = text(b, 4, n.Op)
	for _, key := range sortedKeys(n.Attributes) {
		b = message(b, 5, attribute(key, n.Attributes[key]))
	}
	if n.Domain != "" {
		b = text(b, 7, n.Domain)
	}
	return b
}

func attribute(name string, v any) []byte {
	b := text(nil, 1, name)
	switch v := v.(type) {
	case int64:
		b = number(b, 3, uint64(v)) //nolint:gosec // the bits are kept
		return number(b, 20, 2)
	case float64:
		b = protowire.AppendTag(b, 2, protowire.Fixed32Type)
		b = protowire.AppendFixed32(b, math.Float32bits(float32(v)))
		return number(b, 20, 1)
	case []int64:
		for _, i := range v {
			b = number(b, 8, uint64(i)) //nolint:gosec // the bits are kept
		}
		return number(b, 20, 7)
	case []float64:
		for _, f := range v {
			b = protowire.AppendTag(b, 7, protowire.Fixed32Type)
			b = protowire.AppendFixed32(b, math.Float32bits(float32(f)))
		}
		return number(b, 20, 6)
	case string:
		return number(text(b, 4, v), 20, 3)
	case []string:
		for _, s := range v {
			b = text(b, 9, s)
		}
		return number(b, 20, 8)
	}
	return b
}

func tensor(t Tensor) []byte {
	var b []byte
	for _, d := range t.Dims {
		b = number(b, 1, uint64(d)) //nolint:gosec // dimensions are not negative
	}
	b = number(b, 2, uint64(t.Type)) //nolint:gosec // an enum
	b = text(b, 8, t.Name)
	if t.External == "" {
		return message(b, 9, t.Raw)
	}
	b = message(b, 13, text(text(nil, 1, "location"), 2, t.External))
	return number(b, 14, 1)
}

func value(v Value) []byte {
	var shape []byte
	for _, d := range v.Shape {
		dim := text(nil, 2, "n")
		if d >= 0 {
			dim = number(nil, 1, uint64(d))
		}
		shape = message(shape, 1, dim)
	}
	typ := message(number(nil, 1, uint64(v.Type)), 2, shape) //nolint:gosec // an enum
	return message(text(nil, 1, v.Name), 2, message(nil, 1, typ))
}

func number(b []byte, field protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}

func text(b []byte, field protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), s)
}

func message(b []byte, field protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), m)
}
