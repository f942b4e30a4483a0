package engine

import (
	"context"

	"github.com/orrery-ml/orrery/registry"
)

// Tensor is a tensor as raw little-endian bytes; BYTES elements have a 4-byte length in front, as on the wire.
type Tensor struct {
	Name     string
	Datatype registry.Datatype
	Shape    []int64
	Data     []byte
}

// Session is a loaded model. Run may be called by several goroutines at once.
type Session interface {
	// Signature returns the model's inputs and outputs.
	Signature() registry.Signature
	// Run takes every input in the signature's order and returns every output in its order. It stops when ctx ends.
	Run(ctx context.Context, inputs []Tensor) ([]Tensor, error)
	// Provider names the execution provider in use.
	Provider() string
	// Close frees the model; no Run may be under way.
	Close() error
}

// Options are how a session is opened.
type Options struct {
	Provider        string            // cpu, cuda, tensorrt, or a name ONNX Runtime knows
	ProviderOptions map[string]string // passed through to Provider
	Fallback        string            // used when Provider is not there; "" makes that an error
	Threads         int               // intra-op
	Device          int               // of the provider
}

// Runtime opens sessions.
type Runtime interface {
	// Inspect derives the signature of a model file. It ends in Invalid when the file is no model it can run.
	Inspect(path string) (registry.Signature, error)
	// Open loads the model file, whose signature is known. It ends in Invalid when the file is no model it can run and
	// Unsupported when the provider is not there.
	Open(path string, s registry.Signature, o Options) (Session, error)
	// Providers lists the execution providers that are there, by ONNX Runtime's names.
	Providers() []string
	// Trim gives memory that closed sessions left behind back to the system.
	Trim()
}
