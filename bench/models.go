package main

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/orrery-ml/orrery/internal/onnxfile"
)

// model is a model of the benchmark. All are generated from a fixed seed, so that nothing is fetched.
type model struct {
	name  string
	what  string
	file  []byte
	input string // datatype of its only input
	row   []int64
}

// elements is how many there are in a row.
func (m model) elements() int {
	n := 1
	for _, d := range m.row {
		n *= int(d)
	}
	return n
}

// data makes rows of the input: small integers for INT64 (token numbers), noise for FP32.
func (m model) data(rows int) []byte {
	r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same on every run
	var out []byte
	for range rows * m.elements() {
		if m.input == "INT64" {
			out = binary.LittleEndian.AppendUint64(out, r.Uint64N(250))
			continue
		}
		out = binary.LittleEndian.AppendUint32(out, math.Float32bits(float32(r.NormFloat64())))
	}
	return out
}

func allModels() []model {
	return []model{
		{"kb", "identity of 1 KB, for overhead", identity(256), "FP32", []int64{256}},
		{"tiny", "tabular: 10 features, logistic regression", tiny(), "FP32", []int64{10}},
		{"trees", "gradient-boosted trees: 200 of depth 6 on 30 features", trees(), "FP32", []int64{30}},
		{"mlp", "dense net of 80 MB, bound by memory: a batch costs little more than a row", mlp(), "FP32", []int64{512}},
		{"conv", "convolutional net on 3x192x192", conv(), "FP32", []int64{3, 192, 192}},
		{"encoder", "transformer encoder: 6 layers, 128 tokens, width 384", encoder(), "INT64", []int64{128}},
	}
}

// weights draws initial weights.
type weights struct {
	r    *rand.Rand
	list []onnxfile.Tensor
}

func newWeights() *weights { return &weights{r: rand.New(rand.NewPCG(3, 4))} } //nolint:gosec // the same on every run

func (w *weights) add(name string, scale float64, dims ...int64) string {
	n := int64(1)
	for _, d := range dims {
		n *= d
	}
	values := make([]float64, n)
	for i := range values {
		values[i] = scale * w.r.NormFloat64()
	}
	w.list = append(w.list, onnxfile.Floats(name, dims, values))
	return name
}

func free(shape []int64) []int64 { return append([]int64{-1}, shape...) }

func identity(width int64) []byte {
	v := func(name string) []onnxfile.Value {
		return []onnxfile.Value{{Name: name, Type: onnxfile.Float, Shape: []int64{-1, width}}}
	}
	return onnxfile.Build(onnxfile.Model{Name: "kb", Opset: 17, Inputs: v("x"), Outputs: v("y"), Nodes: []onnxfile.Node{{Op: "Identity", Inputs: []string{"x"}, Outputs: []string{"y"}}}})
}

func tiny() []byte {
	w := newWeights()
	return onnxfile.Build(onnxfile.Model{
		Name: "tiny", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 10}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Nodes: []onnxfile.Node{
			{Op: "Gemm", Inputs: []string{"x", w.add("w", 1, 10, 1), w.add("b", 1, 1)}, Outputs: []string{"z"}},
			{Op: "Sigmoid", Inputs: []string{"z"}, Outputs: []string{"y"}},
		},
		Initializers: w.list,
	})
}

// trees is a full binary tree of the depth for each, with random features and thresholds.
func trees() []byte {
	const count, depth, features = 200, 6, 30
	r := rand.New(rand.NewPCG(5, 6)) //nolint:gosec // the same on every run
	var tree, id, feature, yes, no, leafTree, leafID, target []int64
	var threshold, weight []float64
	var mode []string
	for t := range int64(count) {
		for n := range int64(1<<(depth+1) - 1) {
			tree, id = append(tree, t), append(id, n)
			if n >= 1<<depth-1 {
				feature, threshold, mode, yes, no = append(feature, 0), append(threshold, 0), append(mode, "LEAF"), append(yes, 0), append(no, 0)
				leafTree, leafID, target, weight = append(leafTree, t), append(leafID, n), append(target, 0), append(weight, r.NormFloat64())
				continue
			}
			feature, threshold, mode = append(feature, r.Int64N(features)), append(threshold, r.NormFloat64()), append(mode, "BRANCH_LEQ")
			yes, no = append(yes, 2*n+1), append(no, 2*n+2)
		}
	}
	return onnxfile.Build(onnxfile.Model{
		Name: "trees", Opset: 17, Imports: map[string]int64{"ai.onnx.ml": 3},
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, features}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Nodes: []onnxfile.Node{{
			Op: "TreeEnsembleRegressor", Domain: "ai.onnx.ml", Inputs: []string{"x"}, Outputs: []string{"y"}, Attributes: map[string]any{
				"n_targets": int64(1), "nodes_treeids": tree, "nodes_nodeids": id, "nodes_featureids": feature, "nodes_values": threshold, "nodes_modes": mode,
				"nodes_truenodeids": yes, "nodes_falsenodeids": no, "target_treeids": leafTree, "target_nodeids": leafID, "target_ids": target, "target_weights": weight,
			},
		}},
	})
}

