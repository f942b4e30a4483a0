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

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/monitor"
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
		return c.print(list, evidenceTable(list))
	}}
	root.AddCommand(list, show, watch, evidence)
	return root
}

// evidenceTable shows what a judge's decisions were made on; evidence of other runs is shown as it is.
func evidenceTable(list []registry.Evidence) table {
	t := table{header: []string{"AT", "VERDICT", "STABLE", "CANDIDATE", "ERROR E", "PASS E", "P99 MS", "WHY"}}
	for _, e := range list {
		var j monitor.Judgement
		if err := json.Unmarshal(e.Body, &j); err != nil || j.Verdict == "" {
			t.rows = append(t.rows, []string{when(e.At), e.Verdict, "", "", "", "", "", string(e.Body)})
			continue
		}
		arm := func(a monitor.ArmCount) string { return fmt.Sprintf("%d errors of %d", a.Errors, a.Requests) }
		t.rows = append(t.rows, []string{
			when(e.At), e.Verdict, arm(j.Stable), arm(j.Candidate), fmt.Sprintf("%.3g of %.3g", j.ErrorE, j.ErrorLimit),
			fmt.Sprintf("%.3g of %.3g", j.PassE, j.PassLimit), fmt.Sprintf("%.1f / %.1f", j.StableP99, j.CandidateP99), j.Reason,
		})
	}
	return t
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
