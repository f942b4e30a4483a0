package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/onnxfile"
)

// named is echo with a named feature, so that tables can be scored.
func named() []byte {
	return onnxfile.Build(onnxfile.Model{
		Name: "named", Opset: 17, Metadata: map[string]string{"features": "x"},
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{onnxfile.Floats("one", []int64{1}, []float64{1})},
		Nodes:        []onnxfile.Node{{Op: "Add", Inputs: []string{"x", "one"}, Outputs: []string{"y"}}},
	})
}

// The orchestrator and its data process die in the middle of a batch job; it goes on, and every row is there once.
func TestBatch_ResumesAfterAKill(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	_, err := decode[client.Model](c.api(0).CreateModel(t.Context(), client.NewModel{Name: "m"}))
	require.NoError(t, err)
	run := c.upload("m", map[string][]byte{"model.onnx": named()})
	require.Equal(t, "SUCCEEDED", run.State, run.Message)
	c.allAtOnce("m")
	const rows, per = 60_000, 500
	var table bytes.Buffer
	table.WriteString("id,x\n")
	for i := range rows {
		fmt.Fprintf(&table, "%d,%d\n", i, i%1000)
	}
	size := int64(table.Len())
	_, err = decode[struct{}](c.api(0).PutObjectWithBody(t.Context(), &client.PutObjectParams{Key: "data/in.csv", ContentLength: size}, "application/octet-stream", &table))
	require.NoError(t, err)
	part := int64(per)
	run, err = decode[client.Run](c.api(0).StartBatch(t.Context(), "m", nil, client.NewBatch{Input: "data/in.csv", RowsPerPartition: &part}))
	require.NoError(t, err)
	c.phase(run.Id, "scored 16 of")
	c.orchestrator.Kill()
	time.Sleep(500 * time.Millisecond)
	require.NoError(t, c.orchestrator.Start())

	run = c.ended(run.Id)
	require.Equal(t, "SUCCEEDED", run.State, run.Message)
	m, err := decode[activities.BatchManifest](c.api(0).GetObject(t.Context(), &client.GetObjectParams{Key: "batch/" + run.Id + "/_manifest.json"}))
	require.NoError(t, err)
	require.EqualValues(t, rows, m.Rows)
	require.Zero(t, m.Failed)
	require.Len(t, m.Parts, rows/per)
	seen := map[string]bool{}
	for _, p := range m.Parts {
		require.False(t, seen[p.Key], "partition %s is there twice", p.Key)
		seen[p.Key] = true
		require.EqualValues(t, per, p.Rows)
	}
}

// The protocol is no way around the registry: what is not registered cannot be loaded, and what a route holds cannot be
// unloaded.
func TestProtocol_LoadAndUnloadGoThroughTheRegistry(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	post := func(path, body string) (int, string) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.servers[0].url()+path, strings.NewReader(body))
		require.NoError(t, err)
		r.Header.Set("Authorization", "Bearer "+adminKey)
		answer, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		var b bytes.Buffer
		_, err = b.ReadFrom(answer.Body)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		return answer.StatusCode, b.String()
	}
	code, text := post("/v2/repository/models/other/load", "{}")
	require.Equal(t, http.StatusNotFound, code, text)
	code, text = post("/v2/repository/models/m/load", `{"parameters":{"file:1/model.onnx":"AAAA"}}`)
	require.Equal(t, http.StatusForbidden, code, text)
	code, text = post("/v2/repository/models/m/unload", "{}")
	require.Equal(t, http.StatusConflict, code, text)
	code, text = post("/v2/repository/models/m/load", `{"parameters":{"version":"2"}}`)
	require.Equal(t, http.StatusOK, code, text)
	code, text = post("/v2/models/m/versions/2/infer", `{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}`)
	require.Equal(t, http.StatusOK, code, text)
	require.Contains(t, text, `"model_version":"2"`)
	code, text = post("/v2/repository/models/m/unload", `{"parameters":{"version":"2"}}`)
	require.Equal(t, http.StatusOK, code, text)
}

// The control-plane binary, built without cgo, says which roles it cannot run.
func TestControlBinary_SaysWhatItCannotDo(t *testing.T) {
	t.Parallel()
	control := filepath.Join(t.TempDir(), "orrery")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", control, ".")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	worker := exec.CommandContext(t.Context(), control, "worker", "--servers", "127.0.0.1:1", "--store", "dir:"+t.TempDir())
	worker.Env = append(worker.Environ(), "ORRERY_JOIN_TOKEN=x")
	worker.Dir = "../.."
	out, err = worker.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "CGO_ENABLED=0 and cannot run models")
}
