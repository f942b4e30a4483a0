//go:build cgo

package onnx_test

import (
	"context"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/engine/onnx"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
)

// affine is y = 2x + 1 on rows of two floats, with strings and integers passed through.
func affine() onnxfile.Model {
	return onnxfile.Model{
		Name: "affine", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 2}}, {Name: "s", Type: onnxfile.String, Shape: []int64{-1, 1}}, {Name: "i", Type: onnxfile.Int64, Shape: []int64{-1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 2}}, {Name: "t", Type: onnxfile.String, Shape: []int64{-1, 1}}, {Name: "j", Type: onnxfile.Int64, Shape: []int64{-1}}},
		Initializers: []onnxfile.Tensor{
			onnxfile.Floats("two", nil, []float64{2}), onnxfile.Floats("one", nil, []float64{1}),
		},
		Nodes: []onnxfile.Node{
			{Op: "Mul", Inputs: []string{"x", "two"}, Outputs: []string{"m"}},
			{Op: "Add", Inputs: []string{"m", "one"}, Outputs: []string{"y"}},
			{Op: "Identity", Inputs: []string{"s"}, Outputs: []string{"t"}},
			{Op: "Identity", Inputs: []string{"i"}, Outputs: []string{"j"}},
		},
	}
}

// endless loops for ever unless it is terminated.
func endless() onnxfile.Model {
	return onnxfile.Model{
		Name: "slow", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1500, 1500}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1500, 1500}}},
		Nodes:   chain(60),
	}
}

func chain(n int) []onnxfile.Node {
	names := make([]string, n+1)
	for i := range names {
		names[i] = "x" + string(rune('A'+i))
	}
	names[0], names[n] = "x", "y"
	nodes := make([]onnxfile.Node, n)
	for i := range nodes {
		nodes[i] = onnxfile.Node{Op: "MatMul", Inputs: []string{names[i], names[i]}, Outputs: []string{names[i+1]}}
	}
	return nodes
}

func open(t *testing.T, m onnxfile.Model) engine.Session {
	t.Helper()
	runtime, err := onnx.Start(testenv.OnnxRuntime(t))
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "model.onnx")
	require.NoError(t, os.WriteFile(path, onnxfile.Build(m), 0o600))
	signature, err := runtime.Inspect(path)
	require.NoError(t, err)
	s, err := runtime.Open(path, signature, engine.Options{Provider: "cpu", Threads: 1})
	require.NoError(t, err)
	return s
}

func row(tag string, n int64, values ...float32) []engine.Tensor {
	var x, i []byte
	s := []byte{}
	for r := range n {
		for _, v := range values {
			x = binary.LittleEndian.AppendUint32(x, math.Float32bits(v+float32(r)))
		}
		s = binary.LittleEndian.AppendUint32(s, uint32(len(tag)))
		s = append(s, tag...)
		i = binary.LittleEndian.AppendUint64(i, uint64(r))
	}
	return []engine.Tensor{
		{Name: "x", Datatype: registry.FP32, Shape: []int64{n, int64(len(values))}, Data: x},
		{Name: "s", Datatype: registry.Bytes, Shape: []int64{n, 1}, Data: s},
		{Name: "i", Datatype: registry.Int64, Shape: []int64{n}, Data: i},
	}
}

// Every request gets exactly its own rows and its own requested outputs, whatever it was batched with.
func TestModel_SplitsWhatItMerged(t *testing.T) {
	c := batched(16)
	c.MaxDelayMicros = 2000 // on a busy machine requests would come, and be answered, one by one
	m := engine.NewModel(engine.NewDevice(2), open(t, affine()), c, nil)
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 60 {
				n, v := 1+r.Int64N(5), float32(r.IntN(1000))
				tag := string(rune('a'+g)) + "    "[:r.IntN(4)]
				out, _, err := m.Infer(t.Context(), engine.Request{Inputs: row(tag, n, v, -v), Outputs: []string{"t", "y"}})
				if err != nil || len(out) != 2 || out[0].Name != "t" || out[1].Shape[0] != n {
					t.Errorf("got %v, %v", out, err)
					return
				}
				for k := range n {
					got := math.Float32frombits(binary.LittleEndian.Uint32(out[1].Data[8*k:]))
					if got != 2*(v+float32(k))+1 || string(out[0].Data[4:4+len(tag)]) != tag {
						t.Errorf("row %d of %v is %v, tag %q", k, v, got, out[0].Data)
					}
				}
			}
		})
	}
	wg.Wait()
	stats := m.Stats()
	require.Less(t, stats.Executions, int64(16*60), "requests shared batches")
	require.NoError(t, m.Close(t.Context()))
}

func batched(n int) registry.ServingConfig {
	c := registry.DefaultServingConfig()
	c.MaxBatch = n
	return c
}

