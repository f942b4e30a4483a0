package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/monitor"
)

// putData uploads a local file for batch scoring and returns its key; a key below data/ is taken as it is.
func (c *connection) putData(ctx context.Context, api *client.Client, input string) (string, error) {
	if strings.HasPrefix(input, "data/") {
		if _, err := os.Stat(input); err != nil {
			return input, nil
		}
	}
	f, err := describeFile(input, filepath.Base(input))
	if err != nil {
		return "", &exitError{exitUsage, err}
	}
	file, err := os.Open(input)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }() // opened for reading
	key := "data/" + f.SHA256[:12] + "-" + f.Path
	setLength := func(_ context.Context, r *http.Request) error { r.ContentLength = f.Size; return nil }
	_, err = body(api.PutObjectWithBody(ctx, &client.PutObjectParams{Key: key, ContentLength: f.Size}, "application/octet-stream", file, setLength))
	return key, err
}

func (c *connection) batchCommand() *cobra.Command {
	root := &cobra.Command{Use: "batch", Short: "Score files"}
	var version int
	var perPart int64
	var maxFailed float64
	var wait bool
	start := &cobra.Command{Use: "run MODEL FILE|KEY", Short: "Score a CSV or Parquet file", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		key, err := c.putData(cmd.Context(), api, args[1])
		if err != nil {
			return err
		}
		r := client.NewBatch{Input: key, Version: &version, RowsPerPartition: &perPart, MaxFailedShare: &maxFailed}
		run, err := decode[client.Run](api.StartBatch(cmd.Context(), args[0], &client.StartBatchParams{IdempotencyKey: once()}, r))
		if err != nil || !wait {
			return c.printRun(run, err)
		}
		if run, err = c.watch(cmd.Context(), api, run.Id); err != nil {
			return err
		}
		return c.finish(run)
	}}
	start.Flags().IntVar(&version, "version", 0, "version that scores; default the champion")
	start.Flags().Int64Var(&perPart, "rows-per-partition", 0, "rows of one partition; default 100000")
	start.Flags().Float64Var(&maxFailed, "max-failed-share", 0, "share of rows that may fail")
	start.Flags().BoolVar(&wait, "wait", true, "wait until it is done")
	get := &cobra.Command{Use: "get KEY", Short: "Download a result, such as batch/RUN/_manifest.json", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		answer, err := api.GetObject(cmd.Context(), &client.GetObjectParams{Key: args[0]})
		if err != nil || answer.StatusCode != http.StatusOK {
			_, err = body(answer, err)
			return err
		}
		defer func() { _ = answer.Body.Close() }() // read
		_, err = io.Copy(c.p.stdout, answer.Body)
		return err
	}}
	root.AddCommand(start, get)
	return root
}

// printRun prints a run that was started.
func (c *connection) printRun(run client.Run, err error) error {
	if err != nil {
		return err
	}
	return c.print(run, runTable([]client.Run{run}))
}

func (c *connection) driftCommand() *cobra.Command {
	root := &cobra.Command{Use: "drift", Short: "Compare traffic with the training data"}
	var window time.Duration
	check := &cobra.Command{Use: "check MODEL", Short: "Check the last hours of traffic for drift", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		run, err := decode[client.Run](api.StartDriftCheck(cmd.Context(), args[0], &client.StartDriftCheckParams{IdempotencyKey: once()},
			client.NewDriftCheck{WindowSeconds: new(seconds(window))}))
		if err != nil {
			return err
		}
		if run, err = c.watch(cmd.Context(), api, run.Id); err != nil {
			return err
		}
		if run.State != "SUCCEEDED" {
			return c.finish(run)
		}
		return c.printDrift(cmd.Context(), api, args[0], run)
	}}
	check.Flags().DurationVar(&window, "window", 24*time.Hour, "how far back to look")
	root.AddCommand(check)
	return root
}

