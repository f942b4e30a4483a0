//go:build cgo

package worker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc/metadata"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/engine/onnx"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/artifact"
)

// bench is a cache over real models in a directory, without the network around it.
type bench struct {
	t       testing.TB
	cache   *cache
	service *service
	objects *artifact.Dir
	metrics *prometheus.Registry
}

func newBench(t testing.TB) *bench {
	t.Helper()
	runtime, err := onnx.Start(testenv.OnnxRuntime(t))
	require.NoError(t, err)
	objects, err := artifact.OpenDir(t.TempDir())
	require.NoError(t, err)
	b := &bench{t: t, objects: objects, metrics: prometheus.NewRegistry()}
	b.cache = newCache(t.Context(), Config{CacheDir: t.TempDir(), Threads: 2}, runtime, objects, slog.New(slog.DiscardHandler))
	b.cache.metrics = newMetrics(b.metrics)
	b.metrics.MustRegister(&collector{b.cache, func() []registry.Device { return nil }})
	b.service = &service{cache: b.cache, timeout: 10 * time.Second, ready: func() bool { return true }, trace: telemetry.NewTracer("test")}
	t.Cleanup(func() {
		b.cache.close()
		require.NoError(t, objects.Close())
	})
	return b
}

// version stores a model that adds its number to what it is given, and returns what a server would wish for.
func (b *bench) version(model string, number int, weights int64, change func(*registry.ServingConfig)) held {
	b.t.Helper()
	m := onnxfile.Model{
		Name: "add", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{onnxfile.Floats("n", []int64{1}, []float64{float64(number)}), onnxfile.Floats("w", []int64{max(weights, 1)}, make([]float64, max(weights, 1)))},
		Nodes:        []onnxfile.Node{{Op: "Add", Inputs: []string{"x", "n"}, Outputs: []string{"y"}}},
	}
	raw := onnxfile.Build(m)
	sum := sha256.Sum256(raw)
	file := registry.File{Path: "model.onnx", Size: int64(len(raw)), SHA256: hex.EncodeToString(sum[:])}
	require.NoError(b.t, registry.PutBlob(b.t.Context(), b.objects, file.SHA256, file.Size, bytes.NewReader(raw)))
	manifest, err := registry.NewManifest([]registry.File{file})
	require.NoError(b.t, err)
	tensor := func(name string) []registry.Tensor {
		return []registry.Tensor{{Name: name, Datatype: registry.FP32, Shape: []int64{-1, 1}}}
	}
	h := held{
		key: key{model, number}, digest: manifest.Digest(), manifest: manifest, config: registry.DefaultServingConfig(),
		signature: registry.Signature{Inputs: tensor("x"), Outputs: tensor("y"), Batched: true},
	}
	if change != nil {
		change(&h.config)
	}
	return h
}

func (b *bench) ask(ctx context.Context, model string, version int) (*inference.ModelInferResponse, error) {
	return b.service.ModelInfer(ctx, &inference.ModelInferRequest{
		ModelName: model, ModelVersion: strconv.Itoa(version),
		Inputs:           []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "FP32", Shape: []int64{1, 1}}},
		RawInputContents: [][]byte{{0, 0, 0, 0}},
	})
}

func (b *bench) states() string {
	var out []string
	for _, v := range b.cache.list() {
		state := string(v.State)
		if v.Evicted {
			state = "EVICTED"
		}
		out = append(out, fmt.Sprintf("%s:%d %s", v.Model, v.Version, state))
	}
	return strings.Join(out, ", ")
}

func (b *bench) await(want string) {
	b.t.Helper()
	require.Eventually(b.t, func() bool { return b.states() == want }, 20*time.Second, 5*time.Millisecond, "want %q", want)
}

// A version is swapped under load for one with another serving config, again and again: no request fails, and each is
// answered by the version it asked for.
func TestCache_SwapsUnderLoad(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	config := func(n int) func(*registry.ServingConfig) {
		return func(c *registry.ServingConfig) {
			c.MaxBatch, c.WorkerLabels = 1+n, map[string]string{"n": strconv.Itoa(n)}
		}
	}
	b.cache.hold("s", []held{b.version("m", 1, 0, config(1))})
	b.await("m:1 READY")
	ctx, stop := context.WithCancel(t.Context())
	var asked atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				a, err := b.ask(t.Context(), "m", 1)
				if err != nil || !bytes.Equal(a.GetRawOutputContents()[0], []byte{0, 0, 0x80, 0x3f}) {
					t.Errorf("got %v, %v", a, err)
					return
				}
				asked.Add(1)
			}
		})
	}
	for n := range 40 {
		want := b.version("m", 1, 0, config(n+2))
		b.cache.hold("s", []held{want})
		require.Eventually(t, func() bool {
			e, err := b.cache.find("m", 1)
			return err == nil && e.same(want)
		}, 20*time.Second, time.Millisecond)
	}
	stop()
	wg.Wait()
	t.Logf("%d answers over 40 swaps", asked.Load())
	require.Greater(t, asked.Load(), int64(100))
}

