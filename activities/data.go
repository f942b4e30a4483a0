package activities

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
)

// Prefixes of the object store that runs write to, beside those of package records.
const (
	DataPrefix  = "data/"  // uploaded by users
	BatchPrefix = "batch/" // results of batch jobs
	DriftPrefix = "drift/" // drift reports
)

// dataStore is the part of the registry that reads and writes of data need.
type dataStore interface {
	registry.Versions
	registry.Routes
	registry.Runs
	registry.EvidenceLog
	Model(ctx context.Context, name string) (registry.Model, error)
}

// Data works on tables: baselines, batch scoring, drift, snapshots. It runs in the data process.
type Data struct {
	store   dataStore
	objects registry.Objects
	runtime engine.Runtime
	scratch string
}

// NewData makes the activities. runtime is nil where there is no ONNX Runtime; what scores then ends in Unsupported.
func NewData(s dataStore, o registry.Objects, runtime engine.Runtime, scratch string) *Data {
	return &Data{store: s, objects: o, runtime: runtime, scratch: scratch}
}

// BuildBaselineInput names the version and what was derived of it so far.
type BuildBaselineInput struct {
	Model   string           `json:"model"`
	Version int              `json:"version"`
	Derived registry.Derived `json:"derived"`
}

// BuildBaselineResult is the baseline's digest.
type BuildBaselineResult struct {
	Baseline string `json:"baseline"`
}

// BuildBaseline summarises the training data: frozen edges and a profile of every feature. It ends in Invalid when the
// data lacks a feature, or the model's features have no names.
func (a *Data) BuildBaseline(ctx context.Context, in BuildBaselineInput) (BuildBaselineResult, error) {
	if len(in.Derived.Signature.Inputs) != 1 || len(in.Derived.Signature.Inputs[0].Features) == 0 {
		return BuildBaselineResult{}, Fault(registry.Errorf(registry.Invalid,
			"training data was given, but the model does not name its features: put their names, comma-separated, into the ONNX metadata property \"features\""))
	}
	names := in.Derived.Signature.Inputs[0].Features
	path := filepath.Join(a.scratch, "training-"+in.Derived.Documents.TrainingData)
	defer func() { _ = os.Remove(path) }() // scratch
	if err := registry.FetchBlob(ctx, a.objects, in.Derived.Documents.TrainingData, path); err != nil {
		return BuildBaselineResult{}, Fault(err)
	}
	rows, err := readRows(path, names)
	if err != nil {
		return BuildBaselineResult{}, Fault(err)
	}
	activity.RecordHeartbeat(ctx, len(rows))
	columns := make([][]float64, len(names))
	for i := range names {
		columns[i] = make([]float64, len(rows))
		for r, row := range rows {
			columns[i][r] = asServed(in.Derived.Signature.Inputs[0].Datatype, row[i])
		}
	}
	digest, err := a.putBlob(ctx, marshal(monitor.BuildBaseline(names, columns)))
	return BuildBaselineResult{Baseline: digest}, Fault(err)
}

// asServed rounds a value as the model's input does. Without it a value on a bin's edge would fall on different sides
// of it in training and in traffic, which looks like drift.
func asServed(d registry.Datatype, v float64) float64 {
	if d == registry.FP32 {
		return float64(float32(v))
	}
	return v
}

// maxBaselineRows bounds the memory of a baseline; more rows are not read, and a million are plenty for 50 bins.
const maxBaselineRows = 1_000_000

func readRows(path string, names []string) ([][]float64, error) {
	t, err := records.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = t.Close() }() // opened for reading
	columns, err := t.Find(names)
	if err != nil {
		return nil, err
	}
	rows, err := t.Read(columns, maxBaselineRows)
	if err == nil && len(rows) == 0 {
		err = registry.Errorf(registry.Invalid, "the data has no rows")
	}
	return rows, err
}

func (a *Data) putBlob(ctx context.Context, raw []byte) (string, error) {
	sum := sha256.Sum256(raw)
	digest := hex.EncodeToString(sum[:])
	return digest, registry.PutBlob(ctx, a.objects, digest, int64(len(raw)), bytes.NewReader(raw))
}

