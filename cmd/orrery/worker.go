package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/worker"
)

func (p *program) workerCommand() *cobra.Command {
	var b backends
	var w worker.Config
	c := &cobra.Command{
		Use: "worker", Short: "Hold models in memory and run inference", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := p.fromEnvironment(c.Flags()); err != nil {
				return err
			}
			p.collectLess()
			w.Token = p.getenv("ORRERY_JOIN_TOKEN")
			log, err := p.logger(b.logLevel)
			if err != nil {
				return err
			}
			if err := w.Validate(); err != nil {
				return &exitError{exitUsage, err}
			}
			runtime, err := b.startOnnx()
			if err != nil {
				return err
			}
			objects, err := b.openStore(c.Context(), log)
			if err != nil {
				return err
			}
			served, err := worker.New(c.Context(), w, runtime, objects, log)
			if err != nil {
				return err
			}
			stop, err := telemetry.Start(c.Context(), "orrery-worker", p.getenv)
			if err != nil {
				return &exitError{exitUsage, err}
			}
			defer func() { _ = stop(context.WithoutCancel(c.Context())) }() // spans that are lost are not missed
			log.Info("serving", "grpc", served.GRPCAddress(), "http", served.HTTPAddress())
			return served.Run(c.Context())
		},
	}
	f := c.Flags()
	b.flags(p, f, "store")
	f.StringVar(&w.GRPC, "grpc", "127.0.0.1:0", "listen address of inference over gRPC (ORRERY_GRPC)")
	f.StringVar(&w.HTTP, "http", "127.0.0.1:0", "listen address of inference over REST (ORRERY_HTTP)")
	f.StringVar(&w.Advertise, "advertise", "", "address at which servers reach --grpc; default the one listened on (ORRERY_ADVERTISE)")
	f.StringSliceVar(&w.Servers, "servers", []string{"127.0.0.1:8081"}, "gRPC addresses of all servers (ORRERY_SERVERS)")
	f.StringVar(&w.Node, "node", "", "name people know this worker by; default the host's (ORRERY_NODE)")
	f.StringVar(&w.CacheDir, "cache-dir", filepath.Join(os.TempDir(), fmt.Sprintf("orrery-worker-%d", os.Getpid())), "where artifacts are kept (ORRERY_CACHE_DIR)")
	f.StringToStringVar(&w.Labels, "label", nil, "labels for placement, such as gpu=h100")
	f.IntVar(&w.Threads, "threads", 0, "threads that runs on the CPU may take at once, shared by all models; 0 is one for every core (ORRERY_THREADS)")
	f.Int64Var(&w.MemoryBudget, "memory-budget", 0, "bytes the process may take: versions that no route needs are unloaded to stay below; 0 is 80 % of the machine's, -1 no limit (ORRERY_MEMORY_BUDGET)")
	f.BoolVar(&w.NoMetrics, "no-metrics", false, "do not observe requests for Prometheus")
	f.BoolVar(&w.Profiling, "profiling", false, "serve Go's profiles under /debug/pprof/ of --http")
	f.DurationVar(&w.Timeout, "timeout", 30*time.Second, "of a request that brings no deadline")
	return c
}
