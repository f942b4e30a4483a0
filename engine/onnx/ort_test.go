//go:build cgo

package onnx_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	ort "github.com/yalue/onnxruntime_go"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/engine/onnx"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
)

// The places in the table of functions are those of the published header, which a module of ours carries.
func TestPlaces_AreThoseOfTheHeader(t *testing.T) {
	t.Parallel()
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/yalue/onnxruntime_go").Output()
	require.NoError(t, err)
	raw, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "onnxruntime_c_api.h"))
	require.NoError(t, err)
	_, body, ok := strings.Cut(string(raw), "struct OrtApi {")
	require.True(t, ok)
	body, _, _ = strings.Cut(body, "\n};")
	body = regexp.MustCompile(`(?s)/\*.*?\*/|//[^\n]*`).ReplaceAllString(body, "")
	member := regexp.MustCompile(`ORT_API2_STATUS\((\w+)|ORT_CLASS_RELEASE\((\w+)\)|ORT_API_T\([^,]*,\s*(\w+)|\(\s*(?:ORT_API_CALL)?\s*\*\s*(\w+)\)`)
	places := map[string]int{}
	for declaration := range strings.SplitSeq(body, ";") {
		m := member.FindStringSubmatch(declaration)
		if m == nil {
			continue
		}
		name := m[1] + m[3] + m[4]
		if m[2] != "" {
			name = "Release" + m[2]
		}
		places[name] = len(places)
	}
	ours, err := os.ReadFile("ort.c")
	require.NoError(t, err)
	found := regexp.MustCompile(`(?m)^\t(\w+) = (\d+),$`).FindAllStringSubmatch(string(ours), -1)
	require.Greater(t, len(found), 30)
	for _, f := range found {
		want, ok := places[f[1]]
		require.True(t, ok, f[1])
		require.Equal(t, strconv.Itoa(want), f[2], f[1])
	}
}

// identity passes one tensor through. With a free second dimension ONNX Runtime allocates the output.
func identity(e onnxfile.ElemType, shape ...int64) onnxfile.Model {
	return onnxfile.Model{
		Name: "identity", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: e, Shape: shape}},
		Outputs: []onnxfile.Value{{Name: "y", Type: e, Shape: shape}},
		Nodes:   []onnxfile.Node{{Op: "Identity", Inputs: []string{"x"}, Outputs: []string{"y"}}},
	}
}

// Every datatype passes through bit for bit, with rows, without (a scalar), with no elements, and allocated by either
// side.
func TestSession_EveryDatatypeAndShape(t *testing.T) {
	t.Parallel()
	for d, e := range map[registry.Datatype]onnxfile.ElemType{
		registry.Bool: onnxfile.Bool, registry.Uint8: onnxfile.Uint8, registry.Uint16: onnxfile.Uint16, registry.Uint32: onnxfile.Uint32,
		registry.Uint64: onnxfile.Uint64, registry.Int8: onnxfile.Int8, registry.Int16: onnxfile.Int16, registry.Int32: onnxfile.Int32,
		registry.Int64: onnxfile.Int64, registry.FP16: onnxfile.Float16, registry.BF16: onnxfile.BFloat, registry.FP32: onnxfile.Float,
		registry.FP64: onnxfile.Double, registry.Bytes: onnxfile.String,
	} {
		t.Run(string(d), func(t *testing.T) {
			t.Parallel()
			for name, c := range map[string]struct{ declared, sent []int64 }{
				"rows": {[]int64{-1, 3}, []int64{4, 3}}, "free": {[]int64{-1, -1}, []int64{4, 3}}, "fixed": {[]int64{2, 3}, []int64{2, 3}},
				"scalar": {[]int64{}, []int64{}}, "no elements": {[]int64{-1, -1}, []int64{2, 0}}, "no rows": {[]int64{-1, 3}, []int64{0, 3}},
			} {
				s := open(t, identity(e, c.declared...))
				in := engine.Tensor{Name: "x", Datatype: d, Shape: c.sent, Data: random(d, c.sent)}
				for range 3 { // frames are used again
					out, err := s.Run(t.Context(), []engine.Tensor{in})
					require.NoError(t, err, name)
					require.Equal(t, engine.Tensor{Name: "y", Datatype: d, Shape: c.sent, Data: in.Data}, out[0], name)
				}
				require.NoError(t, s.Close())
			}
		})
	}
}

