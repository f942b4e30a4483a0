package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/registry"
)

// mixed passes floats, integers and strings through.
func mixed() []byte {
	return onnxfile.Build(onnxfile.Model{
		Name: "mixed", Opset: 17,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 2}}, {Name: "i", Type: onnxfile.Int64, Shape: []int64{-1}}, {Name: "s", Type: onnxfile.String, Shape: []int64{-1, 1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 2}}, {Name: "t", Type: onnxfile.String, Shape: []int64{-1, 1}}, {Name: "j", Type: onnxfile.Int64, Shape: []int64{-1}}},
		Nodes: []onnxfile.Node{
			{Op: "Identity", Inputs: []string{"x"}, Outputs: []string{"y"}},
			{Op: "Identity", Inputs: []string{"s"}, Outputs: []string{"t"}},
			{Op: "Identity", Inputs: []string{"i"}, Outputs: []string{"j"}},
		},
	})
}

// everyType passes a tensor of every datatype through.
func everyType() []byte {
	m := onnxfile.Model{Name: "types", Opset: 17}
	for name, e := range map[string]onnxfile.ElemType{
		"BOOL": onnxfile.Bool, "UINT8": onnxfile.Uint8, "UINT16": onnxfile.Uint16, "UINT32": onnxfile.Uint32, "UINT64": onnxfile.Uint64,
		"INT8": onnxfile.Int8, "INT16": onnxfile.Int16, "INT32": onnxfile.Int32, "INT64": onnxfile.Int64, "FP16": onnxfile.Float16,
		"BF16": onnxfile.BFloat, "FP32": onnxfile.Float, "FP64": onnxfile.Double, "BYTES": onnxfile.String,
	} {
		m.Inputs = append(m.Inputs, onnxfile.Value{Name: "in_" + name, Type: e, Shape: []int64{-1, -1}})
		m.Outputs = append(m.Outputs, onnxfile.Value{Name: "out_" + name, Type: e, Shape: []int64{-1, -1}})
		m.Nodes = append(m.Nodes, onnxfile.Node{Op: "Identity", Inputs: []string{"in_" + name}, Outputs: []string{"out_" + name}})
	}
	return onnxfile.Build(m)
}

// tool is a program that the set-up brings.
func tool(t *testing.T, path ...string) string {
	t.Helper()
	file, err := filepath.Abs(filepath.Join(append([]string{"..", "..", ".tools"}, path...)...))
	require.NoError(t, err)
	return file
}

// The clients of others, which nobody here wrote, work unmodified against a gateway and against a bare worker.
func TestProtocol_ClientsOfOthers(t *testing.T) {
	t.Parallel()
	python, kserve := tool(t, "python", "bin", "python"), tool(t, "kserve", "bin", "python")
	require.FileExists(t, python, "tritonclient is not installed: run `deploy/setup.sh test`")
	require.FileExists(t, kserve, "kserve is not installed: run `deploy/setup.sh test`")
	c := newCluster(t, 1, 1)
	for _, name := range []string{"mixed", "types"} {
		_, err := decode[client.Model](c.api(0).CreateModel(t.Context(), client.NewModel{Name: name}))
		require.NoError(t, err)
	}
	for range 2 {
		run := c.upload("mixed", map[string][]byte{"model.onnx": mixed()})
		require.Equal(t, "SUCCEEDED", run.State, run.Message)
	}
	run := c.upload("types", map[string][]byte{"model.onnx": everyType()})
	require.Equal(t, "SUCCEEDED", run.State, run.Message)
	c.allAtOnce("mixed")
	c.allAtOnce("types")
	_, err := decode[[]client.Alias](c.api(0).SetAlias(t.Context(), "mixed", "next", client.AliasChange{Version: 2}))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		out, err := http.Get(c.workers[0].url() + "/v2/models/mixed/versions/2/ready") //nolint:noctx // a short look
		return err == nil && out.Body.Close() == nil && out.StatusCode == http.StatusOK
	}, 20*time.Second, 50*time.Millisecond)
	for name, n := range map[string]*node{"gateway": c.servers[0], "worker": c.workers[0]} {
		routed := "1" // by the route
		if name == "worker" {
			routed = "2" // a worker knows no route: the newest it holds
		}
		for _, command := range [][]string{
			{python, "triton_client.py", n.http, n.grpc, "mixed", "2", routed},
			{python, "triton_types.py", n.http, n.grpc, "types", "1"},
			{kserve, "kserve_client.py", n.http, n.grpc, "mixed"},
		} {
			command[1] = filepath.Join("testdata", command[1])
			out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
			require.NoError(t, err, "%s %v: %s", name, command[1:], out)
			require.Contains(t, string(out), "ok")
		}
	}
	version, _, err := inferMixed(t, c.servers[0].url(), "mixed@next")
	require.NoError(t, err)
	require.Equal(t, "2", version)
	_, message, err := inferMixed(t, c.servers[0].url(), "mixed@nxet")
	require.NoError(t, err)
	require.Contains(t, message, `did you mean \"next\"`)
	rawBinary(t, c)
	perfAnalyzer(t, c)
}

