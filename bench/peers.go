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
	start func(b *benchmark, port, model string) (env, args []string, err error)
	call  func(port string, m model) (caller, func(), error)
}

const tinyWidth = "10"

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
		body, err := json.Marshal(map[string]any{"x": values(m, 1)})
		return overHTTP("http://127.0.0.1:"+port+path, body, map[string]string{"Content-Type": "application/json"}), func() {}, err
	}
}

func protocolJSON(port string, m model) (caller, func(), error) {
	body := strings.Replace(string(jsonBody(m, 1)), `"name":"x"`, `"name":"x","parameters":{}`, 1)
	return overHTTP("http://127.0.0.1:"+port+"/v2/models/"+m.name+"/infer", []byte(body), map[string]string{"Content-Type": "application/json"}), func() {}, nil
}

var peers = []peer{
	{"LitServe, REST JSON", func(b *benchmark, port, model string) ([]string, []string, error) {
		return nil, []string{b.venv("litserve", "python"), script("litserve_server.py"), port, model, tinyWidth}, nil
	}, plainJSON("/predict")},
	{"BentoML, REST JSON", func(b *benchmark, port, model string) ([]string, []string, error) {
		return []string{"MODEL=" + model, "WIDTH=" + tinyWidth, "BENTOML_DO_NOT_TRACK=1", "BENTOML_HOME=" + b.dir},
			[]string{b.venv("bentoml", "bentoml"), "serve", "bentoml_server:Service", "--working-dir", script(""), "--port", port, "--host", "127.0.0.1"}, nil
	}, plainJSON("/predict")},
	{"KServe Python server, REST JSON", func(b *benchmark, port, model string) ([]string, []string, error) {
		return nil, []string{b.venv("kserve", "python"), script("kserve_server.py"), port, model, tinyWidth}, nil
	}, protocolJSON},
	{"MLServer, REST JSON", mlserver, protocolJSON},
	{"MLServer, gRPC", mlserver, func(port string, m model) (caller, func(), error) {
		n, err := strconv.Atoi(port)
		if err != nil {
			return nil, nil, err
		}
		return overGRPC("127.0.0.1:"+strconv.Itoa(n+1), m, 1)
	}},
}

// mlserver writes MLServer's two files of settings.
func mlserver(b *benchmark, port, model string) (env, args []string, err error) {
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
		os.WriteFile(filepath.Join(dir, "model-settings.json"), []byte(`{"name":"tiny","implementation":"mlserver_runtime.Runtime"}`), 0o600))
	return []string{"MODEL=" + model, "WIDTH=" + tinyWidth, "PYTHONPATH=" + script("")}, []string{b.venv("mlserver", "mlserver"), "start", dir}, err
}

// comparePeers compares the tiny model on other servers with Orrery, each alone on the server's core.
func (b *benchmark) comparePeers(ctx context.Context) error {
	m := b.model("tiny")
	file := filepath.Join(b.dir, "tiny.onnx")
	if err := os.WriteFile(file, m.file, 0o600); err != nil {
		return err
	}
	type row struct {
		name     string
		rate     float64
		cpu      time.Duration // a request
		peak     int64
		p99, p50 time.Duration // at the common rate
	}
	var rows []row
	for _, p := range peers {
		port, err := testenv.FreePort()
		if err != nil {
			return err
		}
		env, args, err := p.start(b, strconv.Itoa(port), file)
		if err != nil {
			return err
		}
		if _, err := os.Stat(args[0]); err != nil {
			b.progress("%s is not installed: deploy/setup.sh bench", p.name)
			continue
		}
		b.progress("%s", p.name)
		server, err := testenv.NewProcess("peer", env, pinned(args...)...)
		if err == nil {
			err = server.Start()
		}
		if err != nil {
			return err
		}
		call, stop, err := p.call(strconv.Itoa(port), m)
		if err != nil {
			return err
		}
		if err := awaitAnswer(ctx, call); err != nil {
			b.printf("%s does not answer: %v\n\n```\n%s\n```\n\n", p.name, err, server.Log())
			server.Kill()
			continue
		}
		before := treeUsage(server.PID())
		got := closedLoop(ctx, call, 16, b.length/4, b.length)
		after := treeUsage(server.PID())
		low := openLoop(ctx, call, math.Max(got.rate()/2, 10), b.length/4, b.length, 0)
		each := time.Duration(float64(after.cpu-before.cpu) / float64(got.ok) * got.took.Seconds() / (got.took + b.length/4).Seconds())
		rows = append(rows, row{name: p.name, rate: got.rate(), cpu: each, peak: after.peak, p50: low.quantile(0.5), p99: low.quantile(0.99)})
		stop()
		server.Kill()
	}
	r, err := b.start(ctx, []string{"tiny"})
	if err != nil {
		return err
	}
	defer r.stop()
	grpcCall, stop, err := overGRPC(r.workerRPC, m, 1)
	if err != nil {
		return err
	}
	defer stop()
	gateCall, stopGate, err := overGRPC(r.rpc, m, 1)
	if err != nil {
		return err
	}
	defer stopGate()
	best := row{}
	for _, p := range rows {
		if p.rate > best.rate {
			best = p
		}
	}
	b.printf("## The tiny model on other servers: 16 callers, and p99 when each is offered half of what the best of them can (Orrery: the same rate)\n\n")
	b.printf("| server | requests/s | Orrery's worker over gRPC is | server CPU us a request | memory MiB | p50 ms at load | p99 ms at load |\n|---|---|---|---|---|---|---|\n")
	ours := []struct {
		name string
		call caller
		pids []int
	}{
		{"Orrery worker, gRPC", grpcCall, []int{r.worker.PID()}}, {"Orrery worker, REST JSON", overJSON("http://"+r.workerWeb, m, 1), []int{r.worker.PID()}},
		{"Orrery gateway and worker, gRPC", gateCall, []int{r.worker.PID(), r.server.PID()}}, {"Orrery gateway and worker, REST JSON", overJSON("http://"+r.web, m, 1), []int{r.worker.PID(), r.server.PID()}},
	}
	first := 0.0
	for _, o := range ours {
		var before, after usage
		resume := func() {}
		if len(o.pids) == 1 {
			resume = r.workerAlone()
		}
		for _, pid := range o.pids {
			before.cpu += usageOf(pid).cpu
		}
		got := closedLoop(ctx, o.call, 16, b.length/4, b.length)
		for _, pid := range o.pids {
			u := usageOf(pid)
			after.cpu, after.peak = after.cpu+u.cpu, after.peak+u.peak
		}
		each := float64(after.cpu-before.cpu) / float64(got.ok) * got.took.Seconds() / (got.took + b.length/4).Seconds() / 1000
		low := openLoop(ctx, o.call, math.Max(best.rate/2, 10), b.length/4, b.length, 0)
		resume()
		if first == 0 {
			first = got.rate()
		}
		b.printf("| %s | %.0f | | %.0f | %d | %s | %s |\n", o.name, got.rate(), each, after.peak>>20, ms(low.quantile(0.5)), ms(low.quantile(0.99)))
	}
	for _, p := range rows {
		b.printf("| %s | %.0f | %.1fx | %.0f | %d | %s | %s |\n", p.name, p.rate, first/p.rate, float64(p.cpu.Nanoseconds())/1000, p.peak>>20, ms(p.p50), ms(p.p99))
	}
	b.printf("\n")
	return nil
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
