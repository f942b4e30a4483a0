package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
)

func routesTable(list []registry.Route) table {
	t := table{header: []string{"REVISION", "ROUTE", "AT", "BY", "OWNER", "REASON"}}
	for _, r := range list {
		t.rows = append(t.rows, []string{strconv.FormatInt(r.Revision, 10), routeText(r), when(r.At), r.Actor, r.Owner, r.Reason})
	}
	return t
}

func (c *connection) routeCommand() *cobra.Command {
	root := &cobra.Command{Use: "route", Short: "See and set how a model's traffic is split"}
	show := &cobra.Command{Use: "show MODEL", Short: "Show the route", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		r, err := decode[registry.Route](api.GetRoute(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		return c.print(r, routesTable([]registry.Route{r}))
	}}
	history := &cobra.Command{Use: "history MODEL", Short: "List all routes the model had", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]registry.Route](api.ListRoutes(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		return c.print(list, routesTable(list))
	}}
	change := client.RouteChange{}
	var take bool
	set := &cobra.Command{Use: "set MODEL VERSION", Short: "Send all traffic to a version, at once and by hand", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, number, err := c.dialVersion(args[1])
		if err != nil {
			return err
		}
		change.Version, change.Take = number, &take
		r, err := decode[registry.Route](api.SetRoute(cmd.Context(), args[0], change))
		if err != nil {
			return err
		}
		return c.print(r, routesTable([]registry.Route{r}))
	}}
	set.Flags().StringVar(&change.Reason, "reason", "set by hand", "why, for the history")
	set.Flags().BoolVar(&take, "take", false, "take the route from the run that owns it")
	root.AddCommand(show, history, set)
	return root
}

func (c *connection) rollbackCommand() *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: "rollback MODEL", Short: "Go back to the version before, now; works while Temporal is down", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		r, err := decode[registry.Route](api.Rollback(cmd.Context(), args[0], client.Decision{Reason: &reason}))
		if err != nil {
			return err
		}
		return c.print(r, routesTable([]registry.Route{r}))
	}}
	cmd.Flags().StringVar(&reason, "reason", "by hand", "why, for the history")
	return cmd
}

func (c *connection) rolloutCommand() *cobra.Command {
	root := &cobra.Command{Use: "rollout", Short: "Move a model's traffic to a version, step by step, judged"}
	root.AddCommand(c.rolloutStart(), c.rolloutWatch())
	for action, short := range map[string]string{
		"approve": "Approve a roll-out that waits for it", "reject": "Reject a roll-out that waits for approval",
		"abort": "Stop a roll-out and go back", "pause": "Hold a roll-out where it is", "resume": "Let a paused roll-out go on",
		"promote-now": "Promote without waiting for the bakes", "release": "Let a roll-out that needs an operator try again",
	} {
		root.AddCommand(c.rolloutDecision(action, short))
	}
	return root
}

func (c *connection) rolloutStart() *cobra.Command {
	var r client.NewRollout
	var strategy, reason string
	var steps []float32
	var judge []string
	var bake, maxBake, watch, approval time.Duration
	var stepPercent float32
	var bakeRequests int64
	var approve, wait bool
	cmd := &cobra.Command{Use: "start MODEL VERSION", Short: "Start a roll-out", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, number, err := c.dialVersion(args[1])
		if err != nil {
			return err
		}
		s := client.NewRolloutStrategy(strategy)
		r.Version, r.Strategy, r.Reason, r.RequireApproval, r.BakeRequests = number, &s, &reason, &approve, &bakeRequests
		if len(steps) > 0 {
			r.Steps = &steps
		}
		if stepPercent > 0 {
			r.StepPercent = &stepPercent
		}
		r.BakeSeconds, r.MaxBakeSeconds, r.WatchSeconds, r.ApprovalSeconds = seconds(bake), seconds(maxBake), seconds(watch), seconds(approval)
		if r.Judge, err = settings(judge); err != nil {
			return err
		}
		run, err := decode[client.Run](api.StartRollout(cmd.Context(), args[0], &client.StartRolloutParams{IdempotencyKey: once()}, r))
		if err != nil {
			return err
		}
		if !wait {
			return c.print(run, runTable([]client.Run{run}))
		}
		if run, err = c.watch(cmd.Context(), api, run.Id); err != nil {
			return err
		}
		return c.finish(run)
	}}
	f := cmd.Flags()
	f.StringVar(&strategy, "strategy", "canary", "all_at_once, canary, linear or steps")
	f.Float32SliceVar(&steps, "steps", nil, "the candidate's share in percent, ascending")
	f.Float32Var(&stepPercent, "step-percent", 0, "for linear: the size of a step")
	f.DurationVar(&bake, "bake", time.Minute, "least time of a step")
	f.Int64Var(&bakeRequests, "bake-requests", 0, "least requests of the candidate in a step")
	f.DurationVar(&maxBake, "max-bake", time.Hour, "a step without a verdict by then is rolled back; 0 waits")
	f.DurationVar(&watch, "watch", 10*time.Minute, "how long to watch after the promotion")
	f.BoolVar(&approve, "require-approval", false, "wait for somebody's approval first")
	f.DurationVar(&approval, "approval-expires", 0, "reject when nobody approved by then; 0 waits")
	f.StringArrayVar(&judge, "judge", nil, "a threshold of the judge, such as alpha=0.01; repeat for more")
	f.StringVar(&reason, "reason", "", "why, for the history")
	f.BoolVar(&wait, "wait", false, "wait until it ends; exit code 6 when it was not promoted")
	return cmd
}

