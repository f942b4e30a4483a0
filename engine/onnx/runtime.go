//go:build cgo

package onnx

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// startOnce loads the library once per process: ONNX Runtime has one environment.
var startOnce sync.Mutex

// Start loads the ONNX Runtime library at the given path and returns the runtime. It ends in Unsupported when the
// library cannot be loaded or is too old.
func Start(library string) (engine.Runtime, error) {
	startOnce.Lock()
	defer startOnce.Unlock()
	if !ort.IsInitialized() {
		ort.SetSharedLibraryPath(library)
		if err := ort.InitializeEnvironment(ort.WithLogLevelError()); err != nil {
			return nil, registry.Errorf(registry.Unsupported, "load ONNX Runtime from %s: %w", library, err)
		}
		if err := ort.DisableTelemetry(); err != nil {
			return nil, registry.Errorf(registry.Unsupported, "turn ONNX Runtime's telemetry off: %w", err)
		}
	}
	return runtime{}, nil
}

type runtime struct{}

// datatypes maps ONNX Runtime's element types to the protocol's.
var datatypes = map[ort.TensorElementDataType]registry.Datatype{
	ort.TensorElementDataTypeBool: registry.Bool, ort.TensorElementDataTypeUint8: registry.Uint8,
	ort.TensorElementDataTypeUint16: registry.Uint16, ort.TensorElementDataTypeUint32: registry.Uint32,
	ort.TensorElementDataTypeUint64: registry.Uint64, ort.TensorElementDataTypeInt8: registry.Int8,
	ort.TensorElementDataTypeInt16: registry.Int16, ort.TensorElementDataTypeInt32: registry.Int32,
	ort.TensorElementDataTypeInt64: registry.Int64, ort.TensorElementDataTypeFloat16: registry.FP16,
	ort.TensorElementDataTypeBFloat16: registry.BF16, ort.TensorElementDataTypeFloat: registry.FP32,
	ort.TensorElementDataTypeDouble: registry.FP64, ort.TensorElementDataTypeString: registry.Bytes,
}

// elementTypes is the inverse of datatypes.
var elementTypes = func() map[registry.Datatype]ort.TensorElementDataType {
	inverse := make(map[registry.Datatype]ort.TensorElementDataType, len(datatypes))
	for k, v := range datatypes {
		inverse[v] = k
	}
	return inverse
}()

// Inspect implements engine.Runtime.
func (runtime) Inspect(path string) (registry.Signature, error) {
	inputs, outputs, err := ort.GetInputOutputInfo(path)
	if err != nil {
		return registry.Signature{}, modelFault(err)
	}
	var s registry.Signature
	if s.Inputs, err = tensors("input", inputs); err != nil {
		return s, err
	}
	if s.Outputs, err = tensors("output", outputs); err != nil {
		return s, err
	}
	if len(s.Inputs) == 0 || len(s.Outputs) == 0 {
		return s, registry.Errorf(registry.Invalid, "the model has %d inputs and %d outputs: it needs both", len(s.Inputs), len(s.Outputs))
	}
	s.Batched = !slices.ContainsFunc(slices.Concat(s.Inputs, s.Outputs), func(t registry.Tensor) bool {
		return len(t.Shape) == 0 || t.Shape[0] >= 0
	})
	return s, nil
}

func tensors(kind string, infos []ort.InputOutputInfo) ([]registry.Tensor, error) {
	out := make([]registry.Tensor, len(infos))
	for i, info := range infos {
		if info.OrtValueType != ort.ONNXTypeTensor {
			return nil, registry.Errorf(registry.Invalid,
				"%s %q is a %s, not a tensor: export the model with tensors only (skl2onnx: option zipmap=False)", kind, info.Name, info.OrtValueType)
		}
		datatype, ok := datatypes[info.DataType]
		if !ok {
			return nil, registry.Errorf(registry.Invalid, "%s %q has element type %s, which the protocol does not have", kind, info.Name, info.DataType)
		}
		shape := slices.Clone([]int64(info.Dimensions))
		for d := range shape {
			shape[d] = max(shape[d], -1)
		}
		if shape == nil {
			shape = []int64{}
		}
		out[i] = registry.Tensor{Name: info.Name, Datatype: datatype, Shape: shape}
	}
	return out, nil
}

// modelFault strips the binding's words from an error of ONNX Runtime and calls the file invalid.
func modelFault(err error) error {
	text := err.Error()
	if i := strings.LastIndex(text, "[ONNXRuntimeError]"); i >= 0 {
		text = text[i:]
	}
	return registry.Errorf(registry.Invalid, "ONNX Runtime refuses the model: %s", strings.TrimSpace(text))
}

// Open implements engine.Runtime.
func (runtime) Open(path string, s registry.Signature, o engine.Options) (engine.Session, error) {
	options, provider, err := sessionOptions(o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = options.Destroy() }() // only frees memory
	inner, err := ort.NewDynamicAdvancedSession(path, registry.TensorNames(s.Inputs), registry.TensorNames(s.Outputs), options)
	if err != nil {
		return nil, modelFault(err)
	}
	return &session{inner: inner, signature: s, provider: provider}, nil
}

func sessionOptions(o engine.Options) (options *ort.SessionOptions, provider string, err error) {
	options, err = ort.NewSessionOptions()
	if err != nil {
		return nil, "", fmt.Errorf("session options: %w", err)
	}
	err = errors.Join(
		options.SetIntraOpNumThreads(max(o.Threads, 1)),
		options.SetInterOpNumThreads(1),
		options.SetGraphOptimizationLevel(ort.GraphOptimizationLevelEnableAll),
		options.AddSessionConfigEntry("session.intra_op.allow_spinning", "0"), // spinning steals the core from other sessions
	)
	if err != nil {
		return nil, "", errors.Join(fmt.Errorf("session options: %w", err), options.Destroy())
	}
	provider, err = appendProvider(options, o.Provider, o.Device)
	if err != nil && o.Fallback != "" {
		provider, err = appendProvider(options, o.Fallback, o.Device)
	}
	if err != nil {
		return nil, "", errors.Join(err, options.Destroy())
	}
	return options, provider, nil
}

// appendProvider adds an execution provider and returns its name.
func appendProvider(options *ort.SessionOptions, name string, device int) (string, error) {
	var err error
	switch name {
	case "", "cpu":
		return "cpu", nil
	case "cuda":
		err = appendCUDA(options, device)
	case "tensorrt":
		err = appendTensorRT(options, device)
	default:
		err = options.AppendExecutionProvider(name, nil)
	}
	if err != nil {
		return "", registry.Errorf(registry.Unsupported, "execution provider %q is not there: %w", name, err)
	}
	return name, nil
}

func appendCUDA(options *ort.SessionOptions, device int) error {
	cuda, err := ort.NewCUDAProviderOptions()
	if err != nil {
		return err
	}
	defer func() { _ = cuda.Destroy() }() // only frees memory
	if err := cuda.Update(map[string]string{"device_id": strconv.Itoa(device)}); err != nil {
		return err
	}
	return options.AppendExecutionProviderCUDA(cuda)
}

func appendTensorRT(options *ort.SessionOptions, device int) error {
	trt, err := ort.NewTensorRTProviderOptions()
	if err != nil {
		return err
	}
	defer func() { _ = trt.Destroy() }() // only frees memory
	if err := trt.Update(map[string]string{"device_id": strconv.Itoa(device)}); err != nil {
		return err
	}
	return options.AppendExecutionProviderTensorRT(trt)
}
