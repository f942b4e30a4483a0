//go:build cgo

package onnx

// #cgo linux LDFLAGS: -ldl
// #include <stdlib.h>
// #include "ort.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// fault makes an error of a message of the C side and frees it.
func fault(message *C.char) error {
	if message == nil {
		return nil
	}
	defer C.free(unsafe.Pointer(message))
	return errors.New(strings.TrimSpace(C.GoString(message)))
}

// elementTypes are the numbers of ONNX's element types.
var elementTypes = map[registry.Datatype]C.int32_t{
	registry.FP32: 1, registry.Uint8: 2, registry.Int8: 3, registry.Uint16: 4, registry.Int16: 5, registry.Int32: 6,
	registry.Int64: 7, registry.Bytes: 8, registry.Bool: 9, registry.FP16: 10, registry.FP64: 11, registry.Uint32: 12,
	registry.Uint64: 13, registry.BF16: 16,
}

// datatypeOf is the inverse of elementTypes, "" for a type that the protocol does not have.
func datatypeOf(element C.int32_t) registry.Datatype {
	for d, e := range elementTypes {
		if e == element {
			return d
		}
	}
	return ""
}

// openLibrary loads the library for runs.
func openLibrary(path string) error {
	p := C.CString(path)
	defer C.free(unsafe.Pointer(p))
	return fault(C.orrery_open(p))
}

// providers lists the execution providers the library was built with, by ONNX Runtime's names.
func providers() ([]string, error) {
	var names *C.char
	if err := fault(C.orrery_providers(&names)); err != nil {
		return nil, err
	}
	defer C.free(unsafe.Pointer(names))
	return strings.Split(C.GoString(names), "\n"), nil
}

// trim gives freed memory back to the system, where the C library can.
func trim() { C.orrery_trim() }

// options are the options of a session.
type options struct{ p unsafe.Pointer }

func newOptions(threads int) (options, error) {
	var o options
	return o, fault(C.orrery_options_new(C.int(threads), &o.p))
}

func (o options) free() { C.orrery_options_free(o.p) }

// provider adds an execution provider with settings of its own.
func (o options) provider(name string, settings map[string]string) error {
	n := C.CString(name)
	defer C.free(unsafe.Pointer(n))
	keys := slices.Sorted(maps.Keys(settings))
	values := make([]string, len(keys))
	for i, k := range keys {
		values[i] = settings[k]
	}
	k, v := cStrings(keys), cStrings(values)
	defer freeStrings(k, len(keys))
	defer freeStrings(v, len(keys))
	return fault(C.orrery_options_provider(o.p, n, C.orrery_settings{keys: k, values: v, count: C.size_t(len(keys))}))
}

// cStrings copies strings to C; freeStrings frees them.
func cStrings(list []string) **C.char {
	if len(list) == 0 {
		return nil
	}
	p := (**C.char)(C.malloc(C.size_t(len(list)) * C.size_t(unsafe.Sizeof(uintptr(0)))))
	for i, s := range list {
		unsafe.Slice(p, len(list))[i] = C.CString(s)
	}
	return p
}

func freeStrings(p **C.char, n int) {
	for i := range n {
		C.free(unsafe.Pointer(unsafe.Slice(p, n)[i]))
	}
	C.free(unsafe.Pointer(p))
}

// handle is a session of ONNX Runtime.
type handle struct{ p unsafe.Pointer }

func openSession(path string, o options) (handle, error) {
	file := C.CString(path)
	defer C.free(unsafe.Pointer(file))
	var h handle
	return h, fault(C.orrery_session_new(file, o.p, &h.p))
}

func (h handle) free() { C.orrery_session_free(h.p) }

// names are the names of a signature's tensors in C memory.
type names struct {
	inputs, outputs         **C.char
	inputCount, outputCount int
}

