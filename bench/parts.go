package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/internal/testenv"
)

// benchmark is one run of everything.
type benchmark struct {
	options

	self   string
	dir    string
	models []model
	report strings.Builder
	ratios []string // printed first
}

func (b *benchmark) printf(format string, args ...any) { fmt.Fprintf(&b.report, format, args...) }

// ratio keeps a line for the top of the report.
func (b *benchmark) ratio(format string, args ...any) {
	b.ratios = append(b.ratios, fmt.Sprintf(format, args...))
}

// text is the whole report, ratios first.
func (b *benchmark) text() string {
	head := fmt.Sprintf("Machine: %s, %d cores; server on core %s, load on core %s; each measurement %v.\n\n## Ratios\n\n", cpuName(), cores(), serverCore, clientCore, b.length)
	return head + "* " + strings.Join(b.ratios, "\n* ") + "\n\n" + b.report.String()
}

func (b *benchmark) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

func (b *benchmark) model(name string) model {
	for _, m := range b.models {
		if m.name == name {
			return m
		}
	}
	return model{}
}

func (b *benchmark) all(ctx context.Context) error {
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"overhead", b.overhead}, {"models", b.throughput}, {"overload", b.overload}, {"metrics", b.metrics}, {"peers", b.comparePeers}, {"policy", b.policy},
	} {
		if !b.wanted(part.name) {
			continue
		}
		b.progress("%s", part.name)
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

func cpuName() string {
	raw, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(raw)) {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				return strings.TrimSpace(strings.TrimLeft(name, "\t: "))
			}
		}
	}
	return runtime.GOARCH
}

// cores counts those of the machine; this process may use one.
func cores() int {
	raw, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.NumCPU()
	}
	return strings.Count(string(raw), "processor\t")
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d.Microseconds())/1000) }

func us(d time.Duration) string { return fmt.Sprintf("%.0f", float64(d.Nanoseconds())/1000) }

// start starts the roles with some of the models.
func (b *benchmark) start(ctx context.Context, names []string, workerOptions ...string) (*roles, error) {
	dir, err := os.MkdirTemp(b.dir, "roles-*")
	if err != nil {
		return nil, err
	}
	var models []model
	for _, n := range names {
		models = append(models, b.model(n))
	}
	binary, err := filepath.Abs(b.binary)
	if err != nil {
		return nil, err
	}
	return startRoles(ctx, binary, dir, b.library, models, workerOptions...)
}

// overhead compares one caller's latency with that of an echo of the same bytes, taking turns so that both see the same
// machine.
func (b *benchmark) overhead(ctx context.Context) error {
	r, err := b.start(ctx, []string{"kb"})
	if err != nil {
		return err
	}
	defer r.stop()
	listen, err := address()
	if err != nil {
		return err
	}
	server, err := testenv.NewProcess("echo", nil, pinned(b.self, "-echo", listen)...)
	if err == nil {
		err = server.Start()
	}
	if err != nil {
		return err
	}
	defer server.Kill()
	m := b.model("kb")
	calls := map[string]caller{"worker, REST binary": overBinary("http://"+r.workerWeb, m), "gateway, REST binary": overBinary("http://"+r.web, m)}
	for name, at := range map[string]string{"echo, gRPC": listen, "worker, gRPC": r.workerRPC, "gateway, gRPC": r.rpc} {
		call, stop, err := overGRPC(at, m)
		if err != nil {
			return err
		}
		defer stop()
		calls[name] = call
	}
	order := []string{"echo, gRPC", "worker, gRPC", "gateway, gRPC", "worker, REST binary", "gateway, REST binary"}
	p50, p99 := map[string][]time.Duration{}, map[string][]time.Duration{}
	for range 5 {
		for _, name := range order {
			resume := func() {}
			if !strings.HasPrefix(name, "gateway") {
				resume = r.workerAlone()
			}
			got := closedLoop(ctx, calls[name], 1, b.length/8, b.length/2)
			resume()
			if got.ok == 0 {
				return fmt.Errorf("%s: no answer", name)
			}
			p50[name], p99[name] = append(p50[name], got.quantile(0.5)), append(p99[name], got.quantile(0.99))
		}
	}
	b.printf("## One caller, 1 KB tensors: medians of five turns\n\n| path | p50 us | over the echo us | in echoes | p99 us |\n|---|---|---|---|---|\n")
	base := median(p50[order[0]])
	for _, name := range order {
		here := median(p50[name])
		b.printf("| %s | %s | %s | %.2f | %s |\n", name, us(here), us(here-base), float64(here)/float64(base), us(median(p99[name])))
		if strings.HasSuffix(name, ", gRPC") && here != base {
			b.ratio("one caller, 1 KB: %s %s us over an echo, %.2f echoes more", name, us(here-base), float64(here)/float64(base)-1)
		}
	}
	b.printf("\n")
	return nil
}