// rawBinary sends a body that is a tensor and nothing else.
func rawBinary(t *testing.T, c *cluster) {
	t.Helper()
	c.model("plain", 1)
	c.allAtOnce("plain")
	for _, base := range []string{c.servers[0].url(), c.workers[0].url()} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/v2/models/plain/infer", bytes.NewReader([]byte{0, 0, 0x80, 0x3f}))
		require.NoError(t, err)
		request.Header.Set("Inference-Header-Content-Length", "0")
		request.Header.Set("X-Orrery-Timing", "1")
		answer, err := http.DefaultClient.Do(request)
		require.NoError(t, err)
		body, err := io.ReadAll(answer.Body)
		require.NoError(t, errors.Join(err, answer.Body.Close()))
		require.Equal(t, http.StatusOK, answer.StatusCode, string(body))
		require.NotEmpty(t, answer.Header.Get("Inference-Header-Content-Length"), "the answer is binary")
		require.Contains(t, answer.Header.Get("Server-Timing"), "infer;dur=")
	}
}

// perfAnalyzer lets Triton's load generator measure, over both protocols. It reads our statistics, so they must be there.
func perfAnalyzer(t *testing.T, c *cluster) {
	t.Helper()
	program := tool(t, "bin", "perf_analyzer")
	if _, err := os.Stat(program); err != nil {
		t.Log("perf_analyzer cannot run on this system, so it was not: see deploy/setup.sh")
		return
	}
	for name, n := range map[string]*node{"gateway": c.servers[0], "worker": c.workers[0]} {
		for protocol, address := range map[string]string{"http": n.http, "grpc": n.grpc} {
			csv := filepath.Join(t.TempDir(), "out.csv")
			cmd := exec.CommandContext(t.Context(), program, "-m", "plain", "-x", "1", "-u", address, "-i", protocol, "--concurrency-range", "2",
				"--measurement-mode", "count_windows", "--measurement-request-count", "100", "--stability-percentage", "90", "-f", csv)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s over %s: %s", name, protocol, out)
			raw, err := os.ReadFile(csv)
			require.NoError(t, err)
			lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
			require.Len(t, lines, 2, "%s over %s: %s", name, protocol, out)
			require.Contains(t, lines[0], "Server Compute Infer", "it found our statistics")
			require.NotContains(t, string(out), "Failed", "%s over %s", name, protocol)
		}
	}
}

