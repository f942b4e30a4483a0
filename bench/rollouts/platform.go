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
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	temporal "go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/internal/toolpath"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
)

// What guards the roles of a benchmark, which listen on loopback and live for minutes.
const (
	benchKey   = "ok_admin_key_of_the_benchmark"
	benchToken = "join-token-of-the-benchmark" //nolint:gosec // see above
)

// platform is a real Orrery.
type platform struct {
	servers    []string // URLs
	apis       []*client.Client
	store      *store.Store
	temporal   temporal.Client
	temporalOn string
	digest     string // of the model that is in the object store
	size       int64
	nan        string // of the model that answers NaN
	nanSize    int64
	roles      map[string]*testenv.Process
}

// startPlatform starts everything and waits until it is whole.
func startPlatform(ctx context.Context, binary string, servers int) (*platform, error) {
	pg, err := testenv.StartPostgres()
	if err != nil {
		return nil, err
	}
	p := &platform{temporalOn: "PostgreSQL", roles: map[string]*testenv.Process{}}
	engine, err := testenv.StartTemporalOn(ctx, pg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "rollouts: Temporal on PostgreSQL:", err)
		p.temporalOn = "SQLite (dev server)"
		if engine, err = testenv.StartTemporal(); err != nil {
			return nil, err
		}
	}
	minio, err := testenv.StartMinio()
	if err != nil {
		return nil, err
	}
	library, err := toolpath.OnnxRuntime("")
	if err != nil {
		return nil, err
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return nil, err
	}
	env := []string{
		"ORRERY_REGISTRY=" + pg.DSN("postgres"), "ORRERY_STORE=s3://bench?tls=false&endpoint=" + minio.Endpoint,
		"ORRERY_STORE_ACCESS_KEY=" + minio.Access, "ORRERY_STORE_SECRET_KEY=" + minio.Secret, "ORRERY_TEMPORAL=" + engine.Address,
		"ORRERY_JOIN_TOKEN=" + benchToken, "ORRERY_ADMIN_KEY=" + benchKey, "ORRERY_ONNXRUNTIME_LIB=" + library, "ORRERY_LOG_LEVEL=error",
	}
	scratch, err := os.MkdirTemp("", "orrery-bench-*")
	if err != nil {
		return nil, err
	}
	if err := p.startRoles(binary, env, scratch, servers); err != nil {
		return nil, err
	}
	if p.store, err = store.Open(ctx, pg.DSN("postgres")); err != nil {
		return nil, err
	}
	if p.temporal, err = temporal.Dial(temporal.Options{HostPort: engine.Address, Logger: quiet{}}); err != nil {
		return nil, err
	}
	if err := p.awaitWhole(ctx); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, p.said())
	}
	if p.digest, p.size, err = p.blob(ctx, model(false)); err != nil {
		return nil, err
	}
	if p.nan, p.nanSize, err = p.blob(ctx, model(true)); err != nil {
		return nil, err
	}
	return p, p.rehearse(ctx)
}

// rehearse promotes once: a namespace that has just been made is not known everywhere in Temporal yet.
func (p *platform) rehearse(ctx context.Context) error {
	if err := p.seed(ctx, "rehearsal", p.digest, p.size); err != nil {
		return err
	}
	run, err := decode[client.Run](p.apis[0].StartRollout(ctx, "rehearsal", nil, atOnce(2)))
	if err != nil {
		return err
	}
	return eventually(ctx, "the rehearsal", func() bool {
		run, err = decode[client.Run](p.apis[0].GetRun(ctx, run.Id))
		return err == nil && run.EndedAt != nil
	})
}

type quiet struct{}

func (quiet) Debug(string, ...any) {}
func (quiet) Info(string, ...any)  {}
func (quiet) Warn(string, ...any)  {}
func (quiet) Error(string, ...any) {}

func (p *platform) startRoles(binary string, env []string, scratch string, servers int) error {
	start := func(name string, args ...string) error {
		process, err := testenv.NewProcess(name, env, append([]string{binary}, args...)...)
		if err != nil {
			return err
		}
		p.roles[name] = process
		return process.Start()
	}
	var attach []string
	for i := range servers {
		web, err := address()
		if err != nil {
			return err
		}
		rpc, err := address()
		if err != nil {
			return err
		}
		name := fmt.Sprintf("server-%d", i)
		if err := start(name, "server", "--node", name, "--http", web, "--grpc", rpc, "--dev-open", "--state-dir", filepath.Join(scratch, name)); err != nil {
			return err
		}
		p.servers, attach = append(p.servers, "http://"+web), append(attach, rpc)
		api, err := client.NewClient("http://"+web+"/api/v1", client.WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
			r.Header.Set("Authorization", "Bearer "+benchKey)
			return nil
		}))
		if err != nil {
			return err
		}
		p.apis = append(p.apis, api)
	}
	web, err := address()
	if err != nil {
		return err
	}
	rpc, err := address()
	if err != nil {
		return err
	}
	return errors.Join(
		start("worker", "worker", "--servers", strings.Join(attach, ","), "--http", web, "--grpc", rpc, "--cache-dir", filepath.Join(scratch, "cache")),
		start("orchestrator", "orchestrator", "--scratch", scratch),
	)
}

