package main

import (
	"encoding/json"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// tryLimits are what a model that is tried may use.
var tryLimits = map[int]uint64{
	syscall.RLIMIT_CORE:  0,
	syscall.RLIMIT_CPU:   120,      // seconds
	syscall.RLIMIT_FSIZE: 64 << 20, // bytes of any file it writes
	syscall.RLIMIT_AS:    64 << 30, // address space; ONNX Runtime and Go reserve much and use little
}

// tryCommand is the process in which a model file is tried: it may crash without hurting anybody.
func (p *program) tryCommand() *cobra.Command {
	var b backends
	var maxBatch int
	c := &cobra.Command{
		Use: "try-model FILE", Short: "Load, run and measure a model file", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			for what, limit := range tryLimits {
				if err := syscall.Setrlimit(what, &syscall.Rlimit{Cur: limit, Max: limit}); err != nil {
					return err
				}
			}
			runtime, err := b.startOnnx()
			if err != nil {
				return &exitError{activities.TryUnavailable, err}
			}
			report, err := try(c, runtime, args[0], maxBatch)
			if err != nil {
				report = activities.TryReport{Refused: err.Error()}
			}
			return json.NewEncoder(p.stdout).Encode(report)
		},
	}
	c.Flags().IntVar(&maxBatch, "max-batch", 32, "largest batch to measure")
	c.Flags().StringVar(&b.ort, "onnxruntime", p.getenv("ORRERY_ONNXRUNTIME_LIB"), "the ONNX Runtime library")
	return c
}

func try(c *cobra.Command, runtime engine.Runtime, path string, maxBatch int) (activities.TryReport, error) {
	signature, err := runtime.Inspect(path)
	if err != nil {
		return activities.TryReport{}, err
	}
	session, err := runtime.Open(path, signature, engine.Options{Provider: "cpu", Threads: 1})
	if err != nil {
		return activities.TryReport{}, err
	}
	latency, err := engine.Measure(c.Context(), session, maxBatch, time.Second)
	if err != nil {
		return activities.TryReport{}, registry.Errorf(registry.Invalid, "the model loads but does not run: %w", err)
	}
	return activities.TryReport{Signature: signature, Latency: latency}, session.Close()
}
