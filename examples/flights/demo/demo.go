package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/examples/flights/model"
	"github.com/orrery-ml/orrery/registry"
)

const modelName = "flights"

type demo struct {
	options

	began  time.Time
	server *exec.Cmd
	api    *client.Client
	key    string
	state  struct {
		API string `json:"api"`
		UI  string `json:"temporal_ui"`
	}
	winter  model.Data
	summer  model.Data
	trigger time.Time // when the drift that retrains was found
	traffic *traffic
}

// start runs orrery dev as a user would, in an empty directory.
func (d *demo) start(ctx context.Context) (string, error) {
	if err := os.RemoveAll(d.dir); err != nil {
		return "", err
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return "", err
	}
	var err error
	if d.winter, err = model.Read(filepath.Join(d.data, "winter.csv"), model.Label); err != nil {
		return "", err
	}
	if d.summer, err = model.Read(filepath.Join(d.data, "summer.csv"), model.Label); err != nil {
		return "", err
	}
	if err := d.configureTrainer(); err != nil {
		return "", err
	}
	d.server = exec.Command(d.orrery, "dev", "--dir", d.dir) //nolint:gosec,noctx // the binary under test; stopped by stop
	d.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d.server.Stdout, d.server.Stderr = io.Discard, os.Stderr
	began := time.Now()
	if err := d.server.Start(); err != nil {
		return "", err
	}
	if err := eventually(ctx, "orrery dev", func() (bool, error) { return d.connect() == nil, nil }); err != nil {
		return "", err
	}
	return fmt.Sprintf("ready in %.1f s at %s", time.Since(began).Seconds(), d.state.API), nil
}

func (d *demo) connect() error {
	raw, err := os.ReadFile(filepath.Join(d.dir, "dev.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &d.state); err != nil {
		return err
	}
	key, err := os.ReadFile(filepath.Join(d.dir, "admin.key"))
	if err != nil {
		return err
	}
	d.key = strings.TrimSpace(string(key))
	d.api, err = client.NewClient(d.state.API+"/api/v1", client.WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+d.key)
		return nil
	}))
	return err
}

func (d *demo) stop() error {
	var errs []error
	if d.traffic != nil {
		d.traffic.stop()
	}
	if d.server != nil && d.server.Process != nil {
		errs = append(errs, d.server.Process.Signal(syscall.SIGTERM), d.server.Wait())
	}
	return errors.Join(errs...)
}

// eventually waits until ok holds.
func eventually(ctx context.Context, what string, ok func() (bool, error)) error {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		done, err := ok()
		if err != nil || done {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: gave up: %w", what, ctx.Err())
		case <-ticker.C:
		}
	}
}

// decode reads an answer of the API.
func decode[T any](answer *http.Response, err error) (T, error) {
	var out T
	if err != nil {
		return out, err
	}
	defer func() { _ = answer.Body.Close() }() // read
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		return out, err
	}
	if answer.StatusCode >= http.StatusBadRequest {
		return out, fmt.Errorf("%s: %s", answer.Status, raw)
	}
	if len(raw) == 0 {
		return out, nil
	}
	return out, json.Unmarshal(raw, &out)
}

// train runs the Go trainer on the first rows of winter (0 = all).
func (d *demo) train(ctx context.Context, name string, rows, carriers int) (string, error) {
	out := filepath.Join(d.dir, name+".onnx")
	cmd := exec.CommandContext(ctx, d.trainer, "-data", filepath.Join(d.data, "winter.csv"), "-out", out, //nolint:gosec // our trainer
		"-rows", strconv.Itoa(rows), "-carriers", strconv.Itoa(carriers))
	if noise, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("trainer: %w: %s", err, noise)
	}
	return out, nil
}

// put uploads a file as a blob.
func (d *demo) put(ctx context.Context, path string) (registry.File, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return registry.File{}, err
	}
	sum := sha256.Sum256(raw)
	f := registry.File{Path: "model.onnx", Size: int64(len(raw)), SHA256: hex.EncodeToString(sum[:])}
	_, err = decode[struct{}](d.api.PutBlobWithBody(ctx, f.SHA256, &client.PutBlobParams{ContentLength: f.Size}, "application/octet-stream", bytes.NewReader(raw)))
	return f, err
}

