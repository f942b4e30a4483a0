// Package model is the flights model: a logistic regression that says how likely a flight out of New York is to arrive
// a quarter of an hour late, fitted with gonum and written as ONNX.
package model

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/gonum/optimize"

	"github.com/orrery-ml/orrery/internal/onnxfile"
)

// Features are the columns of the input, in order. The last two are numbers of an origin and of a carrier.
var Features = []string{"hour", "distance", "temp", "dewp", "humid", "wind_speed", "precip", "visib", "origin", "carrier"}

// Label is the column to predict: 1 for a flight that arrived 15 minutes late or more.
const Label = "late"

const (
	numeric  = 8
	origins  = 3
	carriers = 16
	ridge    = 1e-3
)

// Data is a table: rows of Features, and their labels.
type Data struct {
	X [][]float64
	Y []float64
}

// Read reads a CSV file whose header names the features and, the label; other columns are ignored.
func Read(path, label string) (Data, error) {
	f, err := os.Open(path)
	if err != nil {
		return Data{}, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	r := csv.NewReader(f)
	header, err := r.Read()
	if err != nil {
		return Data{}, fmt.Errorf("%s: header: %w", path, err)
	}
	columns := make([]int, len(Features)+1)
	for i, name := range append(slices.Clone(Features), label) {
		if columns[i] = slices.Index(header, name); columns[i] < 0 {
			return Data{}, fmt.Errorf("%s has no column %q", path, name)
		}
	}
	var d Data
	for {
		record, err := r.Read()
		if errors.Is(err, io.EOF) {
			return d, nil
		}
		if err != nil {
			return Data{}, fmt.Errorf("%s: %w", path, err)
		}
		row := make([]float64, len(columns))
		for i, c := range columns {
			if row[i], err = strconv.ParseFloat(record[c], 64); err != nil {
				return Data{}, fmt.Errorf("%s, column %s: %w", path, header[c], err)
			}
		}
		d.X, d.Y = append(d.X, row[:len(Features)]), append(d.Y, row[len(Features)])
	}
}

// Model is a fitted model.
type Model struct {
	mean, std []float64
	weights   []float64 // numeric features, then origins, then carriers, then the bias
	carriers  int       // rows of the carrier table that is written
}

// Fit maximises the likelihood with a small ridge penalty, by L-BFGS. tableSize is how many carriers the written model
// knows: 16 are all there are, and fewer make a model that fails on the rest.
func Fit(d Data, tableSize int) (Model, error) {
	if len(d.X) < 100 {
		return Model{}, fmt.Errorf("%d rows are too few to fit", len(d.X))
	}
	m := Model{mean: make([]float64, numeric), std: make([]float64, numeric), carriers: min(tableSize, carriers)}
	n := float64(len(d.X))
	for _, x := range d.X {
		for j := range numeric {
			m.mean[j] += x[j] / n
			m.std[j] += x[j] * x[j] / n
		}
	}
	for j := range numeric {
		m.std[j] = math.Sqrt(math.Max(m.std[j]-m.mean[j]*m.mean[j], 1e-6))
	}
	z := make([][]float64, len(d.X))
	for i, x := range d.X {
		z[i] = make([]float64, numeric)
		for j := range z[i] {
			z[i][j] = (x[j] - m.mean[j]) / m.std[j]
		}
	}
	problem := optimize.Problem{
		Func: func(w []float64) float64 { return loss(w, z, d, nil) },
		Grad: func(g, w []float64) { loss(w, z, d, g) },
	}
	start := make([]float64, numeric+origins+carriers+1)
	result, err := optimize.Minimize(problem, start, &optimize.Settings{MajorIterations: 200, GradientThreshold: 1e-4}, &optimize.LBFGS{})
	if err != nil && result == nil {
		return Model{}, fmt.Errorf("fit: %w", err)
	}
	m.weights = result.X
	return m, nil
}

// loss is the mean log loss with its ridge penalty; its gradient goes to g when that is not nil.
func loss(w []float64, z [][]float64, d Data, g []float64) float64 {
	for j := range g {
		g[j] = ridge * w[j]
	}
	total, n := 0.0, float64(len(z))
	for i := range z {
		o, c, bias := numeric+int(d.X[i][numeric]), numeric+origins+int(d.X[i][numeric+1]), len(w)-1
		s := w[bias] + w[o] + w[c]
		for j, v := range z[i] {
			s += w[j] * v
		}
		p := 1 / (1 + math.Exp(-s))
		total += logLoss(p, d.Y[i]) / n
		if g == nil {
			continue
		}
		e := (p - d.Y[i]) / n
		for j, v := range z[i] {
			g[j] += e * v
		}
		g[o] += e
		g[c] += e
		g[bias] += e
	}
	for _, v := range w {
		total += ridge * v * v / 2
	}
	return total
}

func logLoss(p, y float64) float64 {
	p = math.Min(math.Max(p, 1e-12), 1-1e-12)
	return -(y*math.Log(p) + (1-y)*math.Log(1-p))
}

// ONNX returns the model as a file: input "flight" [n, 10], output "late" [n, 1], a probability.
func (m Model) ONNX() []byte {
	w := m.weights
	return onnxfile.Build(onnxfile.Model{
		Name: "flights", Opset: 17, Metadata: map[string]string{"features": strings.Join(Features, ",")},
		Inputs:  []onnxfile.Value{{Name: "flight", Type: onnxfile.Float, Shape: []int64{-1, int64(len(Features))}}},
		Outputs: []onnxfile.Value{{Name: "late", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{
			onnxfile.Int64s("split", []int64{3}, []int64{numeric, 1, 1}),
			onnxfile.Floats("mean", []int64{numeric}, m.mean),
			onnxfile.Floats("std", []int64{numeric}, m.std),
			onnxfile.Floats("w", []int64{numeric, 1}, w[:numeric]),
			onnxfile.Floats("origins", []int64{origins}, w[numeric:numeric+origins]),
			onnxfile.Floats("carriers", []int64{int64(m.carriers)}, w[numeric+origins:numeric+origins+m.carriers]),
			onnxfile.Floats("bias", []int64{1}, w[len(w)-1:]),
		},
		Nodes: []onnxfile.Node{
			{Op: "Split", Inputs: []string{"flight", "split"}, Outputs: []string{"numbers", "origin_f", "carrier_f"}, Attributes: map[string]any{"axis": int64(1)}},
			{Op: "Sub", Inputs: []string{"numbers", "mean"}, Outputs: []string{"centred"}},
			{Op: "Div", Inputs: []string{"centred", "std"}, Outputs: []string{"z"}},
			{Op: "MatMul", Inputs: []string{"z", "w"}, Outputs: []string{"s0"}},
			{Op: "Cast", Inputs: []string{"origin_f"}, Outputs: []string{"origin_i"}, Attributes: map[string]any{"to": int64(onnxfile.Int64)}},
			{Op: "Gather", Inputs: []string{"origins", "origin_i"}, Outputs: []string{"s1"}},
			{Op: "Cast", Inputs: []string{"carrier_f"}, Outputs: []string{"carrier_i"}, Attributes: map[string]any{"to": int64(onnxfile.Int64)}},
			{Op: "Gather", Inputs: []string{"carriers", "carrier_i"}, Outputs: []string{"s2"}},
			{Op: "Add", Inputs: []string{"s0", "s1"}, Outputs: []string{"s3"}},
			{Op: "Add", Inputs: []string{"s3", "s2"}, Outputs: []string{"s4"}},
			{Op: "Add", Inputs: []string{"s4", "bias"}, Outputs: []string{"s5"}},
			{Op: "Sigmoid", Inputs: []string{"s5"}, Outputs: []string{"late"}},
		},
	})
}
