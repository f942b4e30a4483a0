package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
)

// binary is the program under test, built once.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "orrery-e2e-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "orrery")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil { //nolint:noctx // ends by itself
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	testenv.Main(m, func() error { return os.RemoveAll(dir) })
}

const (
	joinToken = "join-token-of-the-test"
	adminKey  = "ok_admin_key_of_the_test_cluster"
)

// cluster is what production is: roles started one by one against PostgreSQL, MinIO and Temporal.
type cluster struct {
	t            *testing.T
	postgres     *testenv.PostgresServer
	temporal     *testenv.TemporalServer
	env          []string
	servers      []*node
	workers      []*node
	orchestrator *node
}

// node is one role's process.
type node struct {
	*testenv.Process

	http string
	grpc string
}

func (n *node) url() string { return "http://" + n.http }

// newCluster starts a cluster, with env added to the environment of its roles, and waits until it is ready.
func newCluster(t *testing.T, servers, workers int, env ...string) *cluster {
	t.Helper()
	return newClusterOn(t, testenv.Minio(t), servers, workers, env...)
}

// newClusterOn is newCluster with an object store of one's own.
func newClusterOn(t *testing.T, minio *testenv.MinioServer, servers, workers int, env ...string) *cluster {
	t.Helper()
	c := &cluster{t: t}
	_ = t.TempDir() // registers its removal before the kill, so that it happens after it
	var starting sync.WaitGroup
	var pgErr, temporalErr error
	starting.Go(func() { c.postgres, pgErr = testenv.StartPostgres() })
	starting.Go(func() { c.temporal, temporalErr = testenv.StartTemporal() })
	starting.Wait()
	require.NoError(t, pgErr)
	require.NoError(t, temporalErr)
	t.Cleanup(c.kill)
	bucket := "e2e-" + strings.ToLower(strings.ReplaceAll(t.Name(), "_", "-"))
	c.env = []string{
		"ORRERY_REGISTRY=" + c.postgres.DSN("postgres"), "ORRERY_STORE=s3://" + bucket[:min(len(bucket), 60)] + "?tls=false&endpoint=" + minio.Endpoint,
		"ORRERY_STORE_ACCESS_KEY=" + minio.Access, "ORRERY_STORE_SECRET_KEY=" + minio.Secret, "ORRERY_TEMPORAL=" + c.temporal.Address,
		"ORRERY_JOIN_TOKEN=" + joinToken, "ORRERY_ADMIN_KEY=" + adminKey, "ORRERY_ONNXRUNTIME_LIB=" + testenv.OnnxRuntime(t),
	}
	c.env = append(c.env, env...)
	var attach []string
	for i := range servers {
		n := c.node("server", fmt.Sprintf("server-%d", i), "--dev-open", "--state-dir", t.TempDir())
		c.servers = append(c.servers, n)
		attach = append(attach, n.grpc)
	}
	for i := range workers {
		c.workers = append(c.workers, c.node("worker", fmt.Sprintf("worker-%d", i), "--servers", strings.Join(attach, ","), "--cache-dir", t.TempDir()))
	}
	c.orchestrator = c.plain("orchestrator", "orchestrator", "--scratch", t.TempDir())
	for _, n := range append(append([]*node{c.orchestrator}, c.servers...), c.workers...) {
		require.NoError(t, n.Start())
	}
	for i := range c.servers {
		c.awaitReady(i, workers)
	}
	return c
}

// node describes a role that listens.
func (c *cluster) node(role, name string, args ...string) *node {
	web, err := testenv.FreePort()
	require.NoError(c.t, err)
	rpc, err := testenv.FreePort()
	require.NoError(c.t, err)
	n := &node{http: fmt.Sprintf("127.0.0.1:%d", web), grpc: fmt.Sprintf("127.0.0.1:%d", rpc)}
	n.Process = c.plain(name, append([]string{role, "--node", name, "--http", n.http, "--grpc", n.grpc}, args...)...).Process
	return n
}

func (c *cluster) plain(name string, args ...string) *node {
	p, err := testenv.NewProcess(name, c.env, append([]string{binary}, args...)...)
	require.NoError(c.t, err)
	return &node{Process: p}
}

func (c *cluster) kill() {
	if os.Getenv("ORRERY_RECORD_HISTORIES") == "clusters" {
		recordHistories(c.t, c.temporal.Address)
	}
	for _, n := range append(append([]*node{c.orchestrator}, c.servers...), c.workers...) {
		if n == nil {
			continue
		}
		n.Kill()
		if c.t.Failed() {
			c.t.Logf("--- log of %s:\n%s", n.http, n.Log())
		}
	}
	c.temporal.Kill()
	c.postgres.Kill()
}

