package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/toolpath"
	"github.com/orrery-ml/orrery/registry"
)

func (c *connection) keyCommand() *cobra.Command {
	root := &cobra.Command{Use: "key", Short: "Make and revoke API keys"}
	show := func(keys []client.Key) table {
		t := table{header: []string{"ID", "NAME", "ROLE", "MODELS", "CREATED", "REVOKED"}}
		for _, k := range keys {
			revoked := ""
			if k.RevokedAt != nil {
				revoked = when(*k.RevokedAt)
			}
			t.rows = append(t.rows, []string{k.Id, k.Name, k.Role, strings.Join(k.Models, ","), when(k.CreatedAt), revoked})
		}
		return t
	}
	var role string
	var models []string
	create := &cobra.Command{Use: "create NAME", Short: "Make a key; its secret is shown once", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		k, err := decode[client.Key](api.CreateKey(cmd.Context(), client.NewKey{Name: args[0], Role: role, Models: &models}))
		if err != nil {
			return err
		}
		return c.print(k, fields("id", k.Id, "name", k.Name, "role", k.Role, "secret", deref(k.Secret)))
	}}
	create.Flags().StringVar(&role, "role", "viewer", "viewer, predictor, developer, deployer, admin or approver")
	create.Flags().StringSliceVar(&models, "models", nil, "models it may touch; none given is all")
	list := &cobra.Command{Use: "list", Short: "List keys", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		keys, err := decode[[]client.Key](api.ListKeys(cmd.Context()))
		if err != nil {
			return err
		}
		return c.print(keys, show(keys))
	}}
	revoke := &cobra.Command{Use: "revoke ID", Short: "Revoke a key", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		_, err = body(api.RevokeKey(cmd.Context(), args[0]))
		return err
	}}
	root.AddCommand(create, list, revoke)
	return root
}

func (c *connection) leasesCommand() *cobra.Command {
	return &cobra.Command{Use: "leases", Short: "List gateways and workers", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]client.Lease](api.ListLeases(cmd.Context()))
		if err != nil {
			return err
		}
		t := table{header: []string{"KIND", "NODE", "ADDRESS", "LIVE", "APPLIED", "VERSIONS"}}
		for _, l := range list {
			var held []string
			for _, v := range l.Worker.Loaded {
				held = append(held, fmt.Sprintf("%s:%d %s", v.Model, v.Version, v.State))
			}
			t.rows = append(t.rows, []string{l.Kind, l.Node, l.Address, strconv.FormatBool(l.Live), strconv.FormatInt(l.Applied, 10), strings.Join(held, ", ")})
		}
		return c.print(list, t)
	}}
}

func (c *connection) eventCommand() *cobra.Command {
	var after int64
	var follow bool
	cmd := &cobra.Command{Use: "events", Short: "Show the log of all changes", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		for {
			p := client.ListEventsParams{After: &after}
			if follow {
				wait := 30
				p.Wait = &wait
			}
			events, err := decode[[]registry.Event](api.ListEvents(cmd.Context(), &p))
			if err != nil {
				return err
			}
			t := table{}
			for _, e := range events {
				t.rows = append(t.rows, []string{strconv.FormatInt(e.Number, 10), when(e.At), string(e.Type), e.Model, e.Actor, e.Run})
				after = e.Number
			}
			if err := c.print(events, t); err != nil || (!follow && len(events) == 0) {
				return err
			}
		}
	}}
	cmd.Flags().Int64Var(&after, "after", 0, "only events with a higher number")
	cmd.Flags().BoolVar(&follow, "follow", false, "go on as events come")
	return cmd
}

// check is one line of the doctor's report.
type check struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	Say  string `json:"say"`
}