func (c *connection) printDrift(ctx context.Context, api *client.Client, model string, run client.Run) error {
	report, err := decode[monitor.DriftReport](api.GetObject(ctx, &client.GetObjectParams{Key: "drift/" + model + "/" + run.Id + ".json"}))
	if err != nil {
		return err
	}
	t := table{header: []string{"FEATURE", "STATUS", "PSI", "KS", "P", "MEAN", "BASELINE"}}
	for _, f := range report.Features {
		t.rows = append(t.rows, []string{
			f.Name, string(f.Status), fmt.Sprintf("%.3f", f.PSI), fmt.Sprintf("%.3f", f.KS), fmt.Sprintf("%.2g", f.P),
			fmt.Sprintf("%.4g", f.Mean), fmt.Sprintf("%.4g", f.Baseline),
		})
	}
	t.rows = append(t.rows, []string{"", string(report.Status), run.Message})
	return c.print(report, t)
}

func (c *connection) retrainCommand() *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: "retrain MODEL", Short: "Ask the model's policy for a retraining", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		_, err = body(api.TriggerRetrain(cmd.Context(), args[0], client.Decision{Reason: &reason}))
		return err
	}}
	cmd.Flags().StringVar(&reason, "reason", "by hand", "why, for the record")
	return cmd
}

func scheduleTable(list []client.Schedule) table {
	t := table{header: []string{"SCHEDULE", "KIND", "MODEL", "CRON", "NEXT", "MISSED", "LAST"}}
	for _, s := range list {
		next := ""
		if s.Next != nil {
			next = when(*s.Next)
		}
		t.rows = append(t.rows, []string{s.Name, s.Kind, s.Model, s.Cron, next, strconv.Itoa(s.Missed), deref(s.LastWorkflow)})
	}
	return t
}

func (c *connection) scheduleCommand() *cobra.Command {
	root := &cobra.Command{Use: "schedule", Short: "Run batch jobs, drift checks and retention by the clock"}
	list := &cobra.Command{Use: "list", Short: "List schedules", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]client.Schedule](api.ListSchedules(cmd.Context()))
		if err != nil {
			return err
		}
		return c.print(list, scheduleTable(list))
	}}
	remove := &cobra.Command{Use: "delete NAME", Short: "Delete a schedule", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		_, err = body(api.DeleteSchedule(cmd.Context(), args[0]))
		return err
	}}
	var from string
	trigger := &cobra.Command{Use: "trigger NAME", Short: "Run it now, or for times that are past", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		var r client.Trigger
		if from != "" {
			at, err := time.Parse(time.RFC3339, from)
			if err != nil {
				return &exitError{exitUsage, fmt.Errorf("--backfill-from %q: want a time such as 2026-11-01T00:00:00Z", from)}
			}
			r.From = &at
		}
		_, err = body(api.TriggerSchedule(cmd.Context(), args[0], r))
		return err
	}}
	trigger.Flags().StringVar(&from, "backfill-from", "", "run for every time since then")
	root.AddCommand(c.scheduleCreate(), list, remove, trigger)
	return root
}

func (c *connection) scheduleCreate() *cobra.Command {
	var model, cron, zone, input string
	var window time.Duration
	cmd := &cobra.Command{
		Use: "create NAME batch|drift|retention", Short: "Make a schedule", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := c.dial()
			if err != nil {
				return err
			}
			r := client.NewSchedule{Name: args[0], Kind: client.NewScheduleKind(args[1]), Cron: cron, TimeZone: &zone, Model: &model}
			if input != "" {
				key, err := c.putData(cmd.Context(), api, input)
				if err != nil {
					return err
				}
				r.Batch = &client.NewBatch{Input: key}
			}
			if window > 0 {
				r.Drift = &client.NewDriftCheck{WindowSeconds: new(seconds(window))}
			}
			s, err := decode[client.Schedule](api.CreateSchedule(cmd.Context(), r))
			if err != nil {
				return err
			}
			return c.print(s, scheduleTable([]client.Schedule{s}))
		},
	}
	cmd.Flags().StringVar(&model, "model", "", "model it is for")
	cmd.Flags().StringVar(&cron, "cron", "0 2 * * *", "minute hour day month weekday")
	cmd.Flags().StringVar(&zone, "time-zone", "UTC", "time zone of the cron line")
	cmd.Flags().StringVar(&input, "input", "", "for batch: a file, or a key below data/ that is read anew each time")
	cmd.Flags().DurationVar(&window, "window", 0, "for drift: how far back to look; default a day")
	return cmd
}