// awaitReady waits until a server answers, is in step with the registry and has its workers.
func (c *cluster) awaitReady(server, workers int) {
	c.t.Helper()
	api := c.api(server)
	require.Eventually(c.t, func() bool {
		s, err := decode[client.Status](api.GetStatus(c.t.Context()))
		if err != nil || !s.Synced || s.Temporal != "ok" {
			return false
		}
		leases, err := decode[[]client.Lease](api.ListLeases(c.t.Context()))
		live := 0
		for _, l := range leases {
			if l.Kind == "worker" && l.Live {
				live++
			}
		}
		return err == nil && live >= workers
	}, 60*time.Second, 50*time.Millisecond, "server %d is not ready", server)
}

// api returns a client of a server with the admin key.
func (c *cluster) api(server int) *client.Client {
	api, err := client.NewClient(c.servers[server].url()+"/api/v1", client.WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+adminKey)
		return nil
	}))
	require.NoError(c.t, err)
	return api
}

// echo is a model that answers y = x + bias for rows of one float; rows above limit make it fail, when limit is set.
func echo(bias float64, table int64) []byte {
	m := onnxfile.Model{
		Name: "echo", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{onnxfile.Floats("bias", []int64{1}, []float64{bias})},
		Nodes:        []onnxfile.Node{{Op: "Add", Inputs: []string{"x", "bias"}, Outputs: []string{"y"}}},
	}
	if table > 0 { // look x up in a table that is too short for some x
		m.Initializers = append(m.Initializers, onnxfile.Floats("table", []int64{table}, make([]float64, table)))
		m.Nodes = []onnxfile.Node{
			{Op: "Cast", Inputs: []string{"x"}, Outputs: []string{"i"}, Attributes: map[string]any{"to": int64(onnxfile.Int64)}},
			{Op: "Gather", Inputs: []string{"table", "i"}, Outputs: []string{"z"}},
			{Op: "Add", Inputs: []string{"z", "bias"}, Outputs: []string{"y"}},
		}
	}
	return onnxfile.Build(m)
}

// logarithm is a model that answers NaN for x below 0.
func logarithm() []byte {
	return onnxfile.Build(onnxfile.Model{
		Name: "logarithm", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Nodes:   []onnxfile.Node{{Op: "Log", Inputs: []string{"x"}, Outputs: []string{"y"}}},
	})
}

// upload registers files as a version of a model and returns the run.
func (c *cluster) upload(model string, files map[string][]byte) client.Run {
	c.t.Helper()
	api := c.api(0)
	var list []registry.File
	for name, raw := range files {
		sum := sha256.Sum256(raw)
		f := registry.File{Path: name, Size: int64(len(raw)), SHA256: hex.EncodeToString(sum[:])}
		_, err := decode[struct{}](api.PutBlobWithBody(c.t.Context(), f.SHA256, &client.PutBlobParams{ContentLength: f.Size}, "application/octet-stream", bytes.NewReader(raw)))
		require.NoError(c.t, err)
		list = append(list, f)
	}
	run, err := decode[client.Run](api.RegisterVersion(c.t.Context(), model, nil, client.NewVersion{Files: list}))
	require.NoError(c.t, err)
	return c.ended(run.Id)
}

// model makes a model whose versions answer x + 1, x + 2, …
func (c *cluster) model(name string, versions int) {
	c.t.Helper()
	_, err := decode[client.Model](c.api(0).CreateModel(c.t.Context(), client.NewModel{Name: name}))
	require.NoError(c.t, err)
	for v := 1; v <= versions; v++ {
		run := c.upload(name, map[string][]byte{"model.onnx": echo(float64(v), 0)})
		require.Equal(c.t, "SUCCEEDED", run.State, run.Message)
		require.Equal(c.t, v, run.Version)
	}
}

// rollout starts a roll-out of a version.
func (c *cluster) rollout(model string, r client.NewRollout) client.Run {
	c.t.Helper()
	run, err := decode[client.Run](c.api(0).StartRollout(c.t.Context(), model, nil, r))
	require.NoError(c.t, err)
	return run
}

// allAtOnce makes version 1 the champion.
func (c *cluster) allAtOnce(model string) {
	c.t.Helper()
	s := client.NewRolloutStrategy("all_at_once")
	run := c.ended(c.rollout(model, client.NewRollout{Version: new(1), Strategy: &s}).Id)
	require.Equal(c.t, string(registry.Promoted), run.Outcome, run.Message)
}

// ended waits for the end of a run, asking whichever server answers.
func (c *cluster) ended(id string) client.Run {
	c.t.Helper()
	var run client.Run
	require.Eventually(c.t, func() bool {
		for i := range c.servers {
			if r, err := decode[client.Run](c.api(i).GetRun(c.t.Context(), id)); err == nil {
				run = r
			}
		}
		return run.EndedAt != nil
	}, 150*time.Second, 50*time.Millisecond, "run %s did not end", id)
	return run
}