// When memory is short, what nothing leases goes first, the least valuable of it; it comes back when it is asked for;
// and when only leased versions are left, the one that does not fit says so while the others go on.
func TestCache_EvictsWithinItsBudget(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const each = 100 << 20
	b.cache.memory.budget = 3 * each
	b.cache.memory.known = map[string]int64{}
	b.cache.memory.resident = func() int64 { // called under the cache's lock
		n := int64(0)
		for _, e := range b.cache.entries {
			if e.state == registry.Loaded || e.state == registry.Draining {
				n += each
			}
		}
		return n
	}
	wish := map[int]held{}
	for n := 1; n <= 4; n++ {
		wish[n] = b.version("m", n, 0, nil)
		b.cache.memory.known[wish[n].digest] = each
	}
	leased := wish[1]
	leased.leased = true
	b.cache.hold("s", []held{leased, wish[2], wish[3]})
	b.await("m:1 READY, m:2 READY, m:3 READY")
	time.Sleep(20 * time.Millisecond)
	_, err := b.ask(t.Context(), "m", 2) // so that 3 was idle for longer
	require.NoError(t, err)
	for _, e := range b.cache.entries {
		e.took, e.memory = time.Second, each // as if they had cost the same
	}
	b.cache.hold("s", []held{leased, wish[2], wish[3], wish[4]})
	b.await("m:1 READY, m:2 READY, m:3 EVICTED, m:4 READY")
	a, err := b.ask(t.Context(), "m", 3)
	require.NoError(t, err, "it comes back when it is asked for")
	require.Equal(t, "3", a.GetModelVersion())
	require.Contains(t, b.states(), "EVICTED", "and another one went")
	require.Contains(t, b.states(), "m:1 READY")

	for n := range wish {
		h := wish[n]
		h.leased = true
		wish[n] = h
	}
	b.cache.hold("s", []held{wish[1], wish[2], wish[3], wish[4]})
	refused := func(v registry.LoadedVersion) bool { return v.State == registry.Cold && v.Error != "" }
	require.Eventually(t, func() bool {
		return strings.Count(b.states(), "READY") == 3 && slices.ContainsFunc(b.cache.list(), refused)
	}, 20*time.Second, 5*time.Millisecond)
	for _, v := range b.cache.list() {
		if refused(v) {
			require.Contains(t, v.Error, "routes or runs hold the rest")
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			_, err := b.ask(ctx, "m", v.Version)
			cancel()
			require.ErrorContains(t, err, "cannot be loaded")
		} else {
			_, err := b.ask(t.Context(), "m", v.Version)
			require.NoError(t, err)
		}
	}
	b.cache.hold("s", nil)
	b.await("")
}

// A version that loads slowly blocks no other; requests for it wait until their deadline.
func TestCache_LoadingOneBlocksNoOther(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	gone := b.version("gone", 1, 77, nil)
	require.NoError(t, b.objects.Delete(t.Context(), registry.BlobKey(gone.manifest.Files[0].SHA256)))
	b.cache.hold("s", []held{gone, b.version("here", 1, 0, nil)})
	_, err := b.ask(t.Context(), "here", 1)
	require.NoError(t, err)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = b.ask(ctx, "gone", 1)
	require.ErrorContains(t, err, "cannot be loaded")
	require.Less(t, time.Since(began), 2*time.Second)
}

// What the metrics say adds up with what happened, under our names and under Triton's.
func TestMetrics_AddUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.cache.hold("s", []held{b.version("m", 1, 0, nil)})
	for range 7 {
		_, err := b.ask(t.Context(), "m", 1)
		require.NoError(t, err)
	}
	_, err := b.service.ModelInfer(t.Context(), &inference.ModelInferRequest{ModelName: "m", ModelVersion: "1"})
	require.Error(t, err)
	require.NoError(t, testutil.GatherAndCompare(b.metrics, strings.NewReader(`
# HELP nv_inference_count Rows inferred.
# TYPE nv_inference_count counter
nv_inference_count{model="m",version="1"} 7
# HELP nv_inference_exec_count Runs.
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="m",version="1"} 7
# HELP nv_inference_request_failure Requests failed.
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="m",version="1"} 1
# HELP nv_inference_request_success Requests answered.
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="m",version="1"} 7
# HELP orrery_worker_failures_total Requests that failed, by the error's code.
# TYPE orrery_worker_failures_total counter
orrery_worker_failures_total{code="invalid",model="m",version="1"} 1
`), "nv_inference_count", "nv_inference_exec_count", "nv_inference_request_success", "nv_inference_request_failure", "orrery_worker_failures_total"))
	families, err := b.metrics.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "orrery_worker_request_seconds" {
			h := f.GetMetric()[0].GetHistogram()
			require.EqualValues(t, 7, h.GetSampleCount())
			require.NotEmpty(t, h.GetPositiveSpan(), "native histograms are on")
			require.NotEmpty(t, h.GetBucket(), "and classic ones")
		}
	}
}