func seconds(d time.Duration) *int64 {
	n := int64(d / time.Second)
	return &n
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
	cmd := &cobra.Command{Use: action + " MODEL|RUN", Short: short, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		id, err := c.rolloutOf(cmd.Context(), api, args[0])
		if err != nil {
			return err
		}
		run, err := decode[client.Run](api.DecideRun(cmd.Context(), id, strings.ReplaceAll(action, "-", "_"), client.Decision{Reason: &reason}))
		if err != nil {
			return err
		}
		return c.print(run, runTable([]client.Run{run}))
	}}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the record")
	return cmd
}

func (c *connection) runCommand() *cobra.Command {
	root := &cobra.Command{Use: "run", Short: "See runs and what they were decided on"}
	var p client.ListRunsParams
	var kind, model string
	var open bool
	list := &cobra.Command{Use: "list", Short: "List runs, newest first", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		p.Kind, p.Model, p.Open = &kind, &model, &open
		runs, err := decode[[]client.Run](api.ListRuns(cmd.Context(), &p))
		if err != nil {
			return err
		}
		return c.print(runs, runTable(runs))
	}}
	list.Flags().StringVar(&kind, "kind", "", "only runs of this kind")
	list.Flags().StringVar(&model, "model", "", "only runs of this model")
	list.Flags().BoolVar(&open, "open", false, "only runs that have not ended")
	show := &cobra.Command{Use: "show RUN", Short: "Show a run", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		run, err := decode[client.Run](api.GetRun(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		return c.print(run, fields("run", run.Id, "kind", run.Kind, "model", run.Model, "version", strconv.Itoa(run.Version), "state", run.State,
			"outcome", run.Outcome, "phase", run.Phase, "message", run.Message, "by", run.Actor, "parent", run.Parent, "created", when(run.CreatedAt), "temporal", deref(run.TemporalUrl)))
	}}
	watch := &cobra.Command{Use: "watch RUN", Short: "Follow a run until it ends", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		run, err := c.watch(cmd.Context(), api, args[0])
		if err != nil {
			return err
		}
		return c.finish(run)
	}}
	evidence := &cobra.Command{Use: "evidence RUN", Short: "Show what a run's decisions were made on", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]registry.Evidence](api.ListEvidence(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		t := table{header: []string{"AT", "VERDICT", "NUMBERS"}}
		for _, e := range list {
			t.rows = append(t.rows, []string{when(e.At), e.Verdict, string(e.Body)})
		}
		return c.print(list, t)
	}}
	root.AddCommand(list, show, watch, evidence)
	return root
}

func (c *connection) predictCommand() *cobra.Command {
	var file, sticky string
	cmd := &cobra.Command{
		Use: "predict MODEL[@ALIAS] [JSON]", Short: "Send an Open Inference Protocol request (JSON, --file, or standard input)", Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.find(); err != nil {
				return err
			}
			request := []byte(strings.Join(args[1:], ""))
			var err error
			switch {
			case file != "":
				request, err = os.ReadFile(file)
			case len(request) == 0:
				request, err = io.ReadAll(os.Stdin)
			}
			if err != nil {
				return &exitError{exitUsage, err}
			}
			return c.predict(cmd.Context(), args[0], sticky, request)
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "file with the request")
	cmd.Flags().StringVar(&sticky, "sticky", "", "key that keeps this caller on one arm")
	return cmd
}

func (c *connection) predict(ctx context.Context, model, sticky string, request []byte) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.api+"/v2/models/"+model+"/infer", bytes.NewReader(request))
	if err != nil {
		return &exitError{exitUsage, err}
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+c.key)
	if sticky != "" {
		r.Header.Set(registry.DefaultServingConfig().StickyHeader, sticky)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return &exitError{exitUnavailable, err}
	}
	defer func() { _ = answer.Body.Close() }() // read
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		return &exitError{exitUnavailable, err}
	}
	if answer.StatusCode != http.StatusOK {
		var e struct {
			Error string `json:"error"`
		}
		if json.Unmarshal(raw, &e) != nil || e.Error == "" {
			e.Error = answer.Status
		}
		return &exitError{exitCodeOf(answer.StatusCode), fmt.Errorf("%s", e.Error)}
	}
	_, err = fmt.Fprintln(c.p.stdout, string(raw))
	return err
}
