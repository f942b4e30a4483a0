package activities

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
)

// BatchPlan is what a batch job will do: rows of an input, cut into partitions, scored by one version.
type BatchPlan struct {
	RunID      string `json:"run_id"`
	Model      string `json:"model"`
	Version    int    `json:"version"`
	Input      string `json:"input"`  // key in the object store
	Output     string `json:"output"` // prefix in the object store
	Rows       int64  `json:"rows"`
	PerPart    int64  `json:"per_part"`
	Partitions int    `json:"partitions"`
	SHA256     string `json:"sha256"` // of the input: every partition reads the same bytes
}

// PlanBatchInput asks for a plan. Version 0 is the champion.
type PlanBatchInput struct {
	RunID   string `json:"run_id"`
	Model   string `json:"model"`
	Version int    `json:"version"`
	Input   string `json:"input"`
	Output  string `json:"output"`
	PerPart int64  `json:"per_part"`
}

// PlanBatch fixes the version, counts the rows and cuts them into partitions. It ends in Invalid when the input lacks a
// feature of the model.
func (a *Data) PlanBatch(ctx context.Context, in PlanBatchInput) (BatchPlan, error) {
	plan := BatchPlan{RunID: in.RunID, Model: in.Model, Version: in.Version, Input: in.Input, Output: in.Output, PerPart: in.PerPart}
	if plan.Version == 0 {
		v, err := a.champion(ctx, in.Model)
		if err != nil {
			return plan, Fault(err)
		}
		plan.Version = v.Number
	}
	v, err := a.store.Version(ctx, in.Model, plan.Version)
	if err != nil {
		return plan, Fault(err)
	}
	if _, err := tabular(v.Signature); err != nil {
		return plan, Fault(err)
	}
	path := filepath.Join(a.scratch, "plan-"+in.RunID)
	defer func() { _ = os.Remove(path) }() // scratch
	stop := keepAlive(ctx)
	defer stop()
	if err := a.fetchObject(ctx, in.Input, path); err != nil {
		return plan, Fault(err)
	}
	plan.SHA256 = registry.FileSHA256(path)
	t, err := records.Open(path)
	if err != nil {
		return plan, Fault(err)
	}
	defer func() { _ = t.Close() }() // opened for reading
	if _, err := t.Find(v.Signature.Inputs[0].Features); err != nil {
		return plan, Fault(err)
	}
	if plan.Rows, err = t.Count(); err != nil {
		return plan, Fault(err)
	}
	if plan.Rows == 0 {
		return plan, Fault(registry.Errorf(registry.Invalid, "%s has no rows", in.Input))
	}
	plan.Partitions = int((plan.Rows + plan.PerPart - 1) / plan.PerPart)
	return plan, nil
}

// tabular returns the width of the model's only input, a matrix of FP32 with named features. It ends in Invalid.
func tabular(s registry.Signature) (int, error) {
	if len(s.Inputs) != 1 || !s.Batched || len(s.Inputs[0].Shape) != 2 || s.Inputs[0].Datatype != registry.FP32 || len(s.Inputs[0].Features) == 0 {
		return 0, registry.Errorf(registry.Invalid, "batch scoring takes models with one FP32 matrix whose features are named in the ONNX metadata property \"features\"")
	}
	return len(s.Inputs[0].Features), nil
}

// PartitionInput names one partition of a plan.
type PartitionInput struct {
	Plan  BatchPlan `json:"plan"`
	Index int       `json:"index"`
}

// PartitionResult is where a partition's results lie and how many rows they are.
type PartitionResult struct {
	Index  int    `json:"index"`
	Key    string `json:"key"`
	Rows   int64  `json:"rows"`
	Failed int64  `json:"failed"`
	Errors string `json:"errors,omitempty"`
}

// scoreRows is how many rows one run of the session takes.
const scoreRows = 1024

