package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/internal/testenv"
)

// peer is another server: how it is started and called.
type peer struct {
	name  string
	start func(b *benchmark, port, file string, m model) (env, args []string, err error)
	call  func(port string, m model) (caller, func(), error)
}

// width is the shape of a row in words.
func (m model) width() []string {
	var out []string
	for _, d := range m.row {
		out = append(out, strconv.FormatInt(d, 10))
	}
	return out
}

func (b *benchmark) venv(name, program string) string {
	path, err := filepath.Abs(filepath.Join(b.peers, name, "bin", program))
	if err != nil {
		return program
	}
	return path
}

func script(name string) string {
	path, err := filepath.Abs(filepath.Join("bench", "peers", name))
	if err != nil {
		return name
	}
	return path
}

func plainJSON(path string) func(string, model) (caller, func(), error) {
	return func(port string, m model) (caller, func(), error) {
		body, err := json.Marshal(map[string]any{"x": values(m)})
		return overHTTP("http://127.0.0.1:"+port+path, body, map[string]string{"Content-Type": "application/json"}), func() {}, err
	}
}

func protocolJSON(port string, m model) (caller, func(), error) {
	body := strings.Replace(string(jsonBody(m)), `"name":"x"`, `"name":"x","parameters":{}`, 1)
	return overHTTP("http://127.0.0.1:"+port+"/v2/models/"+m.name+"/infer", []byte(body), map[string]string{"Content-Type": "application/json"}), func() {}, nil
}

var peers = []peer{
	{"LitServe, REST JSON", func(b *benchmark, port, file string, m model) ([]string, []string, error) {
		return nil, append([]string{b.venv("litserve", "python"), script("litserve_server.py"), port, file}, m.width()...), nil
	}, plainJSON("/predict")},
	{"BentoML, REST JSON", func(b *benchmark, port, file string, m model) ([]string, []string, error) {
		return []string{"MODEL=" + file, "WIDTH=" + strings.Join(m.width(), " "), "BENTOML_DO_NOT_TRACK=1", "BENTOML_HOME=" + b.dir},
			[]string{b.venv("bentoml", "bentoml"), "serve", "bentoml_server:Service", "--working-dir", script(""), "--port", port, "--host", "127.0.0.1"}, nil
	}, plainJSON("/predict")},
	{"KServe Python server, REST JSON", func(b *benchmark, port, file string, m model) ([]string, []string, error) {
		return nil, append([]string{b.venv("kserve", "python"), script("kserve_server.py"), port, m.name, file}, m.width()...), nil
	}, protocolJSON},
	{"MLServer, REST JSON", mlserver, protocolJSON},
	{"MLServer, gRPC", mlserver, func(port string, m model) (caller, func(), error) {
		n, err := strconv.Atoi(port)
		if err != nil {
			return nil, nil, err
		}
		return overGRPC("127.0.0.1:"+strconv.Itoa(n+1), m)
	}},
}

// mlserver writes MLServer's two files of settings.
func mlserver(b *benchmark, port, file string, m model) (env, args []string, err error) {
	dir, err := os.MkdirTemp(b.dir, "mlserver-*")
	if err != nil {
		return nil, nil, err
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return nil, nil, err
	}
	settings := fmt.Sprintf(`{"host":"127.0.0.1","http_port":%d,"grpc_port":%d,"metrics_endpoint":null,"parallel_workers":0,"debug":false}`, n, n+1)
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "settings.json"), []byte(settings), 0o600),
		os.WriteFile(filepath.Join(dir, "model-settings.json"), []byte(`{"name":"`+m.name+`","implementation":"mlserver_runtime.Runtime"}`), 0o600))
	return []string{"MODEL=" + file, "WIDTH=" + strings.Join(m.width(), " "), "PYTHONPATH=" + script("")}, []string{b.venv("mlserver", "mlserver"), "start", dir}, err
}

// generatorLimit is how many requests a second one core of load offers at three times saturation; faster servers are not
// overloaded from it.
const generatorLimit = 10_000

// compared is what another server showed.
type compared struct {
	name    string
	rate    float64
	cpu     time.Duration // a request
	peak    int64
	low     result // at half its rate
	goodput string // beyond it
}

// goodputLoads are the offers of the comparison, in parts of what saturates.
var goodputLoads = []float64{0.5, 1, 2, 3}

// goodputs offers a server from half to three times what saturates it, with a deadline, and returns what it answered in
// time, in parts of what saturates.
func (b *benchmark) goodputs(ctx context.Context, call caller, saturated float64) string {
	const deadline = 50 * time.Millisecond
	var out []string
	for _, load := range goodputLoads {
		got := openLoop(ctx, call, math.Max(load*saturated, 2), b.length/4, b.length, deadline)
		out = append(out, fmt.Sprintf("%.2f", float64(got.inTime)/got.took.Seconds()/saturated))
	}
	return strings.Join(out, ", ")
}