// register trains, uploads and registers a version and waits until it is READY.
func (d *demo) register(ctx context.Context, name string, rows, carriers int) (client.Version, error) {
	var v client.Version
	path, err := d.train(ctx, name, rows, carriers)
	if err != nil {
		return v, err
	}
	file, err := d.put(ctx, path)
	if err != nil {
		return v, err
	}
	training, err := d.put(ctx, filepath.Join(d.data, "winter.csv"))
	if err != nil {
		return v, err
	}
	r := client.NewVersion{Files: []registry.File{file}, Description: &name, TrainingData: &training.SHA256}
	run, err := decode[client.Run](d.api.RegisterVersion(ctx, modelName, nil, r))
	if err != nil {
		return v, err
	}
	if run, err = d.ended(ctx, run.Id); err != nil {
		return v, err
	}
	if run.State != "SUCCEEDED" {
		return v, fmt.Errorf("registration %s: %s", run.State, run.Message)
	}
	return decode[client.Version](d.api.GetVersion(ctx, modelName, run.Version))
}

// ended waits for the end of a run.
func (d *demo) ended(ctx context.Context, id string) (client.Run, error) {
	var run client.Run
	err := eventually(ctx, "run "+id, func() (bool, error) {
		var err error
		run, err = decode[client.Run](d.api.GetRun(ctx, id))
		return run.EndedAt != nil, err
	})
	if err != nil {
		err = fmt.Errorf("%w (%s %s)", err, run.State, run.Phase)
	}
	return run, err
}

func (d *demo) registerFirst(ctx context.Context) (string, error) {
	config := json.RawMessage(`{"recording":"rows"}`)
	retrain := json.RawMessage(`{"trainer":"flights","label_column":"late","min_labels":1000,"min_gain":0.01,"min_drift_share":0.2}`)
	if _, err := decode[client.Model](d.api.CreateModel(ctx, client.NewModel{Name: modelName, Config: &config, Retrain: &retrain})); err != nil {
		return "", err
	}
	v, err := d.register(ctx, "v1", 4000, 16)
	if err != nil {
		return "", err
	}
	if len(v.Latency) == 0 || len(v.Signature.Inputs) != 1 || len(v.Signature.Inputs[0].Features) != len(model.Features) {
		return "", fmt.Errorf("the signature %v or the latency %v was not derived", v.Signature, v.Latency)
	}
	last := v.Latency[len(v.Latency)-1]
	return fmt.Sprintf("READY; input %v, features %s…; %d rows run in %d us", v.Signature.Inputs[0].Shape, v.Signature.Inputs[0].Features[0], last.Rows, last.P50), nil
}

// rollout starts a roll-out and waits for its end.
func (d *demo) rollout(ctx context.Context, r client.NewRollout) (client.Run, error) {
	run, err := decode[client.Run](d.api.StartRollout(ctx, modelName, nil, r))
	if err != nil {
		return run, err
	}
	return d.ended(ctx, run.Id)
}

func (d *demo) champion(ctx context.Context) (int, error) {
	list, err := decode[[]client.Alias](d.api.ListAliases(ctx, modelName))
	if err != nil {
		return 0, err
	}
	route, err := decode[registry.Route](d.api.GetRoute(ctx, modelName))
	if err != nil {
		return 0, err
	}
	for _, a := range list {
		if a.Name == registry.Champion && a.Version == route.StableVersion() && len(route.Arms) == 1 {
			return a.Version, nil
		}
	}
	return 0, fmt.Errorf("aliases %v and route %v do not agree", list, route.Arms)
}

func (d *demo) serveFirst(ctx context.Context) (string, error) {
	s := client.NewRolloutStrategy("all_at_once")
	run, err := d.rollout(ctx, client.NewRollout{Version: new(1), Strategy: &s})
	if err != nil {
		return "", err
	}
	if run.Outcome != string(registry.Promoted) {
		return "", fmt.Errorf("roll-out %s: %s", run.Outcome, run.Message)
	}
	a, err := ask(ctx, http.DefaultClient, d.state.API, d.winter.X[0], "first")
	if err != nil {
		return "", err
	}
	if a.version != "1" || a.late <= 0 || a.late >= 1 {
		return "", fmt.Errorf("version %s answered %v", a.version, a.late)
	}
	return fmt.Sprintf("champion is 1; the first flight is late with probability %.2f", a.late), nil
}

func (d *demo) beginTraffic(ctx context.Context) (string, error) {
	d.traffic = newTraffic(d.state.API, d.winter.X)
	d.traffic.start(6)
	if err := eventually(ctx, "traffic", func() (bool, error) { return d.traffic.answered() > 200, nil }); err != nil {
		return "", err
	}
	n, p50 := d.traffic.answered(), d.traffic.median()
	return fmt.Sprintf("%d answers, p50 %.2f ms, %d failures", n, p50.Seconds()*1000, d.traffic.failures("")), nil
}