func newNames(s registry.Signature) *names {
	return &names{
		inputs: cStrings(registry.TensorNames(s.Inputs)), inputCount: len(s.Inputs),
		outputs: cStrings(registry.TensorNames(s.Outputs)), outputCount: len(s.Outputs),
	}
}

func (n *names) free() {
	freeStrings(n.inputs, n.inputCount)
	freeStrings(n.outputs, n.outputCount)
}

// frame is what one run needs. It lives in C memory and points to tensors in Go's, pinned until clear.
type frame struct {
	c       *C.orrery_frame
	in, out []C.orrery_tensor
	pins    runtime.Pinner
}

func newFrame(n *names) (*frame, error) {
	f := &frame{}
	if err := fault(C.orrery_frame_new(C.int(n.inputCount), n.inputs, C.int(n.outputCount), n.outputs, &f.c)); err != nil {
		return nil, err
	}
	f.in, f.out = unsafe.Slice(f.c.in, n.inputCount), unsafe.Slice(f.c.out, n.outputCount)
	return f, nil
}

func (f *frame) free() { C.orrery_frame_free(f.c) }

// clear makes the frame ready for another run.
func (f *frame) clear() {
	C.orrery_frame_clear(f.c)
	f.pins.Unpin()
}

// setInput makes a run read t's memory; strings are copied.
func (f *frame) setInput(i int, t engine.Tensor) error {
	if len(t.Shape) > C.ORRERY_MAX_RANK {
		return fmt.Errorf("%d dimensions, of at most %d", len(t.Shape), C.ORRERY_MAX_RANK)
	}
	f.set(&f.in[i], t)
	return nil
}

// setOutput makes a run write to t's memory.
func (f *frame) setOutput(i int, t engine.Tensor) { f.set(&f.out[i], t) }

// letAllocate leaves an output to ONNX Runtime.
func (f *frame) letAllocate(i int) { f.out[i].data = 0 }

func (f *frame) set(c *C.orrery_tensor, t engine.Tensor) {
	c.data = 0
	if p := dataOf(t); p != nil {
		f.pins.Pin(p)
		c.data = C.uintptr_t(uintptr(p)) // an address: a pointer's write barrier would look at what was here before
	}
	c.bytes, c._type, c.rank = C.size_t(len(t.Data)), elementTypes[t.Datatype], C.int32_t(len(t.Shape))
	for d, n := range t.Shape {
		c.dims[d] = C.int64_t(n)
	}
}

// run runs the session until it is done, or ctx ends and it stops at the next operator.
func (f *frame) run(ctx context.Context, h handle) error {
	if ctx.Done() == nil {
		return fault(C.orrery_frame_run(f.c, h.p))
	}
	finished := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { finished <- fault(C.orrery_frame_terminate(f.c)) })
	err := fault(C.orrery_frame_run(f.c, h.p))
	if !stop() { // the frame is used again, so its flag must be down
		err = errors.Join(err, <-finished, fault(C.orrery_frame_unterminate(f.c)))
	}
	return err
}

// output reads an output that ONNX Runtime allocated.
func (f *frame) output(i int, t *engine.Tensor) error {
	var c C.orrery_tensor
	if err := fault(C.orrery_frame_output(f.c, C.int(i), &c)); err != nil {
		return err
	}
	t.Datatype = datatypeOf(c._type)
	t.Shape = make([]int64, c.rank)
	for d := range t.Shape {
		t.Shape[d] = int64(c.dims[d])
	}
	if t.Datatype == registry.Bytes {
		t.Data = make([]byte, c.bytes)
		return fault(C.orrery_frame_strings(f.c, C.int(i), dataOf(*t), c.bytes))
	}
	size, _ := t.Datatype.Size()
	n := uint64(c.bytes) * uint64(size)
	if n > math.MaxInt32 {
		return fmt.Errorf("%d bytes are more than one answer can hold", n)
	}
	t.Data = make([]byte, n)
	return fault(C.orrery_frame_copy(f.c, C.int(i), dataOf(*t), C.size_t(n)))
}