// keeping is an exporter that still has its spans after its end.
type keeping struct{ *tracetest.InMemoryExporter }

func (keeping) Shutdown(context.Context) error { return nil }

// A request that comes with a W3C trace context leaves a span of the worker under it, with the wait and the run below.
func TestTrace_FollowsTheCaller(t *testing.T) {
	exporter := keeping{tracetest.NewInMemoryExporter()}
	stop := telemetry.StartWith(exporter, "test")
	b := newBench(t)
	b.cache.hold("s", []held{b.version("m", 1, 0, nil)})
	const parent = "4bf92f3577b34da6a3ce929d0e0e4736"
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", "00-"+parent+"-00f067aa0ba902b7-01"))
	_, err := b.ask(ctx, "m", 1)
	require.NoError(t, err)
	var names []string
	require.NoError(t, stop(t.Context()))
	for _, s := range exporter.GetSpans() {
		require.Equal(t, parent, s.SpanContext.TraceID().String())
		names = append(names, s.Name)
	}
	require.ElementsMatch(t, []string{"worker.infer", "queue", "run"}, names)
}

// Files of a version that is dropped go; those that another version shares stay.
func TestCache_DropsFiles(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	h := b.version("m", 1, 0, nil)
	b.cache.hold("s", []held{h})
	b.await("m:1 READY")
	require.FileExists(t, filepath.Join(b.cache.dir, h.digest, "model.onnx"))
	b.cache.hold("s", nil)
	b.await("")
	require.NoFileExists(t, filepath.Join(b.cache.dir, h.digest, "model.onnx"))
}

// Servers wish for versions one by one; what any of them wishes for is held, and leased when any says so.
func TestCache_JoinsTheWishesOfServers(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	one, two := b.version("m", 1, 0, nil), b.version("m", 2, 0, nil)
	leased := one
	leased.leased = true
	isLeased := func() bool {
		b.cache.mu.Lock()
		defer b.cache.mu.Unlock()
		return b.cache.entries[one.key].leased
	}
	b.cache.hold("s", []held{leased})
	b.cache.hold("t", []held{one})
	b.await("m:1 READY")
	require.True(t, isLeased())
	b.cache.change("s", []held{two}, []key{one.key})
	b.await("m:1 READY, m:2 READY")
	require.False(t, isLeased(), "t does not lease it")
	b.cache.change("t", nil, []key{one.key})
	b.await("m:2 READY")
	b.cache.hold("s", []held{one})
	b.await("m:1 READY")
}

// A version that is wished for again while it goes comes back: nobody says so a second time.
func TestCache_ComesBackWhileItGoes(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	h := b.version("m", 1, 0, nil)
	b.cache.hold("s", []held{h})
	b.await("m:1 READY")
	for range 30 {
		b.cache.change("s", nil, []key{h.key})
		b.cache.change("s", []held{h}, nil)
		require.Eventually(t, func() bool {
			b.cache.mu.Lock()
			defer b.cache.mu.Unlock()
			e := b.cache.entries[h.key]
			return e != nil && !e.leaving && e.state == registry.Loaded
		}, 20*time.Second, time.Millisecond)
		_, err := b.ask(t.Context(), "m", 1)
		require.NoError(t, err)
	}
	require.FileExists(t, filepath.Join(b.cache.dir, h.digest, "model.onnx"))
}

// A version that goes while a newer config of it loads leaves nothing behind, whichever of the two is gone first.
func TestCache_DropsBothConfigs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	h := b.version("m", 1, 0, nil)
	for _, nextFirst := range []bool{true, false} {
		e := &entry{held: h, next: &entry{held: h}}
		b.cache.mu.Lock()
		b.cache.entries[h.key] = e
		b.cache.mu.Unlock()
		if nextFirst {
			b.cache.drop(e.next)
			b.cache.drop(e)
		} else {
			b.cache.drop(e)
			require.Len(t, b.cache.list(), 1, "the newer config takes its place")
			b.cache.drop(e.next)
		}
		require.Empty(t, b.cache.list())
	}
}