func median(list []time.Duration) time.Duration {
	sorted := append([]time.Duration{}, list...)
	for i := range sorted {
		for j := i; j > 0 && sorted[j] < sorted[j-1]; j-- {
			sorted[j], sorted[j-1] = sorted[j-1], sorted[j]
		}
	}
	return sorted[len(sorted)/2]
}

// measureRaw measures a model without a server: the better of one row and of 32 at a time is its 100 %.
func (b *benchmark) measureRaw(ctx context.Context, m model) (one, best rawResult, err error) {
	if one, err = b.raw(ctx, m, 1); err != nil {
		return one, one, err
	}
	best = one
	many, err := b.raw(ctx, m, 32)
	if err == nil && many.Rate > best.Rate {
		best = many
	}
	best.Engine = max(one.Engine, many.Engine)
	return one, best, err
}

// path is a way to a model, and the processes on it.
type path struct {
	name      string
	call      caller
	processes []*testenv.Process
}

// used adds up what processes have used.
func used(processes []*testenv.Process) usage {
	var sum usage
	for _, p := range processes {
		u := usageOf(p.PID())
		sum.cpu, sum.peak = sum.cpu+u.cpu, sum.peak+u.peak
	}
	return sum
}

// paths are the ways to a model; stop closes their connections.
func (r *roles) paths(m model) (list []path, stop func(), err error) {
	worker, stopWorker, err := overGRPC(r.workerRPC, m)
	if err != nil {
		return nil, nil, err
	}
	gateway, stopGateway, err := overGRPC(r.rpc, m)
	if err != nil {
		stopWorker()
		return nil, nil, err
	}
	alone, both := []*testenv.Process{r.worker}, []*testenv.Process{r.server, r.worker}
	return []path{
		{"worker, gRPC", worker, alone},
		{"worker, REST binary", overBinary("http://"+r.workerWeb, m), alone},
		{"worker, REST JSON", overJSON("http://"+r.workerWeb, m), alone},
		{"gateway, gRPC", gateway, both},
		{"gateway, REST JSON", overJSON("http://"+r.web, m), both},
	}, func() { stopWorker(); stopGateway() }, nil
}

// saturate measures a path with n callers, and the CPU time of a request. Where only the worker is on the path, the
// server's clock stands still.
func (b *benchmark) saturate(ctx context.Context, r *roles, p path, n int) (got result, cpu time.Duration, err error) {
	if len(p.processes) == 1 {
		defer r.workerAlone()()
	}
	before := used(p.processes)
	got = closedLoop(ctx, p.call, n, b.length/4, b.length)
	if got.failed > 0 || got.ok == 0 {
		return got, 0, fmt.Errorf("%s: %d answers, %d requests failed", p.name, got.ok, got.failed)
	}
	share := got.took.Seconds() / (got.took + b.length/4).Seconds() // the warm-up cost CPU too
	return got, time.Duration(float64(used(p.processes).cpu-before.cpu) * share / float64(got.ok)), nil
}