func inferMixed(t *testing.T, base, model string) (version, text string, err error) {
	t.Helper()
	request := `{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]},{"name":"i","datatype":"INT64","shape":[1],"data":[3]},{"name":"s","datatype":"BYTES","shape":[1,1],"data":["a"]}]}`
	answer, err := http.Post(base+"/v2/models/"+model+"/infer", "application/json", strings.NewReader(request)) //nolint:noctx // a test's request
	if err != nil {
		return "", "", err
	}
	defer func() { _ = answer.Body.Close() }()
	var b bytes.Buffer
	_, err = b.ReadFrom(answer.Body)
	return answer.Header.Get("X-Orrery-Version"), b.String(), err
}

// Files that are no good fail their registration with a reason, and leave nothing behind.
func TestRegister_RefusesBadFiles(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 1)
	whole := echo(1, 0)
	external := onnxfile.Build(onnxfile.Model{
		Name: "external", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{{Name: "w", Type: onnxfile.Float, Dims: []int64{1}, External: "weights.bin"}},
		Nodes:        []onnxfile.Node{{Op: "Mul", Inputs: []string{"x", "w"}, Outputs: []string{"y"}}},
	})
	outside := onnxfile.Build(onnxfile.Model{
		Name: "outside", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Initializers: []onnxfile.Tensor{{Name: "w", Type: onnxfile.Float, Dims: []int64{1}, External: "../../etc/passwd"}},
		Nodes:        []onnxfile.Node{{Op: "Mul", Inputs: []string{"x", "w"}, Outputs: []string{"y"}}},
	})
	future := onnxfile.Build(onnxfile.Model{
		Name: "future", Opset: 99,
		Inputs:  []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs: []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Nodes:   []onnxfile.Node{{Op: "Identity", Inputs: []string{"x"}, Outputs: []string{"y"}}},
	})
	greedy := onnxfile.Build(onnxfile.Model{ // asks for more memory than there is, which ONNX Runtime may not survive
		Name: "greedy", Opset: 17,
		Inputs:       []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:      []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, -1}}},
		Initializers: []onnxfile.Tensor{onnxfile.Int64s("shape", []int64{2}, []int64{1 << 20, 1 << 20})},
		Nodes:        []onnxfile.Node{{Op: "Expand", Inputs: []string{"x", "shape"}, Outputs: []string{"y"}}},
	})
	crash := onnxfile.Build(onnxfile.Model{ // a function that calls itself: ONNX Runtime inlines it until its stack overflows
		Name: "crash", Opset: 17,
		Inputs:    []onnxfile.Value{{Name: "x", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Outputs:   []onnxfile.Value{{Name: "y", Type: onnxfile.Float, Shape: []int64{-1, 1}}},
		Nodes:     []onnxfile.Node{{Op: "F", Domain: "d", Inputs: []string{"x"}, Outputs: []string{"y"}}},
		Functions: []onnxfile.Function{{Domain: "d", Name: "F", Inputs: []string{"a"}, Outputs: []string{"b"}, Nodes: []onnxfile.Node{{Op: "F", Domain: "d", Inputs: []string{"a"}, Outputs: []string{"b"}}}}},
	})
	for name, bad := range map[string]struct {
		file []byte
		want string
	}{
		"not ONNX":              {[]byte("#!/bin/sh\necho hello\n"), "not an ONNX model"},
		"empty":                 {nil, "the file is empty"},
		"truncated":             {whole[:len(whole)-20], "not an ONNX model"},
		"external data missing": {external, `"weights.bin", which is not among the files`},
		"external data outside": {outside, "outside its directory"},
		"unsupported opset":     {future, "opset 99"},
		"too greedy":            {greedy, "does not run"},
		"crashes ONNX Runtime":  {crash, "the model crashed the process that tried it"},
	} {
		run := c.upload("m", map[string][]byte{"model.onnx": bad.file})
		require.Equal(t, "FAILED", run.State, name)
		require.Contains(t, run.Message, bad.want, name)
		v, err := decode[client.Version](c.api(0).GetVersion(t.Context(), "m", run.Version))
		require.NoError(t, err)
		require.Equal(t, string(registry.Failed), v.Status)
	}
	_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), "m", nil, canary(2, 1)))
	require.NoError(t, err, "a roll-out of a FAILED version is refused by its run")
	c.consistentNothing("m")
}

