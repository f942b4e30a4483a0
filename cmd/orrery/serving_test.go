package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/orrery-ml/orrery/api/client"
)

// ask sends one request over REST and returns its status, the version that answered and, when none did, why.
func (c *cluster) ask(path string) (status int, version, fault string) {
	const body = `{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}`
	answer, err := http.Post(c.servers[0].url()+"/v2/models/"+path+"/infer", "application/json", strings.NewReader(body)) //nolint:noctx // the server has a deadline
	if err != nil {
		return 0, "", err.Error()
	}
	raw, err := io.ReadAll(answer.Body)
	if err = errors.Join(err, answer.Body.Close()); err != nil {
		return 0, "", err.Error()
	}
	return answer.StatusCode, answer.Header.Get("X-Orrery-Version"), string(raw)
}

// configure changes a model's serving config.
func (c *cluster) configure(model, change string) {
	c.t.Helper()
	raw := json.RawMessage(change)
	_, err := decode[client.Model](c.api(0).ConfigureModel(c.t.Context(), model, client.ModelConfiguration{Config: &raw}))
	require.NoError(c.t, err)
}

// states lists where the versions of the model m are in the workers.
func (c *cluster) states() string {
	leases, err := decode[[]client.Lease](c.api(0).ListLeases(c.t.Context()))
	require.NoError(c.t, err)
	var out []string
	for _, l := range leases {
		for _, v := range l.Worker.Loaded {
			if v.Model == "m" && l.Live {
				out = append(out, fmt.Sprintf("%s:%d %s", l.Node, v.Version, v.State))
			}
		}
	}
	return strings.Join(out, ", ")
}

// A worker that is asked to stop finishes what it has and takes no more; under load no request fails. When it comes back
// it takes its share again.
func TestWorker_LeavesWithoutAFailedRequest(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 2)
	c.model("m", 1)
	c.allAtOnce("m")
	require.Eventually(t, func() bool { return strings.Count(c.states(), "READY") == 2 }, 20*time.Second, 50*time.Millisecond)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var asked atomic.Int64
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if status, _, body := c.ask("m"); status != http.StatusOK {
					t.Errorf("%d %s", status, body)
					return
				}
				asked.Add(1)
			}
		})
	}
	for range 3 {
		time.Sleep(300 * time.Millisecond)
		require.NoError(t, c.workers[0].Interrupt(), "it stops by itself: %s", c.workers[0].Log())
		require.NoError(t, c.workers[0].Start())
		require.Eventually(t, func() bool { return strings.Count(c.states(), "READY") == 2 }, 20*time.Second, 50*time.Millisecond)
	}
	stop()
	wg.Wait()
	require.Greater(t, asked.Load(), int64(200))
	t.Logf("%d answers while a worker left three times", asked.Load())
}

// A version that no route needs is loaded when it is asked for, kept while it is asked for, and unloaded when it is
// idle; the next request brings it back.
func TestVersion_LoadsOnDemandAndUnloadsWhenIdle(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	c.configure("m", `{"keep_alive_s":1}`)
	require.Eventually(t, func() bool { return c.states() == "worker-0:1 READY" }, 20*time.Second, 50*time.Millisecond)
	for range 2 {
		status, version, body := c.ask("m/versions/2")
		require.Equal(t, http.StatusOK, status, body)
		require.Equal(t, "2", version)
		// Requests keep it, beyond the time that one alone would.
		for began := time.Now(); time.Since(began) < 12*time.Second; time.Sleep(500 * time.Millisecond) {
			status, _, body := c.ask("m/versions/2")
			require.Equal(t, http.StatusOK, status, body)
		}
		require.Contains(t, c.states(), "worker-0:2 READY")
		require.Eventually(t, func() bool { return c.states() == "worker-0:1 READY" }, 30*time.Second, 100*time.Millisecond, "idle, it goes")
	}
}

// A model goes where its labels say, and nowhere else.
func TestModel_GoesWhereItsLabelsSay(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	special := c.node("worker", "special", "--servers", c.servers[0].grpc, "--cache-dir", t.TempDir(), "--label", "gpu=none", "--label", "zone=b")
	c.workers = append(c.workers, special)
	require.NoError(t, special.Start())
	c.model("m", 1)
	c.allAtOnce("m")
	require.Eventually(t, func() bool { return strings.Count(c.states(), "READY") == 2 }, 20*time.Second, 50*time.Millisecond)
	c.configure("m", `{"worker_labels":{"zone":"b"}}`)
	require.Eventually(t, func() bool { return c.states() == "special:1 READY" }, 20*time.Second, 50*time.Millisecond, "now %s", c.states())
	status, _, body := c.ask("m")
	require.Equal(t, http.StatusOK, status, body)
}

// A request that comes with a W3C trace context leaves its way through gateway and worker with a collector, in one trace.
func TestTrace_RunsThroughGatewayAndWorker(t *testing.T) {
	t.Parallel()
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	var mu sync.Mutex
	parents, names := map[string]string{}, map[string]string{} // by span id
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		var got collectorpb.ExportTraceServiceRequest
		if err := errors.Join(err, proto.Unmarshal(raw, &got)); err != nil {
			t.Errorf("collector: %v", err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, resource := range got.GetResourceSpans() {
			for _, scope := range resource.GetScopeSpans() {
				for _, s := range scope.GetSpans() {
					if hex.EncodeToString(s.GetTraceId()) == trace {
						names[hex.EncodeToString(s.GetSpanId())] = s.GetName()
						parents[hex.EncodeToString(s.GetSpanId())] = hex.EncodeToString(s.GetParentSpanId())
					}
				}
			}
		}
	}))
	t.Cleanup(collector.Close)
	c := newCluster(t, 1, 1, "OTEL_EXPORTER_OTLP_ENDPOINT="+collector.URL, "OTEL_BSP_SCHEDULE_DELAY=200")
	c.model("m", 1)
	c.allAtOnce("m")
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.servers[0].url()+"/v2/models/m/infer",
		strings.NewReader(`{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}`))
	require.NoError(t, err)
	request.Header.Set("traceparent", "00-"+trace+"-00f067aa0ba902b7-01")
	answer, err := http.DefaultClient.Do(request)
	require.NoError(t, err)
	require.NoError(t, answer.Body.Close())
	require.Equal(t, http.StatusOK, answer.StatusCode)
	way := func() string { // from the run up to the caller
		mu.Lock()
		defer mu.Unlock()
		for id, name := range names {
			if name == "run" {
				var up []string
				for at := id; at != ""; at = parents[at] {
					up = append(up, names[at])
				}
				return strings.Join(up, " < ")
			}
		}
		return ""
	}
	require.Eventually(t, func() bool { return way() == "run < worker.infer < gateway.attempt < gateway.infer < " }, 20*time.Second, 100*time.Millisecond, "got %q", way())
	mu.Lock()
	defer mu.Unlock()
	require.Len(t, names, 5, "%v", names)
}
