// Command trainer trains the flights model. As a trainer of Orrery it reads ORRERY_TRAINING_DATA (CSV), writes
// model.onnx into ORRERY_OUTPUT_DIR, and takes the label's column from ORRERY_LABEL_COLUMN. By hand:
//
//	trainer -data examples/flights/data/winter.csv -out model.onnx [-rows 4000] [-carriers 16]
package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/orrery-ml/orrery/examples/flights/model"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "trainer:", err)
		os.Exit(1)
	}
}

func run() error {
	data := flag.String("data", os.Getenv("ORRERY_TRAINING_DATA"), "CSV file with the features and the label")
	out := flag.String("out", filepath.Join(os.Getenv("ORRERY_OUTPUT_DIR"), "model.onnx"), "where to write the model")
	rows := flag.Int("rows", 0, "use the first rows only; 0 = all")
	carriers := flag.Int("carriers", 16, "carriers the model knows; it fails on the others")
	flag.Parse()
	d, err := model.Read(*data, cmp.Or(os.Getenv("ORRERY_LABEL_COLUMN"), model.Label))
	if err != nil {
		return err
	}
	if *rows > 0 && *rows < len(d.X) {
		d.X, d.Y = d.X[:*rows], d.Y[:*rows]
	}
	m, err := model.Fit(d, *carriers)
	if err != nil {
		return err
	}
	fmt.Printf("fitted %d rows\n", len(d.X))
	return os.WriteFile(*out, m.ONNX(), 0o644) //nolint:gosec // a model is no secret
}