// phase waits until a run is in a phase.
func (c *cluster) phase(id, phase string) {
	c.t.Helper()
	require.Eventually(c.t, func() bool {
		run, err := decode[client.Run](c.api(0).GetRun(c.t.Context(), id))
		return err == nil && strings.Contains(run.Phase, phase)
	}, 150*time.Second, 20*time.Millisecond, "run %s never came to %q", id, phase)
}

func (c *cluster) route(model string) registry.Route {
	c.t.Helper()
	r, err := decode[registry.Route](c.api(0).GetRoute(c.t.Context(), model))
	require.NoError(c.t, err)
	return r
}

// consistent is settled for model m.
func (c *cluster) consistent(version int) {
	c.t.Helper()
	c.settled("m", version)
}

// settled checks that traffic of a model is on one version and the champion is that version.
func (c *cluster) settled(model string, version int) {
	c.t.Helper()
	r := c.route(model)
	require.Len(c.t, r.Arms, 1, "no arm is left over: %+v", r)
	require.Equal(c.t, version, r.StableVersion())
	require.Empty(c.t, r.Owner)
	aliases, err := decode[[]client.Alias](c.api(0).ListAliases(c.t.Context(), model))
	require.NoError(c.t, err)
	for _, a := range aliases {
		if a.Name == registry.Champion {
			require.Equal(c.t, version, a.Version, "alias and route agree")
		}
	}
}

// infer asks a server for x + version and returns which version and revision answered.
func infer(ctx context.Context, base, model string, x float64, key string) (y float64, version, revision string, err error) {
	body := fmt.Sprintf(`{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[%g]}]}`, x)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v2/models/"+model+"/infer", strings.NewReader(body))
	if err != nil {
		return 0, "", "", err
	}
	r.Header.Set("X-Orrery-Key", key)
	got, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, "", "", err
	}
	defer func() { _ = got.Body.Close() }()
	var a struct {
		Version string `json:"model_version"`
		Error   string `json:"error"`
		Outputs []struct{ Data []float64 }
	}
	if err := json.NewDecoder(got.Body).Decode(&a); err != nil {
		return 0, "", "", err
	}
	if got.StatusCode != http.StatusOK {
		return 0, "", "", fmt.Errorf("%s: %s", got.Status, a.Error)
	}
	return a.Outputs[0].Data[0], a.Version, got.Header.Get("X-Orrery-Revision"), nil
}

// load sends traffic to the servers in turn until stop is called. A request that fails is tried once more on another
// server, as a client that reconnects does; only then it counts as failed.
type load struct {
	c      *cluster
	model  string
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex
	ok     int
	failed []string
	wrong  []string
	routes map[string]int
}

func (c *cluster) load(callers int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{c: c, model: "m", cancel: cancel, routes: map[string]int{}}
	for g := range callers {
		l.done.Go(func() {
			for i := g; ctx.Err() == nil; i += callers {
				l.once(ctx, i)
				time.Sleep(4 * time.Millisecond)
			}
		})
	}
	c.t.Cleanup(func() { cancel(); l.done.Wait() })
	return l
}

func (l *load) once(ctx context.Context, i int) {
	var err error
	for try := range 2 {
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		server := l.c.servers[(i+try)%len(l.c.servers)]
		x := float64(i % 100)
		var y float64
		var version, revision string
		y, version, revision, err = infer(limited, server.url(), l.model, x, fmt.Sprintf("caller-%d", i))
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			continue
		}
		l.mu.Lock()
		l.ok++
		l.routes[revision+"/"+version]++
		if fmt.Sprint(y-x) != version {
			l.wrong = append(l.wrong, fmt.Sprintf("x=%v answered %v by version %s", x, y, version))
		}
		l.mu.Unlock()
		return
	}
	l.mu.Lock()
	l.failed = append(l.failed, err.Error())
	l.mu.Unlock()
}

func (l *load) stop() {
	l.cancel()
	l.done.Wait()
}

// check ends the load and compares its log with the routes there were: no answer from a version without weight, and
// none that is another version's.
func (l *load) check(maxFailed float64) {
	t := l.c.t
	t.Helper()
	l.stop()
	routes, err := decode[[]registry.Route](l.c.api(0).ListRoutes(t.Context(), l.model))
	require.NoError(t, err)
	weight := map[string]int{}
	for _, r := range routes {
		for _, a := range r.Arms {
			weight[fmt.Sprintf("%d/%d", r.Revision, a.Version)] = a.Weight
		}
	}
	for k := range l.routes {
		require.Positive(t, weight[k], "answers by (revision/version) %s, which had no weight", k)
	}
	require.Empty(t, l.wrong)
	total := float64(l.ok + len(l.failed))
	require.LessOrEqual(t, float64(len(l.failed)), maxFailed*total, "%d of %.0f failed, such as %v", len(l.failed), total, l.failed[:min(3, len(l.failed))])
	t.Logf("%d answers by %v, %d failed", l.ok, l.routes, len(l.failed))
}