// random makes the bytes of a tensor; strings hold every byte, zero too.
func random(d registry.Datatype, shape []int64) []byte {
	n := int64(1)
	for _, v := range shape {
		n *= v
	}
	size, _ := d.Size()
	out := make([]byte, int(n)*size)
	for i := range out {
		out[i] = byte(rand.IntN(2))
	}
	if d == registry.Bytes {
		for range n {
			element := make([]byte, rand.IntN(300))
			for i := range element {
				element[i] = byte(rand.IntN(256))
			}
			out = append(out, byte(len(element)), byte(len(element)>>8), 0, 0)
			out = append(out, element...)
		}
	}
	return out
}

// Another binding of the same library gives the same numbers.
func TestSession_AgreesWithAnotherBinding(t *testing.T) {
	t.Parallel()
	s := open(t, affine())
	defer func() { require.NoError(t, s.Close()) }()
	path := filepath.Join(t.TempDir(), "model.onnx")
	require.NoError(t, os.WriteFile(path, onnxfile.Build(affine()), 0o600))
	other, err := ort.NewDynamicAdvancedSession(path, []string{"x", "s", "i"}, []string{"y", "t", "j"}, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Destroy()) }()
	for range 20 {
		rows := int64(1 + rand.IntN(50))
		values := make([]float32, 2*rows)
		for i := range values {
			values[i] = rand.Float32()
		}
		x, err := ort.NewTensor(ort.NewShape(rows, 2), values)
		require.NoError(t, err)
		text, err := ort.NewStringTensor(ort.NewShape(rows, 1))
		require.NoError(t, err)
		i, err := ort.NewTensor(ort.NewShape(rows), make([]int64, rows))
		require.NoError(t, err)
		want := make([]ort.Value, 3)
		require.NoError(t, other.Run([]ort.Value{x, text, i}, want))
		inputs := engine.Probe(s.Signature(), rows)
		inputs[0].Data = floatBytes(values)
		got, err := s.Run(t.Context(), inputs)
		require.NoError(t, err)
		require.Equal(t, floatBytes(want[0].(*ort.Tensor[float32]).GetData()), got[0].Data) //nolint:forcetypeassert // as declared
		for _, v := range []ort.Value{x, text, i, want[0], want[1], want[2]} {
			require.NoError(t, v.Destroy())
		}
	}
}

// A thousand versions come and go, and memory stays where it is.
func TestSession_ComesAndGoesInFlatMemory(t *testing.T) {
	runtime, err := onnx.Start(testenv.OnnxRuntime(t))
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "model.onnx")
	m := affine()
	m.Initializers = append(m.Initializers, onnxfile.Floats("weights", []int64{100_000}, make([]float64, 100_000)))
	m.Nodes = append(m.Nodes, onnxfile.Node{Op: "Add", Inputs: []string{"weights", "one"}, Outputs: []string{"unused"}})
	require.NoError(t, os.WriteFile(path, onnxfile.Build(m), 0o600))
	s := open(t, affine())
	signature := s.Signature()
	require.NoError(t, s.Close())
	cycle := func(n int) {
		for range n {
			s, err := runtime.Open(path, signature, engine.Options{Threads: 1})
			require.NoError(t, err)
			_, err = s.Run(t.Context(), engine.Probe(signature, 8))
			require.NoError(t, err)
			require.NoError(t, s.Close())
		}
	}
	cycle(200)
	before := resident(t)
	cycle(800)
	require.Less(t, resident(t)-before, int64(20<<20), "bytes of resident memory after 800 more")
}

func resident(t *testing.T) int64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip("no /proc here to read the memory from")
	}
	pages, err := strconv.ParseInt(strings.Fields(string(raw))[1], 10, 64)
	require.NoError(t, err)
	return pages * int64(os.Getpagesize())
}

func floatBytes(values []float32) []byte {
	var out []byte
	for _, v := range values {
		out = binary.LittleEndian.AppendUint32(out, math.Float32bits(v))
	}
	return out
}

// The collector runs all the time while sessions read and write memory that it manages.
func TestSession_SurvivesTheCollector(t *testing.T) {
	s := open(t, identity(onnxfile.Float, -1, 3))
	ctx, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond) { // so that what a frame pointed to is freed before it runs again
				shape := []int64{1 + rand.Int64N(50), 3}
				in := engine.Tensor{Name: "x", Datatype: registry.FP32, Shape: shape, Data: random(registry.FP32, shape)}
				out, err := s.Run(t.Context(), []engine.Tensor{in})
				if err != nil || !bytes.Equal(out[0].Data, in.Data) {
					t.Errorf("got %v, %v", out, err)
					return
				}
			}
		})
	}
	for ctx.Err() == nil {
		runtime.GC()
	}
	wg.Wait()
	require.NoError(t, s.Close())
}