// consistentNothing checks that the model serves nothing.
func (c *cluster) consistentNothing(model string) {
	c.t.Helper()
	require.Empty(c.t, c.route(model).Arms)
}

// Requests that are malformed get an error that says what is wrong.
func TestAPI_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("flights", 1)
	api := c.api(0)
	batch, cron := "batch", "flights"
	_, err := decode[client.Schedule](api.CreateSchedule(t.Context(), client.NewSchedule{
		Name: "x", Kind: client.NewScheduleKind(batch), Cron: "0 2 * *", Model: &cron, Batch: &client.NewBatch{Input: "data/x"},
	}))
	require.ErrorContains(t, err, "has 4 fields; want five")
	_, err = decode[client.Schedule](api.CreateSchedule(t.Context(), client.NewSchedule{
		Name: "x", Kind: client.NewScheduleKind(batch), Cron: "99 2 * * *", Model: &cron, Batch: &client.NewBatch{Input: "data/x"},
	}))
	require.ErrorContains(t, err, "cron line")
	_, err = decode[client.Model](api.GetModel(t.Context(), "fligths"))
	require.ErrorContains(t, err, `did you mean "flights"?`)
	_, err = decode[client.Run](api.StartBatch(t.Context(), "flights", nil, client.NewBatch{Input: "records/secret"}))
	require.ErrorContains(t, err, "below data/")
	_, _, _, err = infer(t.Context(), c.servers[0].url(), "flights", 1, "k")
	require.ErrorContains(t, err, "serves nothing yet")

	for _, evil := range []struct {
		header, value string
		want          int
	}{
		{"X-Nothing", "", http.StatusForbidden}, // without a key one may predict here, and no more
		{"Origin", "https://evil.example", http.StatusForbidden},
		{"Authorization", "Bearer ok_not_a_key_that_is_known", http.StatusUnauthorized},
		{"Authorization", "Bearer " + adminKey, http.StatusCreated},
	} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.servers[0].url()+"/api/v1/models", strings.NewReader(`{"name":"evil"}`))
		require.NoError(t, err)
		request.Header.Set("Content-Type", "application/json")
		request.Header.Set(evil.header, evil.value)
		answer, err := http.DefaultClient.Do(request)
		require.NoError(t, err)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, evil.want, answer.StatusCode, evil.value)
		if evil.want >= http.StatusBadRequest {
			require.Contains(t, answer.Header.Get("Content-Type"), "application/problem+json")
		}
	}
}

// The same Idempotency-Key answers the same, and another body under it is refused.
func TestAPI_IdempotencyKey(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	key := "once"
	p := &client.StartRolloutParams{IdempotencyKey: &key}
	first, err := decode[client.Run](c.api(0).StartRollout(t.Context(), "m", p, canary(2, 100_000)))
	require.NoError(t, err)
	again, err := decode[client.Run](c.api(0).StartRollout(t.Context(), "m", p, canary(2, 100_000)))
	require.NoError(t, err)
	require.Equal(t, first.Id, again.Id)
	_, err = decode[client.Run](c.api(0).StartRollout(t.Context(), "m", p, canary(2, 5)))
	require.ErrorContains(t, err, "another body")
}

