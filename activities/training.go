package activities

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/cespare/xxhash/v2"
	"go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
)

// Trainer is a program, named in the orchestrator's configuration, that turns data into model files. It is run with
// ORRERY_TRAINING_DATA (a CSV file), ORRERY_LABEL_COLUMN and ORRERY_OUTPUT_DIR, where it leaves model.onnx.
type Trainer struct {
	Command []string          `yaml:"command"`
	Env     map[string]string `yaml:"env"` // added to an environment that is otherwise empty
	Timeout time.Duration     `yaml:"timeout"`
}

// Training trains challengers and compares them.
type Training struct {
	data     *Data
	temporal client.Client
	trainers map[string]Trainer
}

// NewTraining makes the activities.
func NewTraining(d *Data, c client.Client, trainers map[string]Trainer) *Training {
	return &Training{data: d, temporal: c, trainers: trainers}
}

// RetrainTrigger says why a model should be trained again.
type RetrainTrigger struct {
	Source string  `json:"source"` // drift, manual or schedule
	Run    string  `json:"run"`
	Share  float64 `json:"share"` // of drifted features
	Reason string  `json:"reason"`
}

// TriggerRetrainInput says whom to tell what: the workflow is started when it does not run.
type TriggerRetrainInput struct {
	Model      string         `json:"model"`
	Trigger    RetrainTrigger `json:"trigger"`
	WorkflowID string         `json:"workflow_id"`
	Workflow   string         `json:"workflow"`
	Signal     string         `json:"signal"`
	Queue      string         `json:"queue"`
	Input      any            `json:"input"`
}

// TriggerRetrain tells a model's retrain policy of a trigger. A repeat is told again; the policy's cool-down absorbs it.
func (a *Training) TriggerRetrain(ctx context.Context, in TriggerRetrainInput) error {
	_, err := a.temporal.SignalWithStartWorkflow(ctx, in.WorkflowID, in.Signal, in.Trigger, client.StartWorkflowOptions{
		ID: in.WorkflowID, TaskQueue: in.Queue, StaticSummary: "retrain policy of " + in.Model,
	}, in.Workflow, in.Input)
	return Fault(err)
}

// DecideRetrainInput is what a policy decides on.
type DecideRetrainInput struct {
	PolicyRun string         `json:"policy_run"`
	Seq       int            `json:"seq"`
	Model     string         `json:"model"`
	Trigger   RetrainTrigger `json:"trigger"`
	Started   []time.Time    `json:"started"` // of earlier retrainings
	Now       time.Time      `json:"now"`
}

// DecideRetrainResult is the decision with its reason, and the policy it was made under.
type DecideRetrainResult struct {
	Go     bool                   `json:"go"`
	Reason string                 `json:"reason"`
	Policy registry.RetrainPolicy `json:"policy"`
}

// DecideRetrain applies the model's policy to a trigger and keeps the decision as evidence, so that "why did it not
// retrain" has an answer.
func (a *Training) DecideRetrain(ctx context.Context, in DecideRetrainInput) (DecideRetrainResult, error) {
	m, err := a.data.store.Model(ctx, in.Model)
	if err != nil {
		return DecideRetrainResult{}, Fault(err)
	}
	open, err := a.data.store.ListRuns(ctx, registry.RunFilter{Model: in.Model, Kind: registry.KindRollout, Open: true})
	if err != nil {
		return DecideRetrainResult{}, Fault(err)
	}
	out := DecideRetrainResult{Policy: m.Retrain}
	out.Go, out.Reason = decideRetrain(m.Retrain, in, len(open))
	verdict := "suppressed"
	if out.Go {
		verdict = "started"
	}
	return out, Fault(a.data.store.AddEvidence(ctx, registry.Evidence{
		Run: in.PolicyRun, Seq: in.Seq, At: in.Now, Verdict: verdict,
		Body: marshal(map[string]any{"trigger": in.Trigger, "reason": out.Reason}),
	}))
}

