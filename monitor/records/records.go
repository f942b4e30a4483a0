package records

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/parquet-go/parquet-go"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// Prefixes in the object store. Below them: model=M/version=V/date=D/hour=H/{from}-{to}-{writer}-{n}, where from and to
// are Unix microseconds of the first and the last request in the file.
const (
	RecordPrefix  = "records/"
	ProfilePrefix = "profiles/"
	LabelPrefix   = "labels/"
)

// Slice is a span of time of a model's traffic below a prefix. Version 0 is every version.
type Slice struct {
	Prefix  string
	Model   string
	Version int
	From    time.Time
	To      time.Time
}

// Key returns the key of the n-th file of a writer, with what happened in the slice.
func (s Slice) Key(writer string, n int64, extension string) string {
	first := s.From.UTC()
	return fmt.Sprintf("%smodel=%s/version=%d/date=%s/hour=%02d/%d-%d-%s-%d.%s", s.Prefix, s.Model, s.Version, first.Format(time.DateOnly),
		first.Hour(), first.UnixMicro(), s.To.UnixMicro(), writer, n, extension)
}

// span reads the times out of a key.
func span(key string) (first, last time.Time, ok bool) {
	parts := strings.SplitN(key[strings.LastIndexByte(key, '/')+1:], "-", 3)
	if len(parts) < 3 {
		return first, last, false
	}
	a, errA := strconv.ParseInt(parts[0], 10, 64)
	b, errB := strconv.ParseInt(parts[1], 10, 64)
	return time.UnixMicro(a), time.UnixMicro(b), errA == nil && errB == nil
}

// Window lists the keys of the files that begin in [s.From, s.To).
func Window(ctx context.Context, o registry.Objects, s Slice) ([]string, error) {
	under := s.Prefix + "model=" + s.Model + "/"
	if s.Version > 0 {
		under += fmt.Sprintf("version=%d/", s.Version)
	}
	var keys []string
	for obj, err := range o.List(ctx, under) {
		if err != nil {
			return nil, err
		}
		if first, _, ok := span(obj.Key); ok && !first.Before(s.From) && first.Before(s.To) {
			keys = append(keys, obj.Key)
		}
	}
	return keys, nil
}

// Profiles is a file of profiles: what one gateway saw of one version for a while.
type Profiles struct {
	Model    string                     `json:"model"`
	Version  int                        `json:"version"`
	Rows     int64                      `json:"rows"`
	Features map[string]monitor.Profile `json:"features"`
}

// MergeProfiles adds up the profiles of a slice; its prefix is always ProfilePrefix.
func MergeProfiles(ctx context.Context, o registry.Objects, s Slice) (Profiles, error) {
	s.Prefix = ProfilePrefix
	keys, err := Window(ctx, o, s)
	if err != nil {
		return Profiles{}, err
	}
	out := Profiles{Model: s.Model, Version: s.Version, Features: map[string]monitor.Profile{}}
	for _, key := range keys {
		var part Profiles
		if err := ReadJSON(ctx, o, key, &part); err != nil {
			return out, err
		}
		out.Rows += part.Rows
		for name, p := range part.Features {
			sum := out.Features[name]
			sum.Merge(p)
			out.Features[name] = sum
		}
	}
	return out, nil
}

// Record is one row of inference, as it is recorded.
type Record struct {
	ID       string // of the inference; labels are joined by it
	At       time.Time
	Version  int
	Role     string
	Features []float64
	Outputs  []float64 // the first row-wise output, flattened
}

// Columns before the features (f_…) and outputs (o_…).
const (
	idColumn      = "inference_id"
	timeColumn    = "ts_us"
	versionColumn = "version"
	roleColumn    = "role"
)

// EncodeRecords writes records as Parquet.
func EncodeRecords(features []string, records []Record) ([]byte, error) {
	columns := []Column{{idColumn, Text}, {timeColumn, Int}, {versionColumn, Int}, {roleColumn, Text}}
	for _, f := range features {
		columns = append(columns, Column{"f_" + f, Float})
	}
	for i := range records[0].Outputs {
		columns = append(columns, Column{fmt.Sprintf("o_%d", i), Float})
	}
	rows := make([][]any, len(records))
	for i, r := range records {
		row := []any{r.ID, r.At.UnixMicro(), int64(r.Version), r.Role}
		for _, v := range r.Features {
			row = append(row, v)
		}
		for _, v := range r.Outputs {
			row = append(row, v)
		}
		rows[i] = row
	}
	var b bytes.Buffer
	err := WriteParquet(&b, columns, rows)
	return b.Bytes(), err
}

