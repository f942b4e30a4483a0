// Command rollouts measures the control plane: how fast a roll-out is asked for, how fast it promotes, how fast a route
// reaches every gateway, how fast a guardrail acts, and how five hundred roll-outs at once get on. It starts a real
// Orrery against PostgreSQL, MinIO and Temporal on this machine.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/internal/testenv"
)

type part struct {
	name string
	run  func(context.Context, *platform, *report) error
}

func main() {
	binary := flag.String("binary", "bin/orrery", "the program to measure")
	only := flag.String("only", "", "parts to run, comma-separated: promotion, route, guardrail, many; none is all")
	many := flag.Int("many", 500, "roll-outs at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, *binary, *only, *many)
	stop()
	testenv.StopAll()
	if err != nil {
		fmt.Fprintln(os.Stderr, "rollouts:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, binary, only string, many int) error {
	p, err := startPlatform(ctx, binary, 2)
	if err != nil {
		return err
	}
	r := &report{out: os.Stdout}
	r.printf("Temporal on %s, registry on PostgreSQL; 2 servers, 1 worker, 1 orchestrator.\n\n| measured | value | target |\n|---|---|---|\n", p.temporalOn)
	for _, part := range []part{
		{"promotion", promotion},
		{"route", routeChange},
		{"guardrail", guardrail},
		{"many", func(ctx context.Context, p *platform, r *report) error { return crowd(ctx, p, r, many) }},
	} {
		if only != "" && !slices.Contains(strings.Split(only, ","), part.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, "rollouts:", part.name)
		if err := part.run(ctx, p, r); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

// report is the table, as it grows.
type report struct{ out io.Writer }

func (r *report) printf(format string, args ...any) {
	_, _ = fmt.Fprintf(r.out, format, args...) // nobody reads it any more
}

func (r *report) row(what, value, target string) { r.printf("| %s | %s | %s |\n", what, value, target) }

// quantile returns the q-quantile of durations, which it sorts.
func quantile(list []time.Duration, q float64) time.Duration {
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return list[min(int(q*float64(len(list))), len(list)-1)]
}

func millis(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1000) }
