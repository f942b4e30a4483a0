package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/orrery-ml/orrery/internal/testenv"
)

// The core of what is measured and that of who measures it.
const (
	serverCore = "0"
	clientCore = "1"
)

// What guards the roles of a benchmark, which listen on loopback and live for minutes.
const (
	benchKey   = "ok_admin_key_of_the_benchmark"
	benchToken = "join-token-of-the-benchmark" //nolint:gosec // see above
)

// pinned is a command on the server's core.
func pinned(args ...string) []string { return append([]string{"taskset", "-c", serverCore}, args...) }

// roles are the processes of a real Orrery: a server and a worker, both on the server's core.
type roles struct {
	server, worker       *testenv.Process
	web, rpc             string // of the server
	workerWeb, workerRPC string
	binary               string
	workerOptions        []string
	env                  []string
	temporal             *testenv.TemporalServer
	orchestrator         *testenv.Process
}

func address() (string, error) {
	port, err := testenv.FreePort()
	return "127.0.0.1:" + strconv.Itoa(port), err
}

// startRoles starts everything that registering needs, registers the models, and stops what serving does not need.
func startRoles(ctx context.Context, binary, dir, library string, models []model, workerOptions ...string) (*roles, error) {
	r := &roles{binary: binary, workerOptions: workerOptions}
	var errs [4]error
	r.web, errs[0] = address()
	r.rpc, errs[1] = address()
	r.workerWeb, errs[2] = address()
	r.workerRPC, errs[3] = address()
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	var err error
	if r.temporal, err = testenv.StartTemporal(); err != nil {
		return nil, err
	}
	r.env = []string{
		"ORRERY_REGISTRY=sqlite:" + filepath.Join(dir, "registry.db"), "ORRERY_STORE=dir:" + filepath.Join(dir, "objects"), "ORRERY_TEMPORAL=" + r.temporal.Address,
		"ORRERY_JOIN_TOKEN=" + benchToken, "ORRERY_ADMIN_KEY=" + benchKey, "ORRERY_ONNXRUNTIME_LIB=" + library, "ORRERY_LOG_LEVEL=error",
	}
	start := func(name string, args ...string) (*testenv.Process, error) {
		p, err := testenv.NewProcess(name, r.env, args...)
		if err == nil {
			err = p.Start()
		}
		return p, err
	}
	if r.server, err = start("server", pinned(binary, "server", "--dev-open", "--http", r.web, "--grpc", r.rpc, "--state-dir", filepath.Join(dir, "state"))...); err != nil {
		return nil, err
	}
	if r.orchestrator, err = start("orchestrator", binary, "orchestrator", "--scratch", dir); err != nil {
		return nil, err
	}
	worker := pinned(append([]string{binary, "worker", "--servers", r.rpc, "--http", r.workerWeb, "--grpc", r.workerRPC, "--cache-dir", filepath.Join(dir, "cache")}, workerOptions...)...)
	if r.worker, err = start("worker", worker...); err != nil {
		return nil, err
	}
	for _, m := range models {
		if err := r.publish(ctx, dir, m); err != nil {
			return nil, fmt.Errorf("model %s: %w\n%s", m.name, err, r.server.Log()+r.worker.Log())
		}
	}
	r.orchestrator.Kill()
	r.temporal.Kill()
	return r, nil
}

// publish registers a model as a user would and sends it all its traffic.
func (r *roles) publish(ctx context.Context, dir string, m model) error {
	path := filepath.Join(dir, m.name+".onnx")
	if err := os.WriteFile(path, m.file, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for _, args := range [][]string{{"model", "create", m.name}, {"version", "register", m.name, path}, {"route", "set", m.name, "1"}} {
		if err := r.cli(ctx, args...); err != nil {
			return err
		}
	}
	for {
		call, stop, err := overGRPC(r.rpc, m)
		if err != nil {
			return err
		}
		err = call(ctx)
		stop()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// cli runs the client; while the server starts it is tried again.
func (r *roles) cli(ctx context.Context, args ...string) error {
	for {
		cmd := exec.CommandContext(ctx, r.binary, append([]string{"--api", "http://" + r.web, "--key", benchKey}, args...)...) //nolint:gosec // our own binary
		out, err := cmd.CombinedOutput()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !strings.Contains(string(out), "connection refused") && !strings.Contains(string(out), "does not answer") {
			return fmt.Errorf("orrery %s: %w: %s", strings.Join(args, " "), err, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// workerAlone stops the server's clock until the returned function is called, so that only the worker is measured. The
// worker serves on: that is what it is built for.
func (r *roles) workerAlone() (resume func()) {
	_ = syscall.Kill(r.server.PID(), syscall.SIGSTOP) // gone: the measurement says so
	return func() { _ = syscall.Kill(r.server.PID(), syscall.SIGCONT) }
}

func (r *roles) stop() {
	r.worker.Kill()
	r.server.Kill()
}

// usage is what a process has used.
type usage struct {
	cpu  time.Duration
	peak int64 // bytes
}

// usageOf reads a process from /proc.
func usageOf(pid int) usage {
	var u usage
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	const ticks = 10 * time.Millisecond // of the kernel's accounting
	for _, i := range []int{11, 12} {
		n, _ := strconv.ParseInt(fields[i], 10, 64) // a number by the kernel's word
		u.cpu += time.Duration(n) * ticks
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u
	}
	for line := range strings.Lines(string(status)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			u.peak = kib << 10
		}
	}
	return u
}