// throughput compares every path at saturation with ONNX Runtime alone.
func (b *benchmark) throughput(ctx context.Context) error {
	names := strings.Split(b.names, ",")
	const callers = 32
	r, err := b.start(ctx, names)
	if err != nil {
		return err
	}
	defer r.stop()
	b.printf("## At saturation: rows a second, one row a request, %d callers\n\n100 %% is a bare session in a loop on the server's core, one row a run or 32, whichever is faster, before and after the others.\n\n", callers)
	b.printf("| model | path | rows/s | of raw | p50 ms | p99 ms | p99.9 ms | server CPU us a request | peak MiB |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, name := range names {
		b.progress("model %s", name)
		if err := b.throughputOf(ctx, r, b.model(name), callers); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	b.printf("\n")
	return nil
}

func (b *benchmark) throughputOf(ctx context.Context, r *roles, m model, callers int) error {
	one, best, err := b.measureRaw(ctx, m)
	if err != nil {
		return err
	}
	paths, stop, err := r.paths(m)
	if err != nil {
		return err
	}
	defer stop()
	results, cpus, peaks := make([]result, len(paths)), make([]time.Duration, len(paths)), make([]int64, len(paths))
	for i, p := range paths {
		if results[i], cpus[i], err = b.saturate(ctx, r, p, callers); err != nil {
			return err
		}
		peaks[i] = used(p.processes).peak
	}
	oneAfter, bestAfter, err := b.measureRaw(ctx, m)
	if err != nil {
		return err
	}
	if bestAfter.Rate > best.Rate {
		one, best = oneAfter, bestAfter
	}
	b.printf("| %s | raw, one row a run | %.0f | %.2f | %s | | | %.0f | |\n", m.name, one.Rate, one.Rate/best.Rate, ms(time.Duration(one.P50)*time.Microsecond), 1e6/one.Rate)
	b.printf("| | raw, best (%d rows a run) | %.0f | 1.00 | | | | %.0f | |\n", best.Rows, best.Rate, 1e6/best.Rate)
	b.printf("| | engine, same process | %.0f | %.2f | | | | | |\n", best.Engine, best.Engine/best.Rate)
	b.ratio("%s (%s ms a row): worker over gRPC %.2f of raw, gateway %.2f", m.name, ms(time.Duration(one.P50)*time.Microsecond), results[0].rate()/best.Rate, results[3].rate()/best.Rate)
	for i, p := range paths {
		got := results[i]
		b.printf("| | %s | %.0f | %.2f | %s | %s | %s | %s | %d |\n", p.name, got.rate(), got.rate()/best.Rate,
			ms(got.quantile(0.5)), ms(got.quantile(0.99)), ms(got.quantile(0.999)), us(cpus[i]), peaks[i]>>20)
	}
	return nil
}

// overload offers from half to three times what saturates, with a deadline, to Orrery's batcher and to the baseline.
func (b *benchmark) overload(ctx context.Context) error {
	const deadline = 50 * time.Millisecond
	b.printf("## Goodput with a deadline of %v, Poisson arrivals, worker over gRPC\n\n", deadline)
	b.printf("| model | batching | offered | goodput/s | of its peak | p50 ms | p99 ms | late | refused | p50 of refusals ms |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, name := range []string{"encoder", "mlp"} {
		for _, policy := range []string{"deadline", "static"} {
			r, err := b.start(ctx, []string{name})
			if err != nil {
				return err
			}
			config := []string{"model", "configure", name, "--config", "batching=" + policy}
			if policy == "static" {
				config = append(config, "--config", "max_delay_us=5000")
			}
			if err := r.cli(ctx, config...); err != nil {
				r.stop()
				return err
			}
			time.Sleep(2 * time.Second) // the worker swaps the model
			call, stop, err := overGRPC(r.workerRPC, b.model(name))
			if err != nil {
				r.stop()
				return err
			}
			resume := r.workerAlone()
			saturated := closedLoop(ctx, call, 64, b.length/4, b.length).rate()
			peak := 0.0
			for _, load := range []float64{0.5, 0.75, 1, 1.25, 1.5, 2, 3} {
				got := openLoop(ctx, call, load*saturated, b.length/2, b.length, deadline)
				good := float64(got.inTime) / got.took.Seconds()
				peak = math.Max(peak, good)
				b.printf("| %s | %s | %.2fx = %.0f/s | %.0f | %.2f | %s | %s | %d | %d | %s |\n", name, policy, load, load*saturated, good, good/peak, ms(got.quantile(0.5)), ms(got.quantile(0.99)),
					got.ok-got.inTime, got.failed, ms(quantile(got.shed, 0.5)))
				if load == 2 {
					b.ratio("%s at twice saturation, 50 ms: %s batching %.2f of its peak goodput", name, policy, good/peak)
				}
			}
			resume()
			stop()
			r.stop()
		}
	}
	b.printf("\n")
	return nil
}

// metrics compares throughput with Prometheus metrics on and off, taking turns.
func (b *benchmark) metrics(ctx context.Context) error {
	on, err := b.start(ctx, []string{"tiny"})
	if err != nil {
		return err
	}
	defer on.stop()
	off, err := b.start(ctx, []string{"tiny"}, "--no-metrics")
	if err != nil {
		return err
	}
	defer off.stop()
	m := b.model("tiny")
	var with, without []time.Duration // per request, so that the median is of the same kind
	for range 21 {
		for _, r := range []*roles{on, off} {
			call, stop, err := overGRPC(r.workerRPC, m)
			if err != nil {
				return err
			}
			got := closedLoop(ctx, call, 16, b.length/16, b.length/4)
			stop()
			each := time.Duration(float64(time.Second) / got.rate())
			if r == on {
				with = append(with, each)
			} else {
				without = append(without, each)
			}
		}
	}
	b.ratio("metrics on / off %.3f", median(without).Seconds()/median(with).Seconds())
	b.printf("## Metrics on and off: tiny model, worker over gRPC, 16 callers, medians of 21 turns\n\n| metrics | requests/s |\n|---|---|\n| on | %.0f |\n| off | %.0f |\n| on / off | %.3f |\n\n",
		1/median(with).Seconds(), 1/median(without).Seconds(), median(without).Seconds()/median(with).Seconds())
	return nil
}
