package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/orrery-ml/orrery/api/client"
)

func (c *connection) rolloutCommand() *cobra.Command {
	root := &cobra.Command{Use: "rollout", Short: "Move a model's traffic to a version, step by step, judged"}
	root.AddCommand(c.rolloutStart(), c.rolloutWatch())
	for action, short := range map[string]string{
		"approve": "Approve a roll-out that waits for it", "reject": "Reject a roll-out that waits for approval",
		"abort": "Stop a roll-out and go back", "pause": "Hold a roll-out where it is", "resume": "Let a paused roll-out go on",
		"promote-now": "Promote without waiting for the bakes", "retry-step": "Begin the present step's time anew",
		"extend": "Give the present step more time", "release": "Let a roll-out that needs an operator try again",
	} {
		root.AddCommand(c.rolloutDecision(action, short))
	}
	return root
}

// rolloutFlags are what a roll-out is started with. What is not given is the model's policy.
type rolloutFlags struct {
	strategy, reason, onConflict, onInconclusive, goal string
	steps                                              []float32
	judge, variants                                    []string
	bake, maxBake, watch, approval, every              time.Duration
	stepPercent, share, holdback, floor, margin        float32
	bakeRequests                                       int64
	approve, urgent, promote, bandit, wait             bool
}

func (o *rolloutFlags) register(f *pflag.FlagSet) {
	f.StringVar(&o.strategy, "strategy", "", "all_at_once, blue_green, canary, linear, steps, shadow or ab")
	f.Float32SliceVar(&o.steps, "steps", nil, "the candidate's share in percent, ascending")
	f.Float32Var(&o.stepPercent, "step-percent", 0, "for linear: the size of a step")
	f.Float32Var(&o.share, "share", 100, "for shadow: the share of requests that is mirrored, in percent")
	f.StringArrayVar(&o.variants, "variant", nil, "for ab: VERSION=PERCENT; repeat for more")
	f.StringVar(&o.goal, "goal", "higher", "for ab: which way the business metric is better, higher or lower")
	f.Float32Var(&o.margin, "margin", 0, "for ab: a variant better by no more than this is no winner")
	f.BoolVar(&o.bandit, "bandit", false, "for ab: weights follow Thompson sampling")
	f.Float32Var(&o.floor, "floor", 5, "for a bandit: what every arm keeps, in percent")
	f.DurationVar(&o.every, "every", 15*time.Minute, "for a bandit: the time between two allocations")
	f.BoolVar(&o.promote, "promote", false, "for shadow and ab: what comes out well becomes the champion")
	f.DurationVar(&o.bake, "bake", time.Minute, "least time of a step")
	f.Int64Var(&o.bakeRequests, "bake-requests", 0, "least requests of the candidate in a step")
	f.DurationVar(&o.maxBake, "max-bake", time.Hour, "a step without a verdict by then is inconclusive; 0 waits")
	f.StringVar(&o.onInconclusive, "on-inconclusive", "", "rollback, hold or extend")
	f.DurationVar(&o.watch, "watch", 10*time.Minute, "how long to watch, and to keep the old version warm, after the promotion")
	f.Float32Var(&o.holdback, "holdback", 0, "the share the old version keeps while watched, in percent")
	f.BoolVar(&o.approve, "require-approval", false, "wait for somebody's approval, even where the policy asks for none")
	f.DurationVar(&o.approval, "approval-expires", 0, "reject when nobody approved by then; 0 waits")
	f.BoolVar(&o.urgent, "urgent", false, "do not wait for the policy's windows or the end of a freeze")
	f.StringVar(&o.onConflict, "on-conflict", "fail", "while another roll-out is under way: fail, or supersede it")
	f.StringArrayVar(&o.judge, "judge", nil, "a threshold of the judge, such as alpha=0.01; repeat for more")
	f.StringVar(&o.reason, "reason", "", "why, for the history")
	f.BoolVar(&o.wait, "wait", false, "wait until it ends; exit code 6 when it came to nothing")
}