// comparePeers compares other servers with Orrery, each alone on the server's core.
func (b *benchmark) comparePeers(ctx context.Context) error {
	for name := range strings.SplitSeq(b.names, ",") {
		if err := b.compareOn(ctx, b.model(name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (b *benchmark) compareOn(ctx context.Context, m model) error {
	file := filepath.Join(b.dir, m.name+".onnx")
	if err := os.WriteFile(file, m.file, 0o600); err != nil {
		return err
	}
	var others []compared
	fastest, calmest := 0.0, time.Duration(math.MaxInt64)
	for _, p := range peers {
		got, err := b.measurePeer(ctx, p, m, file)
		if errors.Is(err, os.ErrNotExist) {
			b.progress("%s is not installed: deploy/setup.sh bench", p.name)
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		others = append(others, got)
		fastest, calmest = math.Max(fastest, got.rate), min(calmest, got.low.quantile(0.99))
	}
	r, err := b.start(ctx, []string{m.name})
	if err != nil {
		return err
	}
	defer r.stop()
	paths, stop, err := r.paths(m)
	if err != nil {
		return err
	}
	defer stop()
	const callers = 16
	load := math.Max(fastest/2, 10)
	b.printf("## %s on other servers: %d callers; p50 and p99 with arrivals at half of what the server can, for Orrery at half of what the fastest of the others can (%.0f/s)\n\n", m.name, callers, load)
	b.printf("Goodput is answers within 50 ms, in parts of what the server can, when it is offered 0.5, 1, 2 and 3 times that.\n\n")
	b.printf("| server | requests/s | Orrery's worker over gRPC is | server CPU us a request | memory MiB | p50 ms | p99 ms | p99.9 ms | goodput |\n|---|---|---|---|---|---|---|---|---|\n")
	ours := 0.0
	for _, p := range paths {
		got, cpu, err := b.saturate(ctx, r, p, callers)
		if err != nil {
			return err
		}
		if ours == 0 {
			ours = got.rate()
		}
		low := b.calm(ctx, r, p, load)
		if p.name == "worker, gRPC" && len(others) > 0 {
			b.ratio("%s: worker over gRPC is %.1fx the fastest other server, with %.2f of the least p99 at half of its load", m.name, got.rate()/fastest, float64(low.quantile(0.99))/float64(calmest))
		}
		goodput := ""
		if p.name == "worker, gRPC" && got.rate() < generatorLimit {
			resume := r.workerAlone()
			goodput = b.goodputs(ctx, p.call, got.rate())
			resume()
		}
		b.printf("| Orrery: %s | %.0f | | %s | %d | %s | %s | %s | %s |\n", p.name, got.rate(), us(cpu), used(p.processes).peak>>20, ms(low.quantile(0.5)), ms(low.quantile(0.99)), ms(low.quantile(0.999)), goodput)
	}
	for _, p := range others {
		b.printf("| %s | %.0f | %.1fx | %s | %d | %s | %s | %s | %s |\n", p.name, p.rate, ours/p.rate, us(p.cpu), p.peak>>20, ms(p.low.quantile(0.5)), ms(p.low.quantile(0.99)), ms(p.low.quantile(0.999)), p.goodput)
	}
	b.printf("\n")
	return nil
}

// calm measures latency below saturation.
func (b *benchmark) calm(ctx context.Context, r *roles, p path, rate float64) result {
	if len(p.processes) == 1 {
		defer r.workerAlone()()
	}
	return openLoop(ctx, p.call, rate, b.length/4, 2*b.length, 0)
}

// measurePeer starts another server, measures it and stops it. It ends in os.ErrNotExist when it is not installed.
func (b *benchmark) measurePeer(ctx context.Context, p peer, m model, file string) (compared, error) {
	out := compared{name: p.name}
	number, err := testenv.FreePort()
	if err != nil {
		return out, err
	}
	port := strconv.Itoa(number)
	env, args, err := p.start(b, port, file, m)
	if err == nil {
		_, err = os.Stat(args[0])
	}
	if err != nil {
		return out, err
	}
	b.progress("%s", p.name)
	server, err := testenv.NewProcess("peer", env, pinned(args...)...)
	if err == nil {
		err = server.Start()
	}
	if err != nil {
		return out, err
	}
	defer server.Kill()
	call, stop, err := p.call(port, m)
	if err != nil {
		return out, err
	}
	defer stop()
	if err := awaitAnswer(ctx, call); err != nil {
		return out, fmt.Errorf("no answer: %w\n%s", err, server.Log())
	}
	before := treeUsage(server.PID())
	got := closedLoop(ctx, call, 16, b.length/4, b.length)
	after := treeUsage(server.PID())
	share := got.took.Seconds() / (got.took + b.length/4).Seconds()
	out.rate, out.peak = got.rate(), after.peak
	out.cpu = time.Duration(float64(after.cpu-before.cpu) * share / float64(max(got.ok, 1)))
	out.low = openLoop(ctx, call, math.Max(out.rate/2, 10), b.length/4, 2*b.length, 0)
	out.goodput = b.goodputs(ctx, call, out.rate)
	return out, nil
}

// awaitAnswer calls until there is an answer, for a minute.
func awaitAnswer(ctx context.Context, call caller) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		one, stop := context.WithTimeout(ctx, 5*time.Second)
		err := call(one)
		stop()
		if err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// treeUsage adds up a process and all that descend from it: Python's servers are several.
func treeUsage(root int) usage {
	var sum usage
	list, err := os.ReadDir("/proc")
	if err != nil {
		return sum
	}
	parents := map[int]int{}
	for _, e := range list {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		parents[pid], _ = strconv.Atoi(fields[1]) // a number by the kernel's word
	}
	for pid := range parents {
		at := pid
		for at != root && at > 1 {
			at = parents[at]
		}
		if at == root {
			u := usageOf(pid)
			sum.cpu, sum.peak = sum.cpu+u.cpu, sum.peak+u.peak
		}
	}
	return sum
}