// ScorePartition scores one partition and writes its results under a key that depends on the input, the version and the
// partition alone, so that a repeat writes the same object again.
func (a *Data) ScorePartition(ctx context.Context, in PartitionInput) (PartitionResult, error) {
	out := PartitionResult{Index: in.Index, Key: partKey(in.Plan, in.Index, "part")}
	stop, err := survive(ctx, fmt.Sprintf("partition %d of %s", in.Index, in.Plan.Input))
	if err != nil {
		return out, Fault(err)
	}
	defer stop()
	v, err := a.store.Version(ctx, in.Plan.Model, in.Plan.Version)
	if err != nil {
		return out, Fault(err)
	}
	path := filepath.Join(a.scratch, "input-"+in.Plan.SHA256)
	if registry.FileSHA256(path) != in.Plan.SHA256 {
		tmp := fmt.Sprintf("%s-%s-%d", path, in.Plan.RunID, in.Index)
		if err := a.fetchObject(ctx, in.Plan.Input, tmp); err != nil {
			return out, Fault(err)
		}
		if registry.FileSHA256(tmp) != in.Plan.SHA256 {
			return out, Fault(registry.Errorf(registry.Conflict, "input %s changed while it was scored", in.Plan.Input))
		}
		if err := os.Rename(tmp, path); err != nil {
			return out, Fault(err)
		}
	}
	session, err := a.openVersion(ctx, v)
	if err != nil {
		return out, Fault(err)
	}
	defer func() { _ = session.Close() }() // nothing runs any more
	return a.score(ctx, in, path, session, out)
}

func partKey(p BatchPlan, index int, kind string) string {
	return fmt.Sprintf("%s%s-%05d-%.12s-v%d.parquet", p.Output, kind, index, p.SHA256, p.Version)
}

func (a *Data) score(ctx context.Context, in PartitionInput, path string, session engine.Session, out PartitionResult) (PartitionResult, error) {
	t, err := records.Open(path)
	if err != nil {
		return out, Fault(err)
	}
	defer func() { _ = t.Close() }() // opened for reading
	columns, err := t.Find(session.Signature().Inputs[0].Features)
	if err != nil {
		return out, Fault(err)
	}
	first := int64(in.Index) * in.Plan.PerPart
	if err := t.Skip(first); err != nil {
		return out, Fault(err)
	}
	var good, bad [][]any
	for left := min(in.Plan.PerPart, in.Plan.Rows-first); left > 0; {
		rows, err := t.Read(columns, int(min(left, scoreRows)))
		if err != nil || len(rows) == 0 {
			return out, Fault(errorsOr(err, "the input has fewer rows than planned"))
		}
		scored, failed, err := scoreChunk(ctx, session, rows, first)
		if err != nil {
			return out, Fault(err)
		}
		good, bad = append(good, scored...), append(bad, failed...)
		first += int64(len(rows))
		left -= int64(len(rows))
	}
	return a.writePartition(ctx, in, good, bad, out)
}

func errorsOr(err error, text string) error {
	if err != nil {
		return err
	}
	return registry.Errorf(registry.Invalid, "%s", text)
}

func (a *Data) writePartition(ctx context.Context, in PartitionInput, good, bad [][]any, out PartitionResult) (PartitionResult, error) {
	out.Rows, out.Failed = int64(len(good)), int64(len(bad))
	if len(good) > 0 {
		columns := []records.Column{{Name: "row", Kind: records.Int}}
		for i := range len(good[0]) - 1 {
			columns = append(columns, records.Column{Name: fmt.Sprintf("score_%d", i), Kind: records.Float})
		}
		if err := a.putTable(ctx, out.Key, columns, good); err != nil {
			return out, Fault(err)
		}
	}
	if len(bad) > 0 {
		out.Errors = partKey(in.Plan, in.Index, "errors/part")
		if err := a.putTable(ctx, out.Errors, []records.Column{{Name: "row", Kind: records.Int}, {Name: "error", Kind: records.Text}}, bad); err != nil {
			return out, Fault(err)
		}
	}
	return out, nil
}

func (a *Data) putTable(ctx context.Context, key string, columns []records.Column, rows [][]any) error {
	var b bytes.Buffer
	if err := records.WriteParquet(&b, columns, rows); err != nil {
		return err
	}
	return a.objects.Put(ctx, key, &b, int64(b.Len()))
}

