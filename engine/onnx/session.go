//go:build cgo

package onnx

import (
	"context"
	"unsafe"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// maxFrames is how many frames a session keeps for further runs; more are made when more runs are under way.
const maxFrames = 16

type session struct {
	handle    handle
	signature registry.Signature
	provider  string
	frames    chan *frame
	names     *names
}

func newSession(h handle, s registry.Signature, provider string) *session {
	return &session{handle: h, signature: s, provider: provider, frames: make(chan *frame, maxFrames), names: newNames(s)}
}

// Signature implements engine.Session.
func (s *session) Signature() registry.Signature { return s.signature }

// Provider implements engine.Session.
func (s *session) Provider() string { return s.provider }

// Close implements engine.Session.
func (s *session) Close() error {
	close(s.frames)
	for f := range s.frames {
		f.free()
	}
	s.handle.free()
	s.names.free()
	return nil
}

func (s *session) frame() (*frame, error) {
	select {
	case f := <-s.frames:
		return f, nil
	default:
		return newFrame(s.names)
	}
}

func (s *session) giveBack(f *frame) {
	f.clear()
	select {
	case s.frames <- f:
	default:
		f.free()
	}
}

// Run implements engine.Session. A context that ends makes ONNX Runtime stop at the next operator.
func (s *session) Run(ctx context.Context, inputs []engine.Tensor) ([]engine.Tensor, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := s.frame()
	if err != nil {
		return nil, err
	}
	defer s.giveBack(f)
	for i, in := range inputs {
		if err := f.setInput(i, in); err != nil {
			return nil, registry.Errorf(registry.Invalid, "input %q: %w", in.Name, err)
		}
	}
	results := make([]engine.Tensor, len(s.signature.Outputs))
	if err := s.allocate(f, results, inputs); err != nil {
		return nil, err
	}
	if err := f.run(ctx, s.handle); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, registry.Errorf(registry.Internal, "run the model: %w", err)
	}
	return results, s.collect(f, results)
}

// maxOutput bounds one output, in bytes: a model that declares more must not take the process with it.
const maxOutput = 1 << 30

// allocate makes the outputs whose shape follows from the number of rows, so that ONNX Runtime writes into our memory
// and a shape the model did not declare is an error. The others are left to ONNX Runtime.
func (s *session) allocate(f *frame, results, inputs []engine.Tensor) error {
	for i, out := range s.signature.Outputs {
		results[i] = engine.Tensor{Name: out.Name, Datatype: out.Datatype}
		size, _ := out.Datatype.Size()
		shape, n := make([]int64, len(out.Shape)), int64(size)
		for d, v := range out.Shape {
			if d == 0 && s.signature.Batched {
				v = inputs[0].Shape[0]
			}
			shape[d] = v
			if v < 0 {
				n = 0
				break
			}
			if v > 0 && n > maxOutput/v {
				return registry.Errorf(registry.Invalid, "output %q of shape %v takes more than %d bytes", out.Name, out.Shape, maxOutput)
			}
			n *= v
		}
		if n <= 0 { // strings, free dimensions, no elements
			f.letAllocate(i)
			continue
		}
		results[i].Shape, results[i].Data = shape, make([]byte, n)
		f.setOutput(i, results[i])
	}
	return nil
}

// collect copies the outputs that ONNX Runtime allocated, and checks what it made against the signature.
func (s *session) collect(f *frame, results []engine.Tensor) error {
	for i, want := range s.signature.Outputs {
		t := &results[i]
		if t.Data != nil {
			continue
		}
		if err := f.output(i, t); err != nil {
			return registry.Errorf(registry.Internal, "output %q: %w", want.Name, err)
		}
		if t.Datatype != want.Datatype || !registry.ShapeFits(t.Shape, want.Shape) {
			return registry.Errorf(registry.Internal, "the model declares output %q as %s %v and answered %s %v", want.Name, want.Datatype, want.Shape, t.Datatype, t.Shape)
		}
	}
	return nil
}

// dataOf returns where the bytes of t lie, nil when there are none.
func dataOf(t engine.Tensor) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(t.Data)) } //nolint:gosec // pinned by the caller