// CompareWindowInput asks how far a window of traffic is from the training data.
type CompareWindowInput struct {
	RunID  string              `json:"run_id"`
	Model  string              `json:"model"`
	From   time.Time           `json:"from"`
	To     time.Time           `json:"to"`
	Config monitor.DriftConfig `json:"config"`
}

// CompareWindowResult is the report in short, and where it lies.
type CompareWindowResult struct {
	Version  int                 `json:"version"`
	Status   monitor.DriftStatus `json:"status"`
	Rows     int64               `json:"rows"`
	Share    float64             `json:"share"`
	Drifted  []string            `json:"drifted,omitempty"`
	Report   string              `json:"report"`
	WorstPSI float64             `json:"worst_psi"`
	Worst    string              `json:"worst"`
}

// CompareWindow merges the champion's profiles of a window and compares them with its baseline.
func (a *Data) CompareWindow(ctx context.Context, in CompareWindowInput) (CompareWindowResult, error) {
	v, err := a.champion(ctx, in.Model)
	if err != nil {
		return CompareWindowResult{}, Fault(err)
	}
	if v.Documents.Baseline == "" {
		return CompareWindowResult{}, Fault(registry.Errorf(registry.Precondition,
			"version %d of %s has no baseline: register it with its training data", v.Number, v.Model))
	}
	var b monitor.Baseline
	if err := records.ReadJSON(ctx, a.objects, registry.BlobKey(v.Documents.Baseline), &b); err != nil {
		return CompareWindowResult{}, Fault(err)
	}
	window, err := records.MergeProfiles(ctx, a.objects, records.Slice{Model: in.Model, Version: v.Number, From: in.From, To: in.To})
	if err != nil {
		return CompareWindowResult{}, Fault(err)
	}
	report := monitor.CheckDrift(b, window.Features, in.Config)
	out := CompareWindowResult{
		Version: v.Number, Status: report.Status, Rows: window.Rows, Share: report.Share, Report: DriftPrefix + in.Model + "/" + in.RunID + ".json",
	}
	for _, f := range report.Features {
		if f.Status == monitor.Drift {
			out.Drifted = append(out.Drifted, f.Name)
		}
		if f.PSI > out.WorstPSI {
			out.Worst, out.WorstPSI = f.Name, f.PSI
		}
	}
	if err := records.WriteJSON(ctx, a.objects, out.Report, report); err != nil {
		return out, Fault(err)
	}
	return out, Fault(a.store.AddEvidence(ctx, registry.Evidence{Run: in.RunID, Seq: 1, At: time.Now(), Verdict: string(report.Status), Body: marshal(report)}))
}

// champion returns the version of the stable arm.
func (a *Data) champion(ctx context.Context, model string) (registry.Version, error) {
	route, err := a.store.Route(ctx, model)
	if err != nil {
		return registry.Version{}, err
	}
	if route.StableVersion() == 0 {
		return registry.Version{}, registry.Errorf(registry.Precondition, "model %s serves nothing yet", model)
	}
	return a.store.Version(ctx, model, route.StableVersion())
}

// fetchObject copies an object to a file.
func (a *Data) fetchObject(ctx context.Context, key, path string) error {
	body, err := a.objects.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("input %s: %w", key, err)
	}
	f, err := os.Create(path)
	if err != nil {
		return errors.Join(err, body.Close())
	}
	_, err = io.Copy(f, body)
	return errors.Join(err, body.Close(), f.Close())
}

// openVersion fetches a version and opens a session on it.
func (a *Data) openVersion(ctx context.Context, v registry.Version) (engine.Session, error) {
	if a.runtime == nil {
		return nil, registry.Errorf(registry.Unsupported, "this process has no ONNX Runtime: start an orchestrator with the queue data where it is installed")
	}
	dir := filepath.Join(a.scratch, "version-"+v.Digest)
	if err := registry.FetchVersion(ctx, a.objects, v.Manifest, dir); err != nil {
		return nil, err
	}
	entry, err := v.Manifest.Entry()
	if err != nil {
		return nil, err
	}
	return a.runtime.Open(filepath.Join(dir, filepath.FromSlash(entry)), v.Signature, engine.Options{Provider: "cpu", Threads: 1})
}