func address() (string, error) {
	port, err := testenv.FreePort()
	return fmt.Sprintf("127.0.0.1:%d", port), err
}

func (p *platform) awaitWhole(ctx context.Context) error {
	return eventually(ctx, "the platform", func() bool {
		for i := range p.apis {
			s, err := decode[client.Status](p.apis[i].GetStatus(ctx))
			if err != nil || !s.Synced || s.Temporal != "ok" {
				return false
			}
		}
		leases, err := decode[[]client.Lease](p.apis[0].ListLeases(ctx))
		live := 0
		for _, l := range leases {
			if l.Live {
				live++
			}
		}
		return err == nil && live == len(p.servers)+1
	})
}

// said is what the roles wrote, and which of them ended.
func (p *platform) said() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(p.roles)) {
		fmt.Fprintf(&b, "%s (ended: %v):\n%s\n", name, p.roles[name].Exited(), p.roles[name].Log())
	}
	return b.String()
}

func eventually(ctx context.Context, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// model answers x + 1, or log(x), which is NaN for -1.
func model(nan bool) []byte {
	m := onnxfile.Model{
		Name: "bench", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{onnxfile.Floats("one", []int64{1}, []float64{1})},
		Nodes:        []onnxfile.Node{{Op: "Add", Inputs: []string{"x", "one"}, Outputs: []string{"y"}}},
	}
	if nan {
		m.Initializers, m.Nodes = nil, []onnxfile.Node{{Op: "Log", Inputs: []string{"x"}, Outputs: []string{"y"}}}
	}
	return onnxfile.Build(m)
}

func (p *platform) blob(ctx context.Context, raw []byte) (digest string, size int64, err error) {
	sum := sha256.Sum256(raw)
	digest, size = hex.EncodeToString(sum[:]), int64(len(raw))
	_, err = decode[struct{}](p.apis[0].PutBlobWithBody(ctx, digest, &client.PutBlobParams{ContentLength: size}, "application/octet-stream", bytes.NewReader(raw)))
	return digest, size, err
}

// seed makes a model with versions that are READY, the first of which is the champion. It goes past registration, which
// is not what is measured.
func (p *platform) seed(ctx context.Context, name string, second string, secondSize int64) error {
	_, err := p.store.CreateModel(ctx, registry.Model{
		Name: name, Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy(), CreatedBy: "bench",
	})
	if err != nil {
		return err
	}
	value := registry.Tensor{Name: "x", Datatype: "FP32", Shape: []int64{-1, 1}}
	signature := registry.Signature{Batched: true, Inputs: []registry.Tensor{value}, Outputs: []registry.Tensor{{Name: "y", Datatype: "FP32", Shape: []int64{-1, 1}}}}
	for i, f := range []registry.File{{Path: "model.onnx", Size: p.size, SHA256: p.digest}, {Path: "model.onnx", Size: secondSize, SHA256: second}} {
		manifest, err := registry.NewManifest([]registry.File{f})
		if err != nil {
			return err
		}
		v, err := p.store.CreateVersion(ctx, registry.Version{Model: name, Manifest: manifest, Digest: manifest.Digest(), CreatedBy: "bench"}, registry.Run{})
		if err != nil {
			return err
		}
		if _, err := p.store.FinishVersion(ctx, name, v.Number, registry.Derived{Signature: signature}, ""); err != nil {
			return fmt.Errorf("version %d: %w", i+1, err)
		}
	}
	_, err = p.store.SetRoute(ctx, registry.RouteChange{ChangeID: "seed/" + name, Model: name, Arms: registry.StableOnly(1), Actor: "bench"})
	return err
}

// infer asks a server once.
func (p *platform) infer(ctx context.Context, server int, name string, x float64) (revision string, err error) {
	body := fmt.Sprintf(`{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[%g]}]}`, x)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.servers[server]+"/v2/models/"+name+"/infer", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	a, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer func() { _ = a.Body.Close() }() // read below
	text, err := io.ReadAll(a.Body)
	if err == nil && a.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", a.Status, text)
	}
	return a.Header.Get("X-Orrery-Revision"), err
}

// decode reads an answer of the API.
func decode[T any](r *http.Response, err error) (T, error) {
	var out T
	if err != nil {
		return out, err
	}
	defer func() { _ = r.Body.Close() }() // read below
	raw, err := io.ReadAll(r.Body)
	switch {
	case err != nil:
		return out, err
	case r.StatusCode >= http.StatusMultipleChoices:
		return out, fmt.Errorf("%s: %s", r.Status, raw)
	case len(raw) == 0:
		return out, nil
	}
	return out, json.Unmarshal(raw, &out)
}