// request makes the body of the flags that were given.
func (o *rolloutFlags) request(f *pflag.FlagSet, version int) (client.NewRollout, error) {
	r := client.NewRollout{
		Reason: given(f, "reason", o.reason), RequireApproval: given(f, "require-approval", o.approve), Urgent: given(f, "urgent", o.urgent),
		BakeRequests: given(f, "bake-requests", o.bakeRequests), StepPercent: given(f, "step-percent", o.stepPercent),
		SharePercent: given(f, "share", o.share), HoldbackPercent: given(f, "holdback", o.holdback), Promote: given(f, "promote", o.promote),
		BakeSeconds: given(f, "bake", seconds(o.bake)), MaxBakeSeconds: given(f, "max-bake", seconds(o.maxBake)),
		WatchSeconds: given(f, "watch", seconds(o.watch)), ApprovalSeconds: given(f, "approval-expires", seconds(o.approval)),
		Strategy: given(f, "strategy", client.NewRolloutStrategy(o.strategy)), OnConflict: given(f, "on-conflict", client.NewRolloutOnConflict(o.onConflict)),
		OnInconclusive: given(f, "on-inconclusive", client.NewRolloutOnInconclusive(o.onInconclusive)), Steps: given(f, "steps", o.steps),
	}
	if version > 0 {
		r.Version = &version
	}
	var err error
	if r.Judge, err = settings(o.judge); err != nil || o.strategy != "ab" {
		return r, err
	}
	r.Experiment = &client.Experiment{
		Goal: given(f, "goal", client.ExperimentGoal(o.goal)), Margin: given(f, "margin", o.margin), Bandit: given(f, "bandit", o.bandit),
		FloorPercent: given(f, "floor", o.floor), EverySeconds: given(f, "every", seconds(o.every)),
	}
	for _, v := range o.variants {
		number, percent, _ := strings.Cut(v, "=")
		n, err := strconv.Atoi(number)
		if err != nil {
			return r, &exitError{exitUsage, fmt.Errorf("--variant %q: want VERSION=PERCENT", v)}
		}
		p, err := strconv.ParseFloat(percent, 32)
		if err != nil {
			return r, &exitError{exitUsage, fmt.Errorf("--variant %q: want VERSION=PERCENT", v)}
		}
		r.Experiment.Variants = append(r.Experiment.Variants, client.VariantShare{Version: n, Percent: float32(p)})
	}
	return r, nil
}

// given returns a flag's value, nil when it was not given.
func given[T any](f *pflag.FlagSet, name string, v T) *T {
	if !f.Changed(name) {
		return nil
	}
	return &v
}

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func (c *connection) rolloutStart() *cobra.Command {
	var o rolloutFlags
	cmd := &cobra.Command{Use: "start MODEL [VERSION]", Short: "Start a roll-out", Args: cobra.RangeArgs(1, 2), RunE: func(cmd *cobra.Command, args []string) error {
		number := 0
		if len(args) > 1 {
			var err error
			if number, err = strconv.Atoi(args[1]); err != nil || number < 1 {
				return &exitError{exitUsage, fmt.Errorf("version %q: want a positive number", args[1])}
			}
		}
		r, err := o.request(cmd.Flags(), number)
		if err != nil {
			return err
		}
		api, err := c.dial()
		if err != nil {
			return err
		}
		run, err := decode[client.Run](api.StartRollout(cmd.Context(), args[0], &client.StartRolloutParams{IdempotencyKey: once()}, r))
		if err != nil {
			return err
		}
		if !o.wait {
			return c.print(run, runTable([]client.Run{run}))
		}
		if run, err = c.watch(cmd.Context(), api, run.Id); err != nil {
			return err
		}
		return c.finish(run)
	}}
	o.register(cmd.Flags())
	return cmd
}

func (c *connection) rolloutWatch() *cobra.Command {
	return &cobra.Command{Use: "watch MODEL|RUN", Short: "Follow a roll-out until it ends", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		id, err := c.rolloutOf(cmd.Context(), api, args[0])
		if err != nil {
			return err
		}
		run, err := c.watch(cmd.Context(), api, id)
		if err != nil {
			return err
		}
		return c.finish(run)
	}}
}

// rolloutOf returns the run under way of a model, or the argument itself when it is the id of a run.
func (c *connection) rolloutOf(ctx context.Context, api *client.Client, what string) (string, error) {
	kind, open := "rollout", true
	runs, err := decode[[]client.Run](api.ListRuns(ctx, &client.ListRunsParams{Kind: &kind, Open: &open, Model: &what}))
	if err != nil {
		return "", err
	}
	if len(runs) > 0 {
		return runs[0].Id, nil
	}
	if strings.Count(what, "-") == 4 {
		return what, nil
	}
	return "", &exitError{exitNotFound, fmt.Errorf("%s: %w", what, errNoRun)}
}

func (c *connection) rolloutDecision(action, short string) *cobra.Command {
	var reason string
	var by time.Duration
	cmd := &cobra.Command{Use: action + " MODEL|RUN", Short: short, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		id, err := c.rolloutOf(cmd.Context(), api, args[0])
		if err != nil {
			return err
		}
		run, err := decode[client.Run](api.DecideRun(cmd.Context(), id, strings.ReplaceAll(action, "-", "_"), client.Decision{Reason: &reason, Seconds: given(cmd.Flags(), "by", seconds(by))}))
		if err != nil {
			return err
		}
		return c.print(run, runTable([]client.Run{run}))
	}}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the record")
	if action == "extend" {
		cmd.Flags().DurationVar(&by, "by", 0, "by how much")
	}
	return cmd
}
