// Command bench measures Orrery against ONNX Runtime alone and against other servers, on this machine, in one run. What
// is measured runs on one core and who measures it on another; docs/benchmarks.md says how to read the numbers.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/internal/toolpath"
)

type options struct {
	binary  string
	library string
	peers   string
	only    string
	names   string
	length  time.Duration
	out     string

	rawFile string
	rawRows int
	echo    string
	inner   bool
}

func main() {
	var o options
	flag.StringVar(&o.binary, "binary", "bin/orrery", "the program to measure")
	flag.StringVar(&o.library, "library", "", "ONNX Runtime; found as orrery finds it")
	flag.StringVar(&o.peers, "peers", ".tools/peers", "where the virtual environments of other servers are; those that are missing are left out")
	flag.StringVar(&o.only, "only", "", "parts to run, comma-separated: overhead, models, overload, metrics, peers, policy; none is all")
	flag.StringVar(&o.names, "models", "tiny,trees,mlp,conv,encoder", "models of the parts models and peers, comma-separated")
	flag.DurationVar(&o.length, "length", 4*time.Second, "of each measurement")
	flag.StringVar(&o.out, "out", "", "file to write the report to, beside standard output")
	flag.StringVar(&o.rawFile, "raw", "", "measure this file in this process (used by the benchmark itself)")
	flag.IntVar(&o.rawRows, "rows", 1, "rows of a run, with -raw")
	flag.StringVar(&o.echo, "echo", "", "serve an echo on this address (used by the benchmark itself)")
	flag.BoolVar(&o.inner, "pinned", false, "this process is on its core (used by the benchmark itself)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	switch {
	case o.rawFile != "":
		r, err := raw(ctx, o.library, o.rawFile, o.rawRows, o.length)
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(r))
	case o.echo != "":
		return echo(ctx, o.echo)
	case !o.inner:
		self, err := os.Executable()
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "taskset", append([]string{"-c", clientCore, self, "-pinned"}, os.Args[1:]...)...) //nolint:gosec // ourselves
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	}
	debug.SetGCPercent(800) // of the load generator, which must not be what is slow
	library, err := toolpath.OnnxRuntime(o.library)
	if err != nil {
		return err
	}
	o.library = library
	dir, err := os.MkdirTemp("", "orrery-bench-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // scratch
	defer testenv.StopAll()
	b := &benchmark{options: o, dir: dir, models: allModels()}
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	err = b.all(ctx)
	text := b.text()
	fmt.Fprint(os.Stdout, text)
	if o.out != "" {
		err = errors.Join(err, os.WriteFile(o.out, []byte(text), 0o600))
	}
	return err
}

// wanted says whether a part is to run.
func (o options) wanted(part string) bool {
	return o.only == "" || strings.Contains(","+o.only+",", ","+part+",")
}