func decideRetrain(p registry.RetrainPolicy, in DecideRetrainInput, rollouts int) (ok bool, reason string) {
	recent := 0
	last := time.Time{}
	for _, t := range in.Started {
		if in.Now.Sub(t) < 30*24*time.Hour {
			recent++
		}
		if t.After(last) {
			last = t
		}
	}
	cool := time.Duration(p.CooldownSecs) * time.Second
	switch {
	case p.Trainer == "":
		return false, "the model has no trainer: set retrain.trainer"
	case rollouts > 0:
		return false, "a roll-out is under way"
	case in.Trigger.Source == "manual":
		return true, "asked for"
	case in.Trigger.Source == "drift" && in.Trigger.Share < p.MinDriftShare:
		return false, fmt.Sprintf("%.0f %% of the features drifted, less than %.0f %%", 100*in.Trigger.Share, 100*p.MinDriftShare)
	case !last.IsZero() && in.Now.Sub(last) < cool:
		return false, fmt.Sprintf("the cool-down of %s is not over", cool)
	case recent >= p.MaxPer30Days:
		return false, fmt.Sprintf("%d retrainings in 30 days are the most allowed", p.MaxPer30Days)
	}
	return true, in.Trigger.Reason
}

// SnapshotInput asks for the labelled records of a model.
type SnapshotInput struct {
	RunID  string                 `json:"run_id"`
	Model  string                 `json:"model"`
	Policy registry.RetrainPolicy `json:"policy"`
}

// Snapshot is a frozen data set: blobs with CSV, split by the hash of the inference id.
type Snapshot struct {
	Train       string `json:"train"`
	Holdout     string `json:"holdout"`
	TrainRows   int    `json:"train_rows"`
	HoldoutRows int    `json:"holdout_rows"`
}

// holdoutOneIn is the share of rows that are held out: one in five.
const holdoutOneIn = 5

// SnapshotLabelled joins recorded rows with their labels and freezes them. It ends in Precondition when there are fewer
// labelled rows than the policy wants.
func (a *Data) SnapshotLabelled(ctx context.Context, in SnapshotInput) (Snapshot, error) {
	v, err := a.champion(ctx, in.Model)
	if err != nil {
		return Snapshot{}, Fault(err)
	}
	stop := keepAlive(ctx)
	defer stop()
	labels := map[string]float64{}
	for o, err := range a.objects.List(ctx, records.LabelPrefix+"model="+in.Model+"/") {
		if err == nil {
			err = records.ReadLabels(ctx, a.objects, o.Key, labels)
		}
		if err != nil {
			return Snapshot{}, Fault(err)
		}
	}
	names := v.Signature.Inputs[0].Features
	var out Snapshot
	train, holdout := newTable(names, in.Policy.LabelColumn), newTable(names, in.Policy.LabelColumn)
	keys, err := records.Window(ctx, a.objects, records.Slice{Prefix: records.RecordPrefix, Model: in.Model, To: time.Now().Add(time.Hour)})
	if err != nil {
		return out, Fault(err)
	}
	for _, key := range keys {
		err := records.ReadRecords(ctx, a.objects, key, names, func(id string, x []float64) {
			y, ok := labels[id]
			if !ok {
				return
			}
			delete(labels, id) // each labelled inference once
			if xxhash.Sum64String(id)%holdoutOneIn == 0 {
				holdout.add(x, y)
				out.HoldoutRows++
			} else {
				train.add(x, y)
				out.TrainRows++
			}
		})
		if err != nil {
			return out, Fault(err)
		}
	}
	if n := out.TrainRows + out.HoldoutRows; n < in.Policy.MinLabels || out.HoldoutRows == 0 {
		return out, Fault(registry.Errorf(registry.Precondition, "%d labelled rows, fewer than the %d needed", n, in.Policy.MinLabels))
	}
	if out.Train, err = a.putBlob(ctx, train.bytes()); err != nil {
		return out, Fault(err)
	}
	out.Holdout, err = a.putBlob(ctx, holdout.bytes())
	return out, Fault(err)
}

// csvTable collects rows as CSV.
type csvTable struct {
	b bytes.Buffer
	w *csv.Writer
}

func newTable(names []string, label string) *csvTable {
	t := &csvTable{}
	t.w = csv.NewWriter(&t.b)
	_ = t.w.Write(append(slices.Clone(names), label)) // into memory
	return t
}

func (t *csvTable) add(x []float64, y float64) {
	record := make([]string, len(x)+1)
	for i, v := range append(slices.Clone(x), y) {
		record[i] = strconv.FormatFloat(v, 'g', -1, 64)
	}
	_ = t.w.Write(record) // into memory
}