// `orrery dev` prints where everything is, stops on a signal without leaving a process, and starts again with its state.
func TestDev_StartsStopsAndStartsAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	without := exec.CommandContext(t.Context(), binary, "dev", "--dir", filepath.Join(dir, "without"))
	without.Dir, without.Env = "../..", append(os.Environ(), "ORRERY_ONNXRUNTIME_LIB=/nowhere")
	said, err := without.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(said), "/nowhere")
	for round := range 2 {
		dev := exec.Command(binary, "dev", "--dir", filepath.Join(dir, ".orrery"), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0") //nolint:noctx // interrupted below
		dev.Dir = "../.."                                                                                                            // where .tools is
		var out bytes.Buffer
		dev.Stdout = &out
		require.NoError(t, dev.Start())
		state := filepath.Join(dir, ".orrery", "dev.json")
		require.Eventually(t, func() bool { _, err := os.Stat(state); return err == nil }, 60*time.Second, 50*time.Millisecond)
		cli := func(args ...string) (string, int) {
			cmd := exec.CommandContext(t.Context(), binary, args...)
			cmd.Dir = dir
			raw, _ := cmd.CombinedOutput()
			return string(raw), cmd.ProcessState.ExitCode()
		}
		if round == 0 {
			text, code := cli("model", "create", "m")
			require.Zero(t, code, text)
			text, code = cli("model", "create", "m")
			require.Equal(t, exitConflict, code, text)
			text, code = cli("model", "crate", "m")
			require.Equal(t, exitUsage, code, text)
			text, code = cli("model", "show")
			require.Equal(t, exitUsage, code, text)
			text, code = cli("model", "show", "nope")
			require.Equal(t, exitNotFound, code, text)
		}
		text, code := cli("model", "list", "--output", "json")
		require.Zero(t, code, text)
		require.Contains(t, text, `"name": "m"`, "the state is still there")
		require.NoError(t, dev.Process.Signal(os.Interrupt))
		require.NoError(t, dev.Wait())
		require.Contains(t, out.String(), "Temporal UI")
		require.NoFileExists(t, state)
		left, err := exec.CommandContext(t.Context(), "pgrep", "-f", dir).Output()
		require.Error(t, err, "processes are left: %s", left)
		text, code = cli("model", "list")
		require.Equal(t, exitUnavailable, code, text)
	}
}

// zeros is endless.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A disk that fills up in the middle of an upload is real here: the kernel lets no process of this dev write a file of
// over 64 MB. The upload of 10 GB ends in one clear error, and nothing of it is left.
func TestUpload_ToAFullDisk(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), ".orrery")
	dev := exec.Command("sh", "-c", `ulimit -f 131072 && exec "$@"`, "sh", binary, "dev", "--dir", dir, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0") //nolint:noctx // interrupted below
	dev.Dir = "../.."                                                                                                                                     // where .tools is
	require.NoError(t, dev.Start())
	defer func() {
		require.NoError(t, dev.Process.Signal(os.Interrupt))
		require.NoError(t, dev.Wait())
	}()
	var state devState
	require.Eventually(t, func() bool {
		raw, err := os.ReadFile(filepath.Join(dir, "dev.json"))
		return err == nil && json.Unmarshal(raw, &state) == nil
	}, 60*time.Second, 50*time.Millisecond)
	key, err := os.ReadFile(filepath.Join(dir, "admin.key"))
	require.NoError(t, err)
	const size = 10 << 30
	for name, announced := range map[string]int64{"fills up": size, "cannot fit": 1 << 60} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, state.API+"/api/v1/blobs/"+strings.Repeat("ab", 32), io.LimitReader(zeros{}, announced))
		require.NoError(t, err)
		request.ContentLength = announced
		request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(key)))
		request.Header.Set("Expect", "100-continue")
		answer, err := http.DefaultClient.Do(request)
		require.NoError(t, err, name)
		var p client.Problem
		require.NoError(t, json.NewDecoder(answer.Body).Decode(&p), name)
		require.NoError(t, answer.Body.Close())
		require.Equal(t, http.StatusInsufficientStorage, answer.StatusCode, name)
		require.Equal(t, "application/problem+json", answer.Header.Get("Content-Type"), name)
		require.Equal(t, string(registry.StorageFull), p.Code, name)
		left := 0
		require.NoError(t, filepath.WalkDir(filepath.Join(dir, "objects"), func(_ string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				left++
			}
			return err
		}))
		require.Zero(t, left, "%s: nothing half-written", name)
	}
}
