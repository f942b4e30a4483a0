package main

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/monitor"
)

// simulation is what `orrery simulate rollout` is asked.
type simulation struct {
	runs      int
	seed      uint64
	perMinute []float64
	base      float64
	steps     []float64
	bake      time.Duration
	judge     []string
	picture   string
}

func (p *program) simulateCommand() *cobra.Command {
	root := &cobra.Command{Use: "simulate", Short: "See what decisions would come of, without a server"}
	var o simulation
	cmd := &cobra.Command{
		Use: "rollout", Short: "Compare judges on simulated roll-outs: false rollbacks, what is caught, and when", Args: cobra.NoArgs,
		Long: "Runs the judge that production runs on simulated traffic, beside a threshold rule, a z-test that peeks, and Mann-Whitney. The same seed gives the same table.",
		RunE: func(*cobra.Command, []string) error { return p.simulate(o) },
	}
	f := cmd.Flags()
	f.IntVar(&o.runs, "runs", 2000, "simulated roll-outs of each kind of traffic")
	f.Uint64Var(&o.seed, "seed", 1, "of the random numbers")
	f.Float64SliceVar(&o.perMinute, "rpm", []float64{60, 600}, "requests a minute, of both arms together")
	f.Float64Var(&o.base, "base-errors", 0.01, "error rate of the stable version")
	f.Float64SliceVar(&o.steps, "steps", []float64{5, 10, 25, 50}, "the candidate's share in percent, ascending")
	f.DurationVar(&o.bake, "bake", time.Hour, "of all steps together")
	f.StringArrayVar(&o.judge, "judge", nil, "a threshold of the judge, such as alpha=0.01; repeat for more")
	f.StringVar(&o.picture, "picture", "", "file to draw the judge's e-values into, as SVG")
	root.AddCommand(cmd)
	return root
}

// source returns the random numbers of a run.
func (o simulation) source(run int) monitor.Source {
	return rand.New(rand.NewPCG(o.seed, uint64(run))) //nolint:gosec // it must be repeatable
}

// plan turns what was typed into a plan.
func (o simulation) plan() (monitor.Plan, error) {
	out := monitor.Plan{Minutes: int(o.bake / time.Minute)}
	raw, err := settings(o.judge)
	if err != nil {
		return out, err
	}
	if raw == nil {
		out.Judge = monitor.DefaultJudge()
	} else if out.Judge, err = activities.ReadJudge(*raw); err != nil {
		return out, &exitError{exitUsage, err}
	}
	for _, s := range o.steps {
		if s <= 0 || s >= 100 {
			return out, &exitError{exitUsage, fmt.Errorf("--steps %v: want between 0 and 100", s)}
		}
		out.Steps = append(out.Steps, s/100)
	}
	if out.Minutes < len(out.Steps) || len(out.Steps) == 0 || o.runs < 1 || o.base <= 0 || o.base >= 0.2 {
		return out, &exitError{exitUsage, errors.New("want at least one step, a minute for each, one run, and an error rate between 0 and 0.2")}
	}
	for _, rpm := range o.perMinute {
		if rpm < 1 || rpm > 1e6 {
			return out, &exitError{exitUsage, fmt.Errorf("--rpm %v: want 1 to a million", rpm)}
		}
	}
	return out, nil
}

// scenarios are the kinds of traffic, harmless ones first.
func (o simulation) scenarios(rpm float64) []monitor.Scenario {
	p := o.base
	return []monitor.Scenario{
		{Name: "equal", Base: p, Candidate: p, PerMinute: rpm},
		{Name: "equal, callers send 5 at once", Base: p, Candidate: p, PerMinute: rpm, Burst: 5},
		{Name: "equal, one broken caller sends 5 %", Base: p, Candidate: p, PerMinute: rpm, BrokenRate: 0.05},
		{Name: "equal, an incident hits both", Base: p, Candidate: p, PerMinute: rpm, Incident: true},
		{Name: "2x the errors", Base: p, Candidate: 2 * p, PerMinute: rpm},
		{Name: "3x the errors", Base: p, Candidate: 3 * p, PerMinute: rpm},
		{Name: "5x the errors", Base: p, Candidate: 5 * p, PerMinute: rpm},
		{Name: "2x slower", Base: p, Candidate: p, PerMinute: rpm, Slower: 2},
	}
}

