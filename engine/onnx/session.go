//go:build cgo

package onnx

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

type session struct {
	inner     *ort.DynamicAdvancedSession
	signature registry.Signature
	provider  string
}

// Signature implements engine.Session.
func (s *session) Signature() registry.Signature { return s.signature }

// Provider implements engine.Session.
func (s *session) Provider() string { return s.provider }

// Close implements engine.Session.
func (s *session) Close() error { return s.inner.Destroy() }

// Run implements engine.Session. A context that ends makes ONNX Runtime stop at the next operator.
func (s *session) Run(ctx context.Context, inputs []engine.Tensor) ([]engine.Tensor, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ins := make([]ort.Value, 0, len(inputs))
	outs := make([]ort.Value, len(s.signature.Outputs))
	defer func() {
		destroy(ins)
		destroy(outs)
	}()
	for _, in := range inputs {
		v, err := newInput(in)
		if err != nil {
			return nil, registry.Errorf(registry.Invalid, "input %q: %w", in.Name, err)
		}
		ins = append(ins, v)
	}
	buffers, err := s.allocate(outs, inputs)
	if err != nil {
		return nil, err
	}
	if err := s.run(ctx, ins, outs); err != nil {
		return nil, err
	}
	return s.outputs(outs, buffers)
}

func (s *session) run(ctx context.Context, ins, outs []ort.Value) error {
	options, err := ort.NewRunOptions()
	if err != nil {
		return fmt.Errorf("run options: %w", err)
	}
	finished := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(finished)
		_ = options.Terminate() // the run then fails by itself
	})
	err = s.inner.RunWithOptions(ins, outs, options)
	if !stop() {
		<-finished // Terminate must be over before the options are freed
	}
	if free := options.Destroy(); err == nil {
		err = free
	}
	if ctx.Err() != nil && err != nil {
		return ctx.Err()
	}
	if err != nil {
		return registry.Errorf(registry.Internal, "run the model: %w", err)
	}
	return nil
}

// newInput wraps the bytes of a tensor without copying them; strings are copied.
func newInput(t engine.Tensor) (ort.Value, error) {
	shape := ort.Shape(t.Shape)
	if t.Datatype != registry.Bytes {
		return ort.NewCustomDataTensor(shape, t.Data, elementTypes[t.Datatype])
	}
	elements := splitStrings(t.Data)
	if slices.ContainsFunc(elements, func(e string) bool { return strings.IndexByte(e, 0) >= 0 }) {
		return nil, errors.New("a string with a zero byte in it would be cut short by ONNX Runtime's C interface")
	}
	v, err := ort.NewStringTensor(shape)
	if err != nil {
		return nil, err
	}
	if err := v.SetContents(elements); err != nil {
		_ = v.Destroy() // only frees memory
		return nil, err
	}
	return v, nil
}

func splitStrings(raw []byte) []string {
	var out []string
	for len(raw) >= 4 {
		n := binary.LittleEndian.Uint32(raw)
		out = append(out, string(raw[4:4+n]))
		raw = raw[4+n:]
	}
	return out
}

// maxOutput bounds one output, in bytes: a model that declares more must not take the process with it.
const maxOutput = 1 << 30

// allocate makes the outputs whose shape follows from the number of rows, so that ONNX Runtime writes into our memory
// and a shape the model did not declare is an error. The others stay nil: ONNX Runtime allocates them.
func (s *session) allocate(outs []ort.Value, inputs []engine.Tensor) ([][]byte, error) {
	buffers := make([][]byte, len(outs))
	for i, out := range s.signature.Outputs {
		size, _ := out.Datatype.Size()
		shape, n := make(ort.Shape, len(out.Shape)), int64(size)
		for d, v := range out.Shape {
			if d == 0 && s.signature.Batched {
				v = inputs[0].Shape[0]
			}
			shape[d] = v
			if v < 0 {
				n = -1
				break
			}
			if v > 0 && n > maxOutput/v {
				return nil, registry.Errorf(registry.Invalid, "output %q of shape %v takes more than %d bytes", out.Name, out.Shape, maxOutput)
			}
			n *= v
		}
		if n <= 0 || len(shape) == 0 {
			continue
		}
		buffers[i] = make([]byte, n)
		v, err := ort.NewCustomDataTensor(shape, buffers[i], elementTypes[out.Datatype])
		if err != nil {
			return nil, fmt.Errorf("output %q: %w", out.Name, err)
		}
		outs[i] = v
	}
	return buffers, nil
}

func (s *session) outputs(outs []ort.Value, buffers [][]byte) ([]engine.Tensor, error) {
	results := make([]engine.Tensor, len(outs))
	for i, want := range s.signature.Outputs {
		t := engine.Tensor{Name: want.Name, Datatype: want.Datatype, Shape: []int64(outs[i].(interface{ GetShape() ort.Shape }).GetShape()), Data: buffers[i]}
		if t.Data == nil {
			var err error
			if t.Data, err = contents(outs[i]); err != nil {
				return nil, registry.Errorf(registry.Unsupported, "output %q: %w", want.Name, err)
			}
		}
		if !registry.ShapeFits(t.Shape, want.Shape) {
			return nil, registry.Errorf(registry.Internal, "the model declares output %q as %v and answered %v", want.Name, want.Shape, t.Shape)
		}
		results[i] = t
	}
	return results, nil
}

// contents copies the elements of a value that ONNX Runtime allocated.
func contents(v ort.Value) ([]byte, error) {
	switch v := v.(type) {
	case *ort.Tensor[float32]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[float64]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[int64]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[int32]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[int16]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[int8]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[uint64]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[uint32]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[uint16]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[uint8]:
		return bytesOf(v.GetData()), nil
	case *ort.Tensor[bool]:
		return bytesOf(v.GetData()), nil
	case *ort.StringTensor:
		return stringBytes(v)
	}
	return nil, fmt.Errorf("a %T with a shape that is not declared cannot be read", v)
}

// bytesOf views the memory of a Go slice that the binding copied the elements to; the slice keeps it alive.
func bytesOf[T any](data []T) []byte {
	if len(data) == 0 {
		return []byte{}
	}
	var zero T
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(data))), len(data)*int(unsafe.Sizeof(zero))) //nolint:gosec // same memory, as bytes
}

func stringBytes(t *ort.StringTensor) ([]byte, error) {
	elements, err := t.GetContents()
	if err != nil {
		return nil, err
	}
	raw := []byte{}
	for _, e := range elements {
		raw = binary.LittleEndian.AppendUint32(raw, uint32(len(e))) //nolint:gosec // far below 4 GiB
		raw = append(raw, e...)
	}
	return raw, nil
}

func destroy(values []ort.Value) {
	for _, v := range values {
		if v != nil {
			_ = v.Destroy() // only frees memory
		}
	}
}
