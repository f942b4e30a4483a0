// Command demo runs the four stories of Orrery on real data: it starts `orrery dev`, drives it through the public API
// and inference protocol, and checks each step. A step that does not hold makes it exit with 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// options are what the demo is told.
type options struct {
	orrery  string // binary
	trainer string // binary
	data    string // directory with winter.csv and summer.csv
	dir     string // of orrery dev
	keep    bool
}

func run(ctx context.Context) (err error) {
	var o options
	flag.StringVar(&o.orrery, "orrery", "bin/orrery", "the orrery binary")
	flag.StringVar(&o.trainer, "trainer", "bin/flights-trainer", "the trainer binary")
	flag.StringVar(&o.data, "data", "examples/flights/data", "directory with winter.csv and summer.csv")
	flag.StringVar(&o.dir, "dir", ".orrery-demo", "where orrery dev keeps its state; deleted first")
	flag.BoolVar(&o.keep, "keep", false, "leave everything running at the end")
	flag.Parse()
	d := &demo{options: o, began: time.Now()}
	defer func() { err = errors.Join(err, d.stop()) }()
	for _, step := range d.steps() {
		if err := d.do(ctx, step); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	fmt.Printf("\nAll %d steps hold, in %.0f s.\n", len(d.steps()), time.Since(d.began).Seconds())
	if o.keep {
		fmt.Printf("Left running: %s (console), %s (Temporal UI). Ctrl-C ends it.\n", d.state.API, d.state.UI)
		<-ctx.Done()
	}
	return nil
}

// step is one thing the demo does and checks; do returns what it saw.
type step struct {
	name string
	do   func(context.Context) (string, error)
}

func (d *demo) steps() []step {
	return []step{
		{"start orrery dev", d.start},
		{"register version 1 (first 4000 winter flights)", d.registerFirst},
		{"serve it", d.serveFirst},
		{"replay winter traffic", d.beginTraffic},
		{"roll out version 2 (all winter) through a canary", d.rolloutGood},
		{"roll out version 3 (does not know four airlines): it is rolled back by itself", d.rolloutBad},
		{"score a night's flights on a schedule", d.scoreNight},
		{"check winter traffic for drift on a schedule: there is none", d.driftWinter},
		{"summer comes: drift is found", d.driftSummer},
		{"drift retrains; the challenger is better on the same rows and is promoted", d.retrained},
		{"no answer failed or came from a version without weight", d.checkTraffic},
	}
}

func (d *demo) do(ctx context.Context, s step) error {
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	saw, err := s.do(limited)
	if err != nil {
		return err
	}
	fmt.Printf("✓ %s (%.1f s)\n    %s\n", s.name, time.Since(began).Seconds(), saw)
	return nil
}
