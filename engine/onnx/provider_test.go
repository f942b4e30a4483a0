//go:build cgo

package onnx_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/engine/onnx"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/registry"
)

// webgpuLibrary tells the child process of the test which library to load.
const webgpuLibrary = "ORRERY_TEST_WEBGPU"

// A provider that is a GPU's runs here on a GPU made of software (WebGPU over SwiftShader), in a process of its own: the
// library of that build is another one, and the Vulkan driver is found by the environment. `deploy/setup.sh webgpu` brings
// both.
func TestProvider_WebGPU(t *testing.T) {
	if library := os.Getenv(webgpuLibrary); library != "" {
		runOnWebGPU(t, library)
		return
	}
	dir, err := filepath.Abs(filepath.Join("..", "..", ".tools", "webgpu"))
	require.NoError(t, err)
	library := filepath.Join(dir, "libonnxruntime.so.1")
	if _, err := os.Stat(library); err != nil {
		t.Skip("no software GPU here: deploy/setup.sh webgpu brings one")
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestProvider_WebGPU$", "-test.v") //nolint:gosec // ourselves
	child.Env = append(os.Environ(), webgpuLibrary+"="+library, "LD_LIBRARY_PATH="+dir, "VK_ICD_FILENAMES="+filepath.Join(dir, "icd.json"), "VK_DRIVER_FILES="+filepath.Join(dir, "icd.json"))
	out, err := child.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "ran on WebGPU")
}

func runOnWebGPU(t *testing.T, library string) {
	t.Helper()
	runtime, err := onnx.Start(library)
	require.NoError(t, err)
	require.Contains(t, strings.Join(runtime.Providers(), " "), "WebGpu")
	m := onnxfile.Model{
		Name: "dense", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 8}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 4}}},
		Initializers: []onnxfile.Tensor{onnxfile.Floats("w", []int64{8, 4}, ramp(32)), onnxfile.Floats("b", []int64{4}, ramp(4))},
		Nodes: []onnxfile.Node{
			{Op: "Gemm", Inputs: []string{"x", "w", "b"}, Outputs: []string{"z"}},
			{Op: "Relu", Inputs: []string{"z"}, Outputs: []string{"y"}},
		},
	}
	path := filepath.Join(t.TempDir(), "model.onnx")
	require.NoError(t, os.WriteFile(path, onnxfile.Build(m), 0o600))
	signature, err := runtime.Inspect(path)
	require.NoError(t, err)
	answer := func(o engine.Options) (string, []byte) {
		s, err := runtime.Open(path, signature, o)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		inputs := engine.Probe(signature, 3)
		for i := range inputs[0].Data {
			inputs[0].Data[i] = []byte{0, 0, 0x80, 0x3f}[i%4] // ones
		}
		measured, err := engine.Warm(t.Context(), s, 4)
		require.NoError(t, err)
		require.Len(t, measured, 3)
		out, err := s.Run(t.Context(), inputs)
		require.NoError(t, err)
		return s.Provider(), out[0].Data
	}
	provider, want := answer(engine.Options{Provider: "cpu"})
	require.Equal(t, "cpu", provider)
	provider, got := answer(engine.Options{Provider: "WebGPU"})
	require.Equal(t, "WebGPU", provider)
	require.Equal(t, want, got)
	// The fallback that was asked for is used, and seen; without one there is an error.
	provider, got = answer(engine.Options{Provider: "cuda", Fallback: "WebGPU"})
	require.Equal(t, "WebGPU", provider)
	require.Equal(t, want, got)
	_, err = runtime.Open(path, signature, engine.Options{Provider: "cuda"})
	require.Equal(t, registry.Unsupported, registry.CodeOf(err))
	_, err = runtime.Open(path, signature, engine.Options{Provider: "WebGPU", ProviderOptions: map[string]string{"preferredLayout": "no such layout"}})
	require.Error(t, err, "options reach the provider")
	t.Log("ran on WebGPU")
}

// ramp is small whole numbers, which every device adds up alike.
func ramp(n int) []float64 {
	out := make([]float64, n)
	for i := range out {
		out[i] = float64(i%5) - 2
	}
	return out
}