// scoreChunk scores rows; when the run fails, it scores them one by one to find out which are to blame.
func scoreChunk(ctx context.Context, session engine.Session, rows [][]float64, first int64) (good, bad [][]any, err error) {
	scores, err := Score(ctx, session, rows)
	if err == nil {
		for i, s := range scores {
			good = append(good, scoredRow(first+int64(i), s))
		}
		return good, nil, nil
	}
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	for i := range rows {
		one, err := Score(ctx, session, rows[i:i+1])
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		if err != nil {
			bad = append(bad, []any{first + int64(i), err.Error()})
			continue
		}
		good = append(good, scoredRow(first+int64(i), one[0]))
	}
	return good, bad, nil
}

func scoredRow(row int64, scores []float64) []any {
	out := []any{row}
	for _, s := range scores {
		out = append(out, s)
	}
	return out
}

// Score runs a tabular model on rows and returns, for each, the elements of its first output.
func Score(ctx context.Context, session engine.Session, rows [][]float64) ([][]float64, error) {
	width, err := tabular(session.Signature())
	if err != nil {
		return nil, err
	}
	data := make([]byte, 0, 4*width*len(rows))
	for _, row := range rows {
		for _, v := range row {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(float32(v)))
		}
	}
	in := session.Signature().Inputs[0]
	answer, err := session.Run(ctx, []engine.Tensor{{Name: in.Name, Datatype: in.Datatype, Shape: []int64{int64(len(rows)), int64(width)}, Data: data}})
	if err != nil {
		return nil, err
	}
	values, err := numbers(answer[0])
	if err != nil {
		return nil, err
	}
	per := len(values) / len(rows)
	return slices.Collect(slices.Chunk(values, max(per, 1))), nil
}

func numbers(t engine.Tensor) ([]float64, error) {
	var out []float64
	switch t.Datatype {
	case registry.FP32:
		for i := 0; i+4 <= len(t.Data); i += 4 {
			out = append(out, float64(math.Float32frombits(binary.LittleEndian.Uint32(t.Data[i:]))))
		}
	case registry.FP64:
		for i := 0; i+8 <= len(t.Data); i += 8 {
			out = append(out, math.Float64frombits(binary.LittleEndian.Uint64(t.Data[i:])))
		}
	case registry.Int64:
		for i := 0; i+8 <= len(t.Data); i += 8 {
			out = append(out, float64(int64(binary.LittleEndian.Uint64(t.Data[i:])))) //nolint:gosec // the bits are kept
		}
	default:
		return nil, registry.Errorf(registry.Invalid, "output %q is %s; batch scoring takes FP32, FP64 and INT64", t.Name, t.Datatype)
	}
	return out, nil
}

// CommitInput are the partitions of a plan that were scored.
type CommitInput struct {
	Plan  BatchPlan         `json:"plan"`
	Parts []PartitionResult `json:"parts"`
}

// BatchManifest is written last; readers trust it alone.
type BatchManifest struct {
	Plan      BatchPlan         `json:"plan"`
	Rows      int64             `json:"rows"`
	Failed    int64             `json:"failed"`
	Parts     []PartitionResult `json:"parts"`
	Committed time.Time         `json:"committed"`
}

// ManifestName is the name of the manifest below a batch job's output.
const ManifestName = "_manifest.json"

// CommitBatch verifies that every row is accounted for once and publishes the manifest.
func (a *Data) CommitBatch(ctx context.Context, in CommitInput) (BatchManifest, error) {
	m := BatchManifest{Plan: in.Plan, Parts: slices.SortedFunc(slices.Values(in.Parts), func(a, b PartitionResult) int { return a.Index - b.Index }), Committed: time.Now().UTC()}
	for i, p := range m.Parts {
		if p.Index != i {
			return m, Fault(registry.Errorf(registry.Conflict, "partition %d is there twice or missing", i))
		}
		m.Rows += p.Rows
		m.Failed += p.Failed
		if p.Rows > 0 {
			if _, err := a.objects.Stat(ctx, p.Key); err != nil {
				return m, Fault(err)
			}
		}
	}
	if len(m.Parts) != in.Plan.Partitions || m.Rows+m.Failed != in.Plan.Rows {
		return m, Fault(registry.Errorf(registry.Conflict, "%d rows of %d in %d partitions of %d", m.Rows+m.Failed, in.Plan.Rows, len(m.Parts), in.Plan.Partitions))
	}
	return m, Fault(records.WriteJSON(ctx, a.objects, in.Plan.Output+ManifestName, m))
}
