//go:build cgo

package onnx

import (
	"fmt"
	"maps"
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
func Start(path string) (engine.Runtime, error) {
	startOnce.Lock()
	defer startOnce.Unlock()
	if !ort.IsInitialized() {
		ort.SetSharedLibraryPath(path)
		if err := ort.InitializeEnvironment(ort.WithLogLevelError()); err != nil {
			return nil, registry.Errorf(registry.Unsupported, "load ONNX Runtime from %s: %w", path, err)
		}
		if err := ort.DisableTelemetry(); err != nil {
			return nil, registry.Errorf(registry.Unsupported, "turn ONNX Runtime's telemetry off: %w", err)
		}
		if err := openLibrary(path); err != nil {
			return nil, registry.Errorf(registry.Unsupported, "load ONNX Runtime from %s: %w", path, err)
		}
	}
	return library{}, nil
}

// library is the ONNX Runtime of this process.
type library struct{}

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

// Inspect implements engine.Runtime.
func (library) Inspect(path string) (registry.Signature, error) {
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
func (library) Open(path string, s registry.Signature, o engine.Options) (engine.Session, error) {
	opts, provider, err := sessionOptions(o)
	if err != nil {
		return nil, err
	}
	defer opts.free()
	h, err := openSession(path, opts)
	if err != nil {
		return nil, modelFault(err)
	}
	return newSession(h, s, provider), nil
}

// Providers implements engine.Runtime.
func (library) Providers() []string {
	list, err := providers()
	if err != nil { // it only reads a list
		return nil
	}
	return list
}

// Trim implements engine.Runtime.
func (library) Trim() { trim() }

// sessionOptions makes the options, with the provider that was asked for or, when it is not there, the fallback.
func sessionOptions(o engine.Options) (opts options, provider string, err error) {
	for _, provider = range []string{o.Provider, o.Fallback} {
		if opts, err = newOptions(max(o.Threads, 1)); err != nil {
			return opts, "", fmt.Errorf("session options: %w", err)
		}
		if provider == "" || provider == "cpu" {
			return opts, "cpu", nil
		}
		settings := o.ProviderOptions
		if provider != o.Provider {
			settings = nil
		}
		if err = opts.provider(provider, withDevice(provider, settings, o.Device)); err == nil {
			return opts, provider, nil
		}
		opts.free()
		err = registry.Errorf(registry.Unsupported, "execution provider %q is not there: %w", provider, err)
		if o.Fallback == "" {
			break
		}
	}
	return opts, "", err
}

// withDevice adds the device to the settings of a provider that runs on several.
func withDevice(provider string, settings map[string]string, device int) map[string]string {
	if provider != "cuda" && provider != "tensorrt" {
		return settings
	}
	out := map[string]string{"device_id": strconv.Itoa(device)}
	maps.Copy(out, settings)
	return out
}
