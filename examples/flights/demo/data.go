package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
)

// configureTrainer names the Go trainer in the orchestrator's configuration, as an operator would.
func (d *demo) configureTrainer() error {
	trainer, err := filepath.Abs(d.trainer)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("trainers:\n  flights:\n    command: [%q]\n    timeout: 2m\n", trainer)
	return os.WriteFile(filepath.Join(d.dir, "orrery.yaml"), []byte(text), 0o600)
}

// latest waits for the newest run of a kind that began after the given time, and for its end.
func (d *demo) latest(ctx context.Context, kind string, after time.Time) (client.Run, error) {
	var id string
	err := eventually(ctx, "a run of kind "+kind, func() (bool, error) {
		runs, err := decode[[]client.Run](d.api.ListRuns(ctx, &client.ListRunsParams{Kind: &kind}))
		for _, r := range runs {
			if r.CreatedAt.After(after) {
				id = r.Id
			}
		}
		return id != "", err
	})
	if err != nil {
		return client.Run{}, err
	}
	return d.ended(ctx, id)
}

func (d *demo) scoreNight(ctx context.Context) (string, error) {
	raw, err := os.ReadFile(filepath.Join(d.data, "winter.csv"))
	if err != nil {
		return "", err
	}
	const key = "data/night.csv"
	if _, err := decode[struct{}](d.api.PutObjectWithBody(ctx, &client.PutObjectParams{Key: key, ContentLength: int64(len(raw))}, "application/octet-stream", bytes.NewReader(raw))); err != nil {
		return "", err
	}
	model, part := modelName, int64(3000)
	if _, err := decode[client.Schedule](d.api.CreateSchedule(ctx, client.NewSchedule{
		Name: "nightly-flights", Kind: "batch", Cron: "0 2 * * *", Model: &model, Batch: &client.NewBatch{Input: key, RowsPerPartition: &part},
	})); err != nil {
		return "", err
	}
	// Last night's run, by a backfill of the very schedule.
	now := time.Now().UTC()
	night := time.Date(now.Year(), now.Month(), now.Day(), 2, 0, 0, 0, time.UTC)
	if night.After(now) {
		night = night.AddDate(0, 0, -1)
	}
	from, to := night.Add(-time.Minute), night.Add(time.Minute)
	if _, err := decode[struct{}](d.api.TriggerSchedule(ctx, "nightly-flights", client.Trigger{From: &from, To: &to})); err != nil {
		return "", err
	}
	run, err := d.latest(ctx, string(registry.KindBatch), now)
	if err != nil {
		return "", err
	}
	return d.checkBatch(ctx, run)
}

func (d *demo) checkBatch(ctx context.Context, run client.Run) (string, error) {
	if run.State != "SUCCEEDED" {
		return "", fmt.Errorf("batch job %s: %s", run.State, run.Message)
	}
	var result struct{ Output string }
	if run.Result == nil || json.Unmarshal(*run.Result, &result) != nil {
		return "", errors.New("the run has no result")
	}
	manifest, err := decode[struct {
		Rows, Failed int64
		Plan         struct{ Version int }
		Parts        []struct{ Key string }
	}](d.api.GetObject(ctx, &client.GetObjectParams{Key: result.Output}))
	if err != nil {
		return "", err
	}
	if manifest.Rows != int64(len(d.winter.X)) || manifest.Failed != 0 || len(manifest.Parts) != 4 || manifest.Plan.Version != 2 {
		return "", fmt.Errorf("the manifest says %+v", manifest)
	}
	return fmt.Sprintf("%d rows in %d partitions by version %d, manifest %s", manifest.Rows, len(manifest.Parts), manifest.Plan.Version, result.Output), nil
}

// drift triggers the drift schedule and returns its run.
func (d *demo) drift(ctx context.Context) (client.Run, error) {
	began := time.Now()
	if _, err := decode[struct{}](d.api.TriggerSchedule(ctx, "flights-drift", client.Trigger{})); err != nil {
		return client.Run{}, err
	}
	run, err := d.latest(ctx, string(registry.KindDrift), began)
	if err == nil && run.State != "SUCCEEDED" {
		err = fmt.Errorf("drift check %s: %s", run.State, run.Message)
	}
	return run, err
}