func TestModel_RefusesWhatItDoesNotTake(t *testing.T) {
	m := engine.NewModel(engine.NewDevice(2), open(t, affine()), batched(4), nil)
	defer func() { require.NoError(t, m.Close(t.Context())) }()
	wrongType := row("a", 1, 1, 2)
	wrongType[0].Datatype = registry.FP64
	unknown := append(row("a", 1, 1, 2), engine.Tensor{Name: "zz"})
	rows := row("a", 2, 1, 2)
	rows[2] = row("a", 1, 1, 2)[2]
	for want, inputs := range map[string][]engine.Tensor{
		`input "x": expected FP32, got FP64`:                                                      wrongType,
		`input "x": expected shape [-1 2] (-1 is any), got [1 3]`:                                 row("a", 1, 1, 2, 3),
		`input "i" is missing: want INT64 of shape [-1]`:                                          row("a", 1, 1, 2)[:2],
		`unknown input "zz": the model takes x, s, i`:                                             unknown,
		`input "i" has 1 rows, input "x" has 2`:                                                   rows,
		`2000 rows in one request, of at most 1024: send them in parts, or score them as a batch`: row("a", 2000, 1, 2),
	} {
		_, _, err := m.Infer(t.Context(), engine.Request{Inputs: inputs})
		require.EqualError(t, err, want)
	}
	_, _, err := m.Infer(t.Context(), engine.Request{Inputs: row("a", 1, 1, 2), Outputs: []string{"nope"}})
	require.EqualError(t, err, `unknown output "nope": the model gives y, t, j`)
	require.Equal(t, registry.Invalid, registry.CodeOf(err))
}

func TestModel_CutsARunAtTheDeadline(t *testing.T) {
	s := open(t, endless())
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := s.Run(ctx, engine.Probe(s.Signature(), 1))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Less(t, time.Since(began), 5*time.Second)
	require.NoError(t, s.Close())
}

func TestModel_ShedsWhenTheQueueIsFull(t *testing.T) {
	c := batched(1)
	c.QueueRows = 1
	m := engine.NewModel(engine.NewDevice(2), open(t, endless()), c, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _, _, _ = m.Infer(ctx, engine.Request{Inputs: engine.Probe(m.Signature(), 1)}) })
	require.Eventually(t, func() bool {
		short, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer stop()
		_, _, err := m.Infer(short, engine.Request{Inputs: engine.Probe(m.Signature(), 1)})
		wg.Go(func() { _, _, _ = m.Infer(ctx, engine.Request{Inputs: engine.Probe(m.Signature(), 1)}) })
		return registry.CodeOf(err) == registry.Exhausted
	}, 10*time.Second, time.Millisecond)
	cancel()
	wg.Wait()
	require.NoError(t, m.Close(t.Context()))
}

func TestRuntime_RefusesFilesThatAreNoModel(t *testing.T) {
	runtime, err := onnx.Start(testenv.OnnxRuntime(t))
	require.NoError(t, err)
	whole := onnxfile.Build(affine())
	for name, raw := range map[string][]byte{"text": []byte("hello"), "empty": {}, "cut": whole[:len(whole)/2]} {
		path := filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(path, raw, 0o600))
		_, err := runtime.Inspect(path)
		require.Equal(t, registry.Invalid, registry.CodeOf(err), name)
		_, err = onnxfile.ScanFile(path)
		require.ErrorIs(t, err, onnxfile.ErrNotONNX, name)
	}
	path := filepath.Join(t.TempDir(), "ok")
	require.NoError(t, os.WriteFile(path, whole, 0o600))
	info, err := onnxfile.ScanFile(path)
	require.NoError(t, err)
	require.EqualValues(t, 17, info.Opsets[""])
	_, err = runtime.Open(path, registry.Signature{}, engine.Options{Provider: "cuda"})
	require.Equal(t, registry.Unsupported, registry.CodeOf(err))
}

// A model that answers another shape than it declared is reported, not hidden.
func TestSession_ReportsAShapeThatWasNotDeclared(t *testing.T) {
	s := open(t, onnxfile.Model{
		Name: "liar", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}, {Name: "s", Type: onnxfile.Int64, Shape: []int64{2}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 2}}},
		Nodes:   []onnxfile.Node{{Op: "Expand", Inputs: []string{"x", "s"}, Outputs: []string{"y"}}},
	})
	ask := func(width byte) error {
		_, err := s.Run(t.Context(), []engine.Tensor{
			{Name: "x", Datatype: registry.FP32, Shape: []int64{1, 1}, Data: make([]byte, 4)},
			{Name: "s", Datatype: registry.Int64, Shape: []int64{2}, Data: []byte{1, 0, 0, 0, 0, 0, 0, 0, width, 0, 0, 0, 0, 0, 0, 0}},
		})
		return err
	}
	require.NoError(t, ask(2))
	err := ask(3)
	require.ErrorContains(t, err, "declares output")
	require.Equal(t, registry.Internal, registry.CodeOf(err))
	require.NoError(t, s.Close())
}