// ReadRecords calls f with the id and the features of every record in a file, in the order of names.
func ReadRecords(ctx context.Context, o registry.Objects, key string, names []string, f func(id string, features []float64)) error {
	file, err := readParquet(ctx, o, key)
	if err != nil {
		return err
	}
	at := columnsOf(file)
	columns := make([]int, len(names))
	for i, name := range names {
		c, ok := at["f_"+name]
		if !ok {
			return registry.Errorf(registry.Invalid, "%s has no column f_%s", key, name)
		}
		columns[i] = c
	}
	return eachRow(file, func(row parquet.Row) {
		f(string(row[at[idColumn]].ByteArray()), pick(row, columns, len(at)))
	})
}

// ReadOutputs calls f with the id, the version and the outputs of every record in a file.
func ReadOutputs(ctx context.Context, o registry.Objects, key string, f func(id string, version int, outputs []float64)) error {
	file, err := readParquet(ctx, o, key)
	if err != nil {
		return err
	}
	at := columnsOf(file)
	var columns []int
	for i := 0; ; i++ {
		c, ok := at[fmt.Sprintf("o_%d", i)]
		if !ok {
			break
		}
		columns = append(columns, c)
	}
	return eachRow(file, func(row parquet.Row) {
		f(string(row[at[idColumn]].ByteArray()), int(row[at[versionColumn]].Int64()), pick(row, columns, len(at)))
	})
}

// Label is the later-known truth for an inference.
type Label struct {
	ID    string
	Value float64
}

// EncodeLabels writes labels as Parquet.
func EncodeLabels(labels []Label, received time.Time) ([]byte, error) {
	rows := make([][]any, len(labels))
	for i, l := range labels {
		rows[i] = []any{l.ID, l.Value, received.UnixMicro()}
	}
	var b bytes.Buffer
	err := WriteParquet(&b, []Column{{idColumn, Text}, {"label", Float}, {"received_us", Int}}, rows)
	return b.Bytes(), err
}

// ReadLabels reads a file of labels into a map by inference id.
func ReadLabels(ctx context.Context, o registry.Objects, key string, into map[string]float64) error {
	file, err := readParquet(ctx, o, key)
	if err != nil {
		return err
	}
	at := columnsOf(file)
	return eachRow(file, func(row parquet.Row) {
		into[string(row[at[idColumn]].ByteArray())] = row[at["label"]].Double()
	})
}

// columnsOf returns where each column stands.
func columnsOf(file *parquet.File) map[string]int {
	at := map[string]int{}
	for i, path := range file.Schema().Columns() {
		at[path[0]] = i
	}
	return at
}

func readParquet(ctx context.Context, o registry.Objects, key string) (*parquet.File, error) {
	raw, err := ReadAll(ctx, o, key)
	if err != nil {
		return nil, err
	}
	file, err := parquet.OpenFile(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		return nil, registry.Errorf(registry.Corrupt, "%s: %w", key, err)
	}
	return file, nil
}

func eachRow(file *parquet.File, f func(parquet.Row)) error {
	reader := parquet.NewReader(file)
	buffer := make([]parquet.Row, 256)
	for {
		n, err := reader.ReadRows(buffer)
		for _, row := range buffer[:n] {
			f(row)
		}
		if errors.Is(err, io.EOF) || (err == nil && n == 0) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// ReadAll reads a small object.
func ReadAll(ctx context.Context, o registry.Objects, key string) ([]byte, error) {
	body, err := o.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(body)
	return raw, errors.Join(err, body.Close())
}

// ReadJSON reads a small object as JSON.
func ReadJSON(ctx context.Context, o registry.Objects, key string, into any) error {
	raw, err := ReadAll(ctx, o, key)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return registry.Errorf(registry.Corrupt, "%s: %w", key, err)
	}
	return nil
}

// WriteJSON writes a small object as JSON.
func WriteJSON(ctx context.Context, o registry.Objects, key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return o.Put(ctx, key, bytes.NewReader(raw), int64(len(raw)))
}
