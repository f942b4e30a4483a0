package records

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"

	"github.com/parquet-go/parquet-go"

	"github.com/orrery-ml/orrery/registry"
)

// Table reads a CSV or Parquet file of numbers, some rows at a time.
type Table struct {
	names  []string
	next   func(columns []int, rows int) ([][]float64, error)
	closer io.Closer
}

// Open opens a file by its content: Parquet when it begins so, else CSV with a header. It ends in Invalid when the file
// is neither.
func Open(path string) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	head := make([]byte, 4)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, errors.Join(registry.Errorf(registry.Invalid, "the file is empty"), f.Close())
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	var t *Table
	if bytes.Equal(head, []byte("PAR1")) {
		t, err = openParquet(f)
	} else {
		t, err = openCSV(f)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	t.closer = f
	return t, nil
}

// Columns lists the columns.
func (t *Table) Columns() []string { return t.names }

// Close closes the file.
func (t *Table) Close() error { return t.closer.Close() }

// Find returns the positions of named columns. It ends in Invalid, naming those that are missing and what there is.
func (t *Table) Find(names []string) ([]int, error) {
	out := make([]int, len(names))
	var missing []string
	for i, name := range names {
		if out[i] = slices.Index(t.names, name); out[i] < 0 {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return nil, registry.Errorf(registry.Invalid, "the data has no column %v; it has %v", missing, t.names)
	}
	return out, nil
}

// Read returns up to rows rows of the columns, fewer at the end and none after it. Empty and non-numeric cells are NaN.
func (t *Table) Read(columns []int, rows int) ([][]float64, error) { return t.next(columns, rows) }

// Skip passes over rows.
func (t *Table) Skip(rows int64) error {
	for rows > 0 {
		got, err := t.next(nil, int(min(rows, 8192)))
		if err != nil {
			return err
		}
		if len(got) == 0 {
			return registry.Errorf(registry.Invalid, "the data has fewer rows than before")
		}
		rows -= int64(len(got))
	}
	return nil
}

// Count reads to the end and returns how many rows there are.
func (t *Table) Count() (int64, error) {
	var n int64
	for {
		got, err := t.next(nil, 8192)
		if err != nil || len(got) == 0 {
			return n, err
		}
		n += int64(len(got))
	}
}

func openCSV(f io.Reader) (*Table, error) {
	r := csv.NewReader(f)
	r.ReuseRecord = true
	header, err := r.Read()
	if err != nil {
		return nil, registry.Errorf(registry.Invalid, "CSV header: %w", err)
	}
	t := &Table{names: slices.Clone(header)}
	t.next = func(columns []int, rows int) ([][]float64, error) {
		var out [][]float64
		for len(out) < rows {
			record, err := r.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, registry.Errorf(registry.Invalid, "CSV: %w", err)
			}
			row := make([]float64, len(columns))
			for i, c := range columns {
				row[i] = number(record[c])
			}
			out = append(out, row)
		}
		return out, nil
	}
	return t, nil
}

func number(cell string) float64 {
	v, err := strconv.ParseFloat(cell, 64)
	if err != nil {
		return math.NaN()
	}
	return v
}

func openParquet(f *os.File) (*Table, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	file, err := parquet.OpenFile(f, info.Size())
	if err != nil {
		return nil, registry.Errorf(registry.Invalid, "Parquet: %w", err)
	}
	t := &Table{}
	for _, path := range file.Schema().Columns() {
		t.names = append(t.names, path[0])
	}
	reader := parquet.NewReader(file)
	buffer := make([]parquet.Row, 256)
	t.next = func(columns []int, rows int) ([][]float64, error) {
		var out [][]float64
		for len(out) < rows {
			n, err := reader.ReadRows(buffer[:min(len(buffer), rows-len(out))])
			for _, raw := range buffer[:n] {
				out = append(out, pick(raw, columns, len(t.names)))
			}
			if errors.Is(err, io.EOF) || (err == nil && n == 0) {
				break
			}
			if err != nil {
				return nil, registry.Errorf(registry.Invalid, "Parquet: %w", err)
			}
		}
		return out, nil
	}
	return t, nil
}

func pick(raw parquet.Row, columns []int, width int) []float64 {
	byColumn := make([]float64, width)
	for i := range byColumn {
		byColumn[i] = math.NaN()
	}
	for _, v := range raw {
		if c := v.Column(); c >= 0 && c < width {
			byColumn[c] = asFloat(v)
		}
	}
	out := make([]float64, len(columns))
	for i, c := range columns {
		out[i] = byColumn[c]
	}
	return out
}

func asFloat(v parquet.Value) float64 {
	if v.IsNull() {
		return math.NaN()
	}
	switch v.Kind() {
	case parquet.Boolean:
		if v.Boolean() {
			return 1
		}
		return 0
	case parquet.Int32:
		return float64(v.Int32())
	case parquet.Int64:
		return float64(v.Int64())
	case parquet.Float:
		return float64(v.Float())
	case parquet.Double:
		return v.Double()
	case parquet.ByteArray:
		return number(string(v.ByteArray()))
	default:
		return math.NaN()
	}
}

// Column is one column to write: its values are int64, float64 or string, by Kind.
type Column struct {
	Name string
	Kind parquet.Kind
}

// The kinds of columns.
const (
	Int   = parquet.Int64
	Float = parquet.Double
	Text  = parquet.ByteArray
)

// WriteParquet writes rows as a Parquet file with zstd. Values of a row stand in the order of columns.
func WriteParquet(w io.Writer, columns []Column, rows [][]any) error {
	group := parquet.Group{}
	for _, c := range columns {
		node := parquet.Leaf(parquet.DoubleType)
		switch c.Kind {
		case Int:
			node = parquet.Leaf(parquet.Int64Type)
		case Text:
			node = parquet.String()
		default: // Float
		}
		group[c.Name] = parquet.Compressed(node, &parquet.Zstd)
	}
	schema := parquet.NewSchema("orrery", group)
	at := map[string]int{}
	for i, path := range schema.Columns() {
		at[path[0]] = i
	}
	writer := parquet.NewWriter(w, schema)
	for _, row := range rows {
		raw := make(parquet.Row, len(columns))
		for i, c := range columns {
			raw[at[c.Name]] = parquet.ValueOf(row[i]).Level(0, 0, at[c.Name])
		}
		if _, err := writer.WriteRows([]parquet.Row{raw}); err != nil {
			return fmt.Errorf("write Parquet: %w", err)
		}
	}
	return writer.Close()
}