// driftWindow is how far back the demo's checks look, in seconds: the demo's days are short.
const driftWindow = 15

func (d *demo) driftWinter(ctx context.Context) (string, error) {
	model, seconds := modelName, int64(driftWindow)
	if _, err := decode[client.Schedule](d.api.CreateSchedule(ctx, client.NewSchedule{
		Name: "flights-drift", Kind: "drift", Cron: "0 3 * * *", Model: &model, Drift: &client.NewDriftCheck{WindowSeconds: &seconds},
	})); err != nil {
		return "", err
	}
	d.traffic.turn("winter-sample", sample(d.winter.X))
	if err := d.recorded(ctx); err != nil {
		return "", err
	}
	run, err := d.drift(ctx)
	if err != nil {
		return "", err
	}
	if run.Outcome != "NONE" {
		return "", fmt.Errorf("winter against winter: %s: %s", run.Outcome, run.Message)
	}
	return run.Message, nil
}

// sample takes rows from all over a season, so that a short while looks like the whole.
func sample(rows [][]float64) [][]float64 {
	const stride = 7919
	out := make([][]float64, len(rows))
	for i := range rows {
		out[i] = rows[i*stride%len(rows)]
	}
	return out
}

// recorded waits until the window holds nothing but the present season, written by the gateway.
func (d *demo) recorded(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After((driftWindow + 6) * time.Second):
		return nil
	}
}

func (d *demo) driftSummer(ctx context.Context) (string, error) {
	d.traffic.turn("summer", sample(d.summer.X))
	if err := d.recorded(ctx); err != nil {
		return "", err
	}
	n, err := d.label(ctx)
	if err != nil {
		return "", err
	}
	d.trigger = time.Now()
	run, err := d.drift(ctx)
	if err != nil {
		return "", err
	}
	if run.Outcome != "DRIFT" {
		return "", fmt.Errorf("summer against winter: %s: %s", run.Outcome, run.Message)
	}
	return fmt.Sprintf("%s; %d flights have landed and are labelled", run.Message, n), nil
}

// label says of every summer flight that was asked about whether it was late.
func (d *demo) label(ctx context.Context) (int, error) {
	n := d.traffic.sent()
	labels := make([]client.Label, n)
	rows := len(d.summer.Y)
	for i := range labels {
		labels[i] = client.Label{Id: fmt.Sprintf("summer-%d", i), Label: d.summer.Y[(i%rows)*7919%rows]}
	}
	_, err := decode[struct{}](d.api.AddLabels(ctx, modelName, labels))
	return n, err
}

func (d *demo) retrained(ctx context.Context) (string, error) {
	run, err := d.latest(ctx, string(registry.KindRetrain), d.trigger)
	if err != nil {
		return "", err
	}
	if run.State != "SUCCEEDED" || run.Outcome != string(registry.Promoted) {
		return "", fmt.Errorf("retraining %s %s: %s", run.State, run.Outcome, run.Message)
	}
	var r struct {
		Version             int
		Champion, Challenge float64
		Rows                int64
	}
	if run.Result == nil || json.Unmarshal(*run.Result, &r) != nil {
		return "", errors.New("the run has no result")
	}
	c, err := d.champion(ctx)
	if err != nil || c != r.Version || r.Challenge >= r.Champion {
		return "", fmt.Errorf("champion is %d, the challenger %d with loss %.4f against %.4f: %w", c, r.Version, r.Challenge, r.Champion, err)
	}
	a, err := ask(ctx, http.DefaultClient, d.state.API, d.summer.X[0], "last")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("log loss %.4f against the champion's %.4f on %d held-out rows; version %d promoted, and answers as version %s", r.Challenge, r.Champion, r.Rows, r.Version, a.version), nil
}
