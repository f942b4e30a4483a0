package activities

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

// CreateChallengerInput is a version to register on behalf of a retraining.
type CreateChallengerInput struct {
	RunID string          `json:"run_id"`
	Model string          `json:"model"`
	Files []registry.File `json:"files"`
	Train string          `json:"train"`
	Actor string          `json:"actor"`
}

// CreateChallengerResult is the PENDING version and the run that will register it.
type CreateChallengerResult struct {
	Version int    `json:"version"`
	RunID   string `json:"run_id"`
}

// CreateChallenger creates the PENDING version; a repeat finds the one it made.
func (a *Training) CreateChallenger(ctx context.Context, in CreateChallengerInput) (CreateChallengerResult, error) {
	out := CreateChallengerResult{RunID: in.RunID + "-register"}
	if run, err := a.data.store.Run(ctx, out.RunID); err == nil {
		out.Version = run.Version
		return out, nil
	}
	manifest, err := registry.NewManifest(in.Files)
	if err != nil {
		return out, Fault(err)
	}
	v, err := a.data.store.CreateVersion(ctx, registry.Version{
		Model: in.Model, Manifest: manifest, Description: "retrained by run " + in.RunID, CreatedBy: in.Actor,
		Documents: registry.Documents{TrainingData: in.Train},
	}, registry.Run{ID: out.RunID, Parent: in.RunID, Kind: registry.KindRegister, Model: in.Model, Actor: in.Actor})
	out.Version = v.Number
	return out, Fault(err)
}

// CompareInput asks which of two versions is better on held-out rows.
type CompareInput struct {
	RunID      string                 `json:"run_id"`
	Model      string                 `json:"model"`
	Challenger int                    `json:"challenger"`
	Holdout    string                 `json:"holdout"`
	Policy     registry.RetrainPolicy `json:"policy"`
}

// CompareResult is the loss of both on the same rows; lower is better.
type CompareResult struct {
	ChampionVersion int     `json:"champion_version"`
	Champion        float64 `json:"champion"`
	Challenger      float64 `json:"challenger"`
	Rows            int     `json:"rows"`
	Better          bool    `json:"better"`
	Reason          string  `json:"reason"`
}

// CompareChallenger scores the held-out rows with champion and challenger.
func (a *Data) CompareChallenger(ctx context.Context, in CompareInput) (CompareResult, error) {
	champion, err := a.champion(ctx, in.Model)
	if err != nil {
		return CompareResult{}, Fault(err)
	}
	challenger, err := a.store.Version(ctx, in.Model, in.Challenger)
	if err != nil {
		return CompareResult{}, Fault(err)
	}
	path := filepath.Join(a.scratch, "holdout-"+in.Holdout)
	defer func() { _ = os.Remove(path) }() // scratch
	if err := registry.FetchBlob(ctx, a.objects, in.Holdout, path); err != nil {
		return CompareResult{}, Fault(err)
	}
	rows, err := readRows(path, append(slices.Clone(champion.Signature.Inputs[0].Features), in.Policy.LabelColumn))
	if err != nil {
		return CompareResult{}, Fault(err)
	}
	out := CompareResult{ChampionVersion: champion.Number, Rows: len(rows)}
	if out.Champion, err = a.lossOf(ctx, champion, rows, in.Policy.Metric); err != nil {
		return out, Fault(err)
	}
	if out.Challenger, err = a.lossOf(ctx, challenger, rows, in.Policy.Metric); err != nil {
		return out, Fault(err)
	}
	out.Better = out.Challenger <= out.Champion*(1-in.Policy.MinGain)
	out.Reason = fmt.Sprintf("%s %.4f against the champion's %.4f on %d held-out rows", in.Policy.Metric, out.Challenger, out.Champion, out.Rows)
	return out, Fault(a.store.AddEvidence(ctx, registry.Evidence{Run: in.RunID, Seq: 1, At: time.Now(), Verdict: strconv.FormatBool(out.Better), Body: marshal(out)}))
}

// lossOf scores rows, whose last column is the label, and returns the mean loss.
func (a *Data) lossOf(ctx context.Context, v registry.Version, rows [][]float64, metric string) (float64, error) {
	session, err := a.openVersion(ctx, v)
	if err != nil {
		return 0, err
	}
	defer func() { _ = session.Close() }() // nothing runs any more
	x, y := make([][]float64, len(rows)), make([]float64, len(rows))
	for i, row := range rows {
		x[i], y[i] = row[:len(row)-1], row[len(row)-1]
	}
	var p []float64
	for chunk := range slices.Chunk(x, scoreRows) {
		scores, err := Score(ctx, session, chunk)
		if err != nil {
			return 0, fmt.Errorf("version %d: %w", v.Number, err)
		}
		for _, s := range scores {
			p = append(p, s[len(s)-1]) // the last column is the positive class
		}
	}
	if metric == "brier" {
		return monitor.Brier(p, y), nil
	}
	return monitor.LogLoss(p, y), nil
}

// PlanChallengerInput asks for the plan of a challenger's roll-out.
type PlanChallengerInput struct {
	Model           string `json:"model"`
	RequireApproval bool   `json:"require_approval"`
}

// The roll-out of a challenger: as many requests as the judge needs to exclude harm, a day for them to come, and an hour
// of watching.
const (
	challengerRequests = 300
	challengerMaxBake  = 24 * 3600
	challengerWatch    = 3600
)

// PlanChallenger makes the plan under the model's policy. That its answers differ is what a challenger is for, and on
// labelled rows it was better, so their distribution is not compared.
func (a *Training) PlanChallenger(ctx context.Context, in PlanChallengerInput) (RolloutPlan, error) {
	m, err := a.data.store.Model(ctx, in.Model)
	if err != nil {
		return RolloutPlan{}, Fault(err)
	}
	r := RolloutRequest{RequireApproval: in.RequireApproval, Judge: []byte(`{"output_margin": 1}`)}
	defaults := registry.DefaultRolloutPolicy()
	if m.Rollout.Strategy == defaults.Strategy && slices.Equal(m.Rollout.Steps, defaults.Steps) && m.Rollout.BakeRequests == 0 {
		none, requests, most, watch := int64(0), int64(challengerRequests), int64(challengerMaxBake), int64(challengerWatch)
		r.Strategy, r.Steps = registry.Steps, []float64{10, 50}
		r.BakeSeconds, r.BakeRequests, r.MaxBakeSeconds, r.WatchSeconds = &none, &requests, &most, &watch
	}
	plan, err := PlanRollout(m.Rollout, r)
	return plan, Fault(err)
}

// InsertRolloutInput is a roll-out to insert on behalf of another run.
type InsertRolloutInput struct {
	Run registry.Run `json:"run"`
}

// InsertRollout inserts the run of a roll-out. It ends in Conflict while another one of the model is under way.
func (a *Training) InsertRollout(ctx context.Context, in InsertRolloutInput) error {
	_, err := a.data.store.InsertRun(ctx, in.Run)
	return Fault(err)
}