func (t *csvTable) bytes() []byte {
	t.w.Flush()
	return t.b.Bytes()
}

// RunTrainerInput says which trainer to run on what.
type RunTrainerInput struct {
	RunID       string `json:"run_id"`
	Trainer     string `json:"trainer"`
	Data        string `json:"data"` // blob with CSV
	LabelColumn string `json:"label_column"`
}

// RunTrainerResult are the files the trainer made, uploaded, and its log.
type RunTrainerResult struct {
	Files []registry.File `json:"files"`
	Log   string          `json:"log"`
}

// RunTrainer runs a trainer in a directory of its own, with an environment of its own and a time limit, and uploads what
// it made. Its output is kept as a log in any case. It ends in NotFound for a trainer that is not configured and in
// Invalid when it fails.
func (a *Training) RunTrainer(ctx context.Context, in RunTrainerInput) (RunTrainerResult, error) {
	trainer, ok := a.trainers[in.Trainer]
	if !ok {
		return RunTrainerResult{}, Fault(registry.Errorf(registry.NotFound, "no trainer %q in the orchestrator's configuration", in.Trainer))
	}
	dir, err := os.MkdirTemp(a.data.scratch, "train-*")
	if err != nil {
		return RunTrainerResult{}, Fault(err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // scratch
	input, output := filepath.Join(dir, "training.csv"), filepath.Join(dir, "output")
	if err := registry.FetchBlob(ctx, a.data.objects, in.Data, input); err != nil {
		return RunTrainerResult{}, Fault(err)
	}
	if err := os.Mkdir(output, 0o750); err != nil {
		return RunTrainerResult{}, Fault(err)
	}
	out := RunTrainerResult{Log: "runs/" + in.RunID + "/trainer.log"}
	noise, failed := runTrainer(ctx, trainer, dir, []string{
		"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + dir, "TMPDIR=" + dir, "ORRERY_TRAINING_DATA=" + input,
		"ORRERY_OUTPUT_DIR=" + output, "ORRERY_LABEL_COLUMN=" + in.LabelColumn,
	})
	if err := a.data.objects.Put(ctx, out.Log, bytes.NewReader(noise), int64(len(noise))); err != nil {
		return out, Fault(err)
	}
	if failed != nil {
		return out, Fault(failed)
	}
	out.Files, err = a.uploadAll(ctx, output)
	return out, Fault(err)
}

func runTrainer(ctx context.Context, t Trainer, dir string, env []string) (noise []byte, err error) {
	limit := t.Timeout
	if limit <= 0 {
		limit = time.Hour
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(limited, t.Command[0], t.Command[1:]...) //nolint:gosec // named in the orchestrator's configuration
	cmd.Dir, cmd.Env, cmd.WaitDelay = dir, env, 5*time.Second
	for k, v := range t.Env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	stop := keepAlive(ctx)
	defer stop()
	noise, err = cmd.CombinedOutput()
	switch {
	case err == nil:
		return noise, nil
	case ctx.Err() != nil:
		return noise, ctx.Err()
	case limited.Err() != nil:
		return noise, registry.Errorf(registry.Invalid, "the trainer did not end within %s", limit)
	}
	return noise, registry.Errorf(registry.Invalid, "the trainer failed: %w: %s", err, bytes.TrimSpace(noise[max(0, len(noise)-tryNoise):]))
}

// uploadAll uploads the regular files below dir; links are neither followed nor uploaded.
func (a *Training) uploadAll(ctx context.Context, dir string) ([]registry.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }() // opened for reading
	var files []registry.File
	err = fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		file, err := a.upload(ctx, root, path)
		files = append(files, file)
		return err
	})
	if err == nil && len(files) == 0 {
		err = registry.Errorf(registry.Invalid, "the trainer left no files in ORRERY_OUTPUT_DIR")
	}
	return files, err
}

func (a *Training) upload(ctx context.Context, root *os.Root, path string) (registry.File, error) {
	f, err := root.Open(path)
	if err != nil {
		return registry.File{}, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return registry.File{}, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return registry.File{}, err
	}
	file := registry.File{Path: path, Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}
	return file, registry.PutBlob(ctx, a.data.objects, file.SHA256, file.Size, f)
}