func (c *connection) doctorCommand() *cobra.Command {
	return &cobra.Command{Use: "doctor", Short: "Say what is wrong and what to do about it", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		checks := c.localChecks()
		checks = append(checks, c.serverChecks(cmd.Context())...)
		t, bad := table{}, 0
		for _, k := range checks {
			mark := "ok  "
			if !k.OK {
				mark = "FAIL"
				bad++
			}
			t.rows = append(t.rows, []string{mark, k.Name, k.Say})
		}
		if err := c.print(checks, t); err != nil {
			return err
		}
		if bad > 0 {
			return &exitError{exitFailed, fmt.Errorf("%d of %d checks failed", bad, len(checks))}
		}
		return nil
	}}
}

func (c *connection) localChecks() []check {
	var out []check
	add := func(name, found string, err error) {
		if err != nil {
			out = append(out, check{name, false, err.Error()})
			return
		}
		out = append(out, check{name, true, found})
	}
	library, err := toolpath.OnnxRuntime(c.p.getenv("ORRERY_ONNXRUNTIME_LIB"))
	add("ONNX Runtime", library, err)
	temporal, err := toolpath.Find("temporal")
	add("Temporal CLI", temporal, err)
	wd, err := os.Getwd()
	add("disk", wd, err)
	if free := freeBytes(wd); err == nil {
		out[len(out)-1] = check{"disk", free > 1<<30, fmt.Sprintf("%.1f GB free at %s", float64(free)/1e9, wd)}
	}
	return out
}

// behind says whether a gateway that lives has not applied an event yet.
func behind(l client.Lease, position int64) bool {
	return l.Kind == "gateway" && l.Live && l.Applied < position
}

// settledLeases reads the leases, and gives gateways the time they have to acknowledge what changes nothing for them.
func settledLeases(ctx context.Context, api *client.Client, position int64) ([]client.Lease, error) {
	for until := time.Now().Add(3 * time.Second); ; {
		leases, err := decode[[]client.Lease](api.ListLeases(ctx))
		late := slices.ContainsFunc(leases, func(l client.Lease) bool { return behind(l, position) })
		if err != nil || !late || time.Now().After(until) {
			return leases, err
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return leases, err
		}
	}
}

func (c *connection) serverChecks(ctx context.Context) []check {
	api, err := c.dial()
	if err != nil {
		return []check{{"server", false, err.Error()}}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	s, err := decode[client.Status](api.GetStatus(ctx))
	if err != nil {
		return []check{{"server", false, fmt.Sprintf("%s: %v", c.api, err)}}
	}
	out := []check{
		{"server", true, fmt.Sprintf("%s, version %s", c.api, s.Version)},
		{"registry", s.Registry == "ok", s.Registry},
		{"object store", s.Store == "ok", s.Store},
		{"Temporal", s.Temporal == "ok", s.Temporal},
		{"orchestrator", s.Orchestrator == "ok", s.Orchestrator},
	}
	leases, err := settledLeases(ctx, api, s.Position)
	if err != nil {
		return append(out, check{"leases", false, err.Error()})
	}
	workers := 0
	for _, l := range leases {
		if l.Kind == "worker" && l.Live {
			workers++
		}
		if behind(l, s.Position) {
			out = append(out, check{"gateway " + l.Node, false, fmt.Sprintf("it is %d events behind: see its log", s.Position-l.Applied)})
		}
	}
	say := fmt.Sprintf("%d attached", workers)
	if workers == 0 {
		say = "none is attached: start `orrery worker` with the servers' join token"
	}
	out = append(out, check{"workers", workers > 0, say})
	open := true
	runs, err := decode[[]client.Run](api.ListRuns(ctx, &client.ListRunsParams{Open: &open}))
	if err != nil {
		return append(out, check{"runs", false, err.Error()})
	}
	for _, r := range runs {
		switch {
		case r.State == "NEEDS_OPERATOR":
			out = append(out, check{"run " + r.Id, false, fmt.Sprintf("%s of %s needs an operator: %s; mend it, then `orrery rollout release %s`", r.Kind, r.Model, r.Phase, r.Id)})
		case r.State == "PENDING" && time.Since(r.CreatedAt) > 30*time.Second:
			out = append(out, check{"run " + r.Id, false, "it is not started: is Temporal up and an orchestrator running?"})
		}
	}
	return out
}