func (p *program) simulate(o simulation) error {
	plan, err := o.plan()
	if err != nil {
		return err
	}
	if o.picture != "" {
		if err := os.WriteFile(o.picture, []byte(picture(plan, o)), 0o644); err != nil { //nolint:gosec // a picture for everybody
			return err
		}
	}
	fmt.Fprintf(p.stdout, "%d roll-outs of each kind, %s, seed %d; share rolled back with its 95 %% interval, the median minute, and the share within five minutes.\n\n| requests a minute | candidate | %s | promoted by Orrery |\n|---|---|%s---|\n",
		o.runs, stepsText(plan), o.seed, strings.Join(monitor.Rivals, " | "), strings.Repeat("---|", len(monitor.Rivals)))
	for _, rpm := range o.perMinute {
		for _, s := range o.scenarios(rpm) {
			results := monitor.Simulate(s, plan, o.runs, o.source)
			cells := []string{fmt.Sprintf("%g", rpm), s.Name}
			for _, r := range results {
				cell := fmt.Sprintf("%.1f %% (%.1f to %.1f)", 100*r.RolledBack.Share, 100*r.RolledBack.Lower, 100*r.RolledBack.Upper)
				if r.Minutes > 0 {
					cell += fmt.Sprintf(", min. %.1f", r.Minutes)
				}
				if s.Candidate > s.Base {
					cell += fmt.Sprintf(", %.0f %% within 5", 100*r.Within5.Share)
				}
				cells = append(cells, cell)
			}
			cells = append(cells, fmt.Sprintf("%.1f %%", 100*results[0].Promoted.Share))
			if _, err := fmt.Fprintf(p.stdout, "| %s |\n", strings.Join(cells, " | ")); err != nil {
				return err
			}
		}
	}
	return nil
}

func stepsText(p monitor.Plan) string {
	var parts []string
	for _, s := range p.Steps {
		parts = append(parts, fmt.Sprintf("%g", 100*s))
	}
	return fmt.Sprintf("steps of %s %% over %d minutes", strings.Join(parts, "/"), p.Minutes)
}

// The picture's size and margins, in its own units.
const (
	pictureWidth, pictureHeight = 760, 380
	marginLeft, marginTop       = 60, 44
	marginRight, marginBottom   = 150, 50
	lowestE, highestE           = 1e-4, 1e6
)

// picture draws the e-value of simulated roll-outs, minute by minute: how the bet against a candidate goes.
func picture(plan monitor.Plan, o simulation) string {
	rpm := o.perMinute[len(o.perMinute)-1]
	x := func(minute int) float64 {
		return marginLeft + float64(minute)*(pictureWidth-marginLeft-marginRight)/float64(plan.Minutes)
	}
	y := func(e float64) float64 {
		at := math.Log(math.Min(math.Max(e, lowestE), highestE)/lowestE) / math.Log(highestE/lowestE)
		return pictureHeight - marginBottom - at*(pictureHeight-marginTop-marginBottom)
	}
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`, pictureWidth, pictureHeight)
	line(`<rect width="%d" height="%d" fill="white"/>`, pictureWidth, pictureHeight)
	line(`<text x="%d" y="20" font-size="14">The bet against the candidate, at %g requests a minute</text>`, marginLeft, rpm)
	for i, s := range plan.Steps {
		from := i * plan.Minutes / len(plan.Steps)
		line(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#ccc"/><text x="%.1f" y="%d" fill="#666">%g %%</text>`,
			x(from), marginTop-8, x(from), pictureHeight-marginBottom, x(from)+4, marginTop-2, 100*s)
	}
	for e := lowestE; e <= highestE*1.01; e *= 100 {
		line(`<text x="%d" y="%.1f" text-anchor="end" fill="#666">%g</text>`, marginLeft-6, y(e)+4, e)
	}
	for minute := 0; minute <= plan.Minutes; minute += max(plan.Minutes/6, 1) {
		line(`<text x="%.1f" y="%d" text-anchor="middle" fill="#666">%d</text>`, x(minute), pictureHeight-marginBottom+18, minute)
	}
	line(`<text x="%.1f" y="%d" text-anchor="middle" fill="#666">minutes</text>`, x(plan.Minutes/2), pictureHeight-12)
	limit := monitor.Judge(plan.Judge, monitor.Tally{}, monitor.Beside{}).ErrorLimit
	line(`<line x1="%d" y1="%.1f" x2="%.1f" y2="%.1f" stroke="black" stroke-dasharray="6 4"/><text x="%.1f" y="%.1f">rolled back above %.0f</text>`,
		marginLeft, y(limit), x(plan.Minutes), y(limit), x(plan.Minutes)+6, y(limit)+4, limit)
	const firstRun = 10 // any will do
	for _, kind := range []struct {
		factor float64
		colour string
		text   string
		lower  float64 // its label
	}{{1, "#1b7837", "as good as stable", 4}, {2, "#e08214", "2x the errors", 22}, {5, "#b2182b", "5x the errors", 0}} {
		last := 0.0
		for run := range 8 {
			values := monitor.Trace(monitor.Scenario{PerMinute: rpm, Base: o.base, Candidate: kind.factor * o.base}, plan, o.source(firstRun+run))
			var points []string
			for minute, e := range values {
				points = append(points, fmt.Sprintf("%.1f,%.1f", x(minute+1), y(e)))
			}
			last += y(values[len(values)-1]) / 8
			line(`<polyline fill="none" stroke="%s" stroke-opacity="0.65" points="%.1f,%.1f %s"/>`, kind.colour, x(0), y(1), strings.Join(points, " "))
		}
		line(`<text x="%.1f" y="%.1f" fill="%s">%s</text>`, x(plan.Minutes)+6, last+kind.lower, kind.colour, kind.text)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