func mlp() []byte {
	w := newWeights()
	var nodes []onnxfile.Node
	last, from := "x", int64(512)
	for i, to := range []int64{3072, 3072, 3072, 64} {
		next := fmt.Sprintf("d%d", i)
		nodes = append(nodes,
			onnxfile.Node{Op: "Gemm", Inputs: []string{last, w.add(next+"w", math.Sqrt(2/float64(from)), from, to), w.add(next+"b", 0.01, to)}, Outputs: []string{next + "z"}},
			onnxfile.Node{Op: "Relu", Inputs: []string{next + "z"}, Outputs: []string{next}})
		last, from = next, to
	}
	nodes[len(nodes)-1].Outputs = []string{"y"}
	return onnxfile.Build(onnxfile.Model{
		Name: "mlp", Opset: 17, Inputs: []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 512}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 64}}}, Nodes: nodes, Initializers: w.list,
	})
}

func conv() []byte {
	w := newWeights()
	var nodes []onnxfile.Node
	last := "x"
	for i, layer := range []struct{ in, out, stride int64 }{{3, 32, 1}, {32, 64, 2}, {64, 64, 1}, {64, 128, 2}, {128, 128, 1}, {128, 256, 2}, {256, 256, 1}} {
		next := fmt.Sprintf("c%d", i)
		nodes = append(nodes,
			onnxfile.Node{
				Op: "Conv", Inputs: []string{last, w.add(next+"w", math.Sqrt(2/float64(9*layer.in)), layer.out, layer.in, 3, 3), w.add(next+"b", 0.01, layer.out)},
				Outputs: []string{next + "z"}, Attributes: map[string]any{"pads": []int64{1, 1, 1, 1}, "strides": []int64{layer.stride, layer.stride}},
			},
			onnxfile.Node{Op: "Relu", Inputs: []string{next + "z"}, Outputs: []string{next}})
		last = next
	}
	nodes = append(nodes,
		onnxfile.Node{Op: "GlobalAveragePool", Inputs: []string{last}, Outputs: []string{"p"}},
		onnxfile.Node{Op: "Flatten", Inputs: []string{"p"}, Outputs: []string{"f"}},
		onnxfile.Node{Op: "Gemm", Inputs: []string{"f", w.add("ow", 0.05, 256, 100), w.add("ob", 0.01, 100)}, Outputs: []string{"y"}})
	return onnxfile.Build(onnxfile.Model{
		Name: "conv", Opset: 17, Inputs: []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: free([]int64{3, 192, 192})}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 100}}}, Nodes: nodes, Initializers: w.list,
	})
}

func encoder() []byte {
	const width, tokens, hidden = 384, 128, 1536
	w := newWeights()
	nodes := []onnxfile.Node{
		{Op: "Gather", Inputs: []string{w.add("words", 1, 256, width), "x"}, Outputs: []string{"e"}},
		{Op: "Add", Inputs: []string{"e", w.add("places", 0.1, tokens, width)}, Outputs: []string{"h0"}},
	}
	matmul := func(in, name string, from, to int64) string {
		nodes = append(nodes,
			onnxfile.Node{Op: "MatMul", Inputs: []string{in, w.add(name+"w", 1/math.Sqrt(float64(from)), from, to)}, Outputs: []string{name + "m"}},
			onnxfile.Node{Op: "Add", Inputs: []string{name + "m", w.add(name+"b", 0.01, to)}, Outputs: []string{name}})
		return name
	}
	normed := func(a, b, name string) string {
		nodes = append(nodes,
			onnxfile.Node{Op: "Add", Inputs: []string{a, b}, Outputs: []string{name + "s"}},
			onnxfile.Node{Op: "LayerNormalization", Inputs: []string{name + "s", w.add(name+"g", 1, width), w.add(name+"c", 0.1, width)}, Outputs: []string{name}, Attributes: map[string]any{"axis": int64(-1)}})
		return name
	}
	scale := w.add("scale", 1, 1)
	last := "h0"
	for i := range 6 {
		p := fmt.Sprintf("l%d", i)
		q, k, v := matmul(last, p+"q", width, width), matmul(last, p+"k", width, width), matmul(last, p+"v", width, width)
		nodes = append(nodes,
			onnxfile.Node{Op: "Transpose", Inputs: []string{k}, Outputs: []string{p + "kt"}, Attributes: map[string]any{"perm": []int64{0, 2, 1}}},
			onnxfile.Node{Op: "MatMul", Inputs: []string{q, p + "kt"}, Outputs: []string{p + "a"}},
			onnxfile.Node{Op: "Mul", Inputs: []string{p + "a", scale}, Outputs: []string{p + "as"}},
			onnxfile.Node{Op: "Softmax", Inputs: []string{p + "as"}, Outputs: []string{p + "p"}},
			onnxfile.Node{Op: "MatMul", Inputs: []string{p + "p", v}, Outputs: []string{p + "o"}})
		mid := normed(last, matmul(p+"o", p+"w", width, width), p+"n")
		up := matmul(mid, p+"u", width, hidden)
		nodes = append(nodes, onnxfile.Node{Op: "Relu", Inputs: []string{up}, Outputs: []string{p + "r"}})
		last = normed(mid, matmul(p+"r", p+"d", hidden, width), p+"out")
	}
	nodes = append(nodes, onnxfile.Node{Op: "ReduceMean", Inputs: []string{last}, Outputs: []string{"y"}, Attributes: map[string]any{"axes": []int64{1}, "keepdims": int64(0)}})
	return onnxfile.Build(onnxfile.Model{
		Name: "encoder", Opset: 17, Inputs: []onnxfile.Value{{Name: "x", Type: onnxfile.Int64, Shape: []int64{-1, tokens}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, width}}}, Nodes: nodes, Initializers: w.list,
	})
}