func (d *demo) rolloutGood(ctx context.Context) (string, error) {
	if _, err := d.register(ctx, "v2", 0, 16); err != nil {
		return "", err
	}
	s := client.NewRolloutStrategy("steps")
	steps, requests, watch := []float32{10, 50}, int64(300), int64(600)
	run, err := d.rollout(ctx, client.NewRollout{Version: new(2), Strategy: &s, Steps: &steps, BakeSeconds: new(int64(0)), BakeRequests: &requests, WatchSeconds: &watch})
	if err != nil {
		return "", err
	}
	if run.Outcome != string(registry.Promoted) {
		return "", fmt.Errorf("roll-out %s: %s", run.Outcome, run.Message)
	}
	j, err := d.judgement(ctx, run.Id)
	if err != nil {
		return "", err
	}
	if c, err := d.champion(ctx); err != nil || c != 2 {
		return "", fmt.Errorf("champion is %d: %w", c, err)
	}
	if watch, err := decode[client.Run](d.api.GetRun(ctx, run.Id+"-watch")); err != nil || watch.State != "RUNNING" {
		return "", fmt.Errorf("the promotion is not watched: %s %s: %w", watch.State, watch.Message, err)
	}
	return fmt.Sprintf("PROMOTED after %d requests of the candidate and %d of stable; e-value for worse %.2g (limit %.0f), for not worse %.3g (limit %.0f)",
		j.Candidate.Requests, j.Stable.Requests, j.ErrorE, j.ErrorLimit, j.PassE, j.PassLimit), nil
}

// judgement is what the judge last said of a run.
type judgement struct {
	Verdict    string
	Reason     string
	Candidate  struct{ Requests, Errors int64 }
	Stable     struct{ Requests, Errors int64 }
	ErrorE     float64 `json:"error_e"`
	PassE      float64 `json:"pass_e"`
	ErrorLimit float64 `json:"error_limit"`
	PassLimit  float64 `json:"pass_limit"`
}

func (d *demo) judgement(ctx context.Context, run string) (judgement, error) {
	var j judgement
	list, err := decode[[]registry.Evidence](d.api.ListEvidence(ctx, run))
	if err != nil {
		return j, err
	}
	if len(list) == 0 {
		return j, errors.New("the run has no evidence")
	}
	return j, json.Unmarshal(list[len(list)-1].Body, &j)
}

func (d *demo) rolloutBad(ctx context.Context) (string, error) {
	if _, err := d.register(ctx, "v3", 0, 12); err != nil {
		return "", err
	}
	steps, requests := []float32{10}, int64(300)
	run, err := d.rollout(ctx, client.NewRollout{Version: new(3), Steps: &steps, BakeSeconds: new(int64(0)), BakeRequests: &requests})
	if err != nil {
		return "", err
	}
	if run.Outcome != string(registry.RolledBack) {
		return "", fmt.Errorf("roll-out %s: %s", run.Outcome, run.Message)
	}
	j, err := d.judgement(ctx, run.Id)
	if err != nil {
		return "", err
	}
	if c, err := d.champion(ctx); err != nil || c != 2 {
		return "", fmt.Errorf("champion is %d: %w", c, err)
	}
	return fmt.Sprintf("ROLLED_BACK: %d errors in %d requests against %d in %d; e-value %.3g (limit %.0f)",
		j.Candidate.Errors, j.Candidate.Requests, j.Stable.Errors, j.Stable.Requests, j.ErrorE, j.ErrorLimit), nil
}

// checkTraffic compares what the client saw with the routes there were.
func (d *demo) checkTraffic(ctx context.Context) (string, error) {
	routes, err := decode[[]registry.Route](d.api.ListRoutes(ctx, modelName))
	if err != nil {
		return "", err
	}
	weight := map[string]int{}
	for _, r := range routes {
		for _, a := range r.Arms {
			weight[fmt.Sprintf("%d/%d", r.Revision, a.Version)] = a.Weight
		}
	}
	wrong := 0
	byRoute := d.traffic.byRoute()
	for k, n := range byRoute {
		if weight[k] == 0 {
			wrong += n
		}
	}
	if wrong > 0 {
		return "", fmt.Errorf("%d answers came from a version that had no weight: %v", wrong, byRoute)
	}
	// The only failures allowed are the bad candidate's own: flights of airlines it does not know.
	total, ofBad := d.traffic.failures(""), d.traffic.failures("indices element out of data bounds")
	if total != ofBad {
		return "", fmt.Errorf("%d requests failed for another reason than version 3's airlines: %s", total-ofBad, d.traffic.sample())
	}
	return fmt.Sprintf("%d answers by %d (revision, version) pairs, all with weight; %d failures, all of version 3", d.traffic.answered(), len(byRoute), total), nil
}
