package engine

import (
	"fmt"
	"slices"
	"strings"

	"github.com/orrery-ml/orrery/registry"
)

// CheckInputs returns the inputs in the signature's order and the number of rows they carry (1 for a model without a
// batch dimension; 0 is legal). It ends in Invalid, naming the input, what is expected and what came.
func CheckInputs(s registry.Signature, inputs []Tensor) (ordered []Tensor, rows int64, err error) {
	ordered = make([]Tensor, len(s.Inputs))
	given := make([]bool, len(s.Inputs))
	for _, in := range inputs {
		i := slices.IndexFunc(s.Inputs, func(t registry.Tensor) bool { return t.Name == in.Name })
		switch {
		case i < 0:
			return nil, 0, registry.Errorf(registry.Invalid, "unknown input %q: the model takes %s", in.Name, strings.Join(registry.TensorNames(s.Inputs), ", "))
		case given[i]:
			return nil, 0, registry.Errorf(registry.Invalid, "input %q is given twice", in.Name)
		}
		if err := checkInput(s.Inputs[i], in); err != nil {
			return nil, 0, err
		}
		ordered[i], given[i] = in, true
	}
	rows = 1
	for i, want := range s.Inputs {
		if !given[i] {
			return nil, 0, registry.Errorf(registry.Invalid, "input %q is missing: want %s of shape %v", want.Name, want.Datatype, want.Shape)
		}
		if !s.Batched {
			continue
		}
		switch n := ordered[i].Shape[0]; {
		case i == 0:
			rows = n
		case n != rows:
			return nil, 0, registry.Errorf(registry.Invalid, "input %q has %d rows, input %q has %d", want.Name, n, s.Inputs[0].Name, rows)
		}
	}
	return ordered, rows, nil
}

func checkInput(want registry.Tensor, got Tensor) error {
	if got.Datatype != want.Datatype {
		return registry.Errorf(registry.Invalid, "input %q: expected %s, got %s", want.Name, want.Datatype, got.Datatype)
	}
	if !registry.ShapeFits(got.Shape, want.Shape) {
		return registry.Errorf(registry.Invalid, "input %q: expected shape %v (-1 is any), got %v", want.Name, want.Shape, got.Shape)
	}
	for _, d := range got.Shape {
		if d < 0 {
			return registry.Errorf(registry.Invalid, "input %q: shape %v has a negative dimension", want.Name, got.Shape)
		}
	}
	return nil
}

// SelectOutputs returns the named outputs in the order asked for, or all of them. It ends in Invalid.
func SelectOutputs(s registry.Signature, names []string) ([]int, error) {
	if len(names) == 0 {
		all := make([]int, len(s.Outputs))
		for i := range all {
			all[i] = i
		}
		return all, nil
	}
	picked := make([]int, 0, len(names))
	for _, name := range names {
		i := slices.IndexFunc(s.Outputs, func(t registry.Tensor) bool { return t.Name == name })
		if i < 0 {
			return nil, registry.Errorf(registry.Invalid, "unknown output %q: the model gives %s", name, strings.Join(registry.TensorNames(s.Outputs), ", "))
		}
		picked = append(picked, i)
	}
	return picked, nil
}

// shapeKey tells which requests may share a batch: those whose inputs agree but for the rows.
func shapeKey(inputs []Tensor) string {
	var b strings.Builder
	for _, in := range inputs {
		fmt.Fprint(&b, in.Shape[min(1, len(in.Shape)):])
	}
	return b.String()
}
