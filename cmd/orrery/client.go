package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
)

// connection is how the client reaches a server.
type connection struct {
	p      *program
	api    string
	key    string
	output string
}

// addClient adds the client's commands.
func (p *program) addClient(root *cobra.Command) {
	conn := &connection{p: p}
	f := root.PersistentFlags()
	f.StringVar(&conn.api, "api", "", "the server's address; default ORRERY_API, else the one of orrery dev in ./.orrery")
	f.StringVar(&conn.key, "key", "", "API key; default ORRERY_KEY, else the one of orrery dev")
	f.StringVarP(&conn.output, "output", "o", "table", "table or json")
	for _, c := range []*cobra.Command{
		conn.modelCommand(), conn.versionCommand(), conn.aliasCommand(), conn.routeCommand(), conn.rolloutCommand(),
		conn.rollbackCommand(), conn.batchCommand(), conn.scheduleCommand(), conn.driftCommand(), conn.retrainCommand(),
		conn.runCommand(), conn.predictCommand(), conn.keyCommand(), conn.webhookCommand(), conn.leasesCommand(),
		conn.eventCommand(), conn.doctorCommand(),
	} {
		c.GroupID = "client"
		if c.HasSubCommands() {
			c.RunE = needsSubcommand
		}
		root.AddCommand(c)
	}
}

// needsSubcommand answers a command that was given no subcommand, or a misspelt one, so that a script notices.
func needsSubcommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	return &exitError{exitUsage, fmt.Errorf("unknown command %q for %q; see %s --help", args[0], c.CommandPath(), c.CommandPath())}
}

// find fills in the address and key from the environment or from a running `orrery dev`.
func (c *connection) find() error {
	if c.output != "table" && c.output != "json" {
		return &exitError{exitUsage, fmt.Errorf("--output %q: want table or json", c.output)}
	}
	if c.api == "" {
		c.api = c.p.getenv("ORRERY_API")
	}
	if c.key == "" {
		c.key = c.p.getenv("ORRERY_KEY")
	}
	if c.api != "" {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join(".orrery", "dev.json"))
	if err != nil {
		return &exitError{exitUnavailable, errors.New("no server: start `orrery dev` here, or give --api (ORRERY_API)")}
	}
	var d devState
	if err := json.Unmarshal(raw, &d); err != nil {
		return fmt.Errorf(".orrery/dev.json: %w", err)
	}
	c.api = d.API
	if c.key == "" {
		key, err := os.ReadFile(filepath.Join(".orrery", "admin.key"))
		if err != nil {
			return err
		}
		c.key = strings.TrimSpace(string(key))
	}
	return nil
}

// dial returns a client of the API.
func (c *connection) dial() (*client.Client, error) {
	if err := c.find(); err != nil {
		return nil, err
	}
	base, err := url.Parse(c.api)
	if err != nil || base.Host == "" {
		return nil, &exitError{exitUsage, fmt.Errorf("--api %q: want http://host:port", c.api)}
	}
	return client.NewClient(strings.TrimSuffix(c.api, "/")+"/api/v1", client.WithRequestEditorFn(
		func(_ context.Context, r *http.Request) error {
			if c.key != "" {
				r.Header.Set("Authorization", "Bearer "+c.key)
			}
			return nil
		}))
}

// decode reads an answer into a T, or turns it into an error with an exit code.
func decode[T any](answer *http.Response, err error) (T, error) {
	var out T
	raw, err := body(answer, err)
	if err != nil || len(raw) == 0 {
		return out, err
	}
	if err := json.Unmarshal(raw, &out); err != nil {
		return out, fmt.Errorf("the server's answer: %w", err)
	}
	return out, nil
}

func body(answer *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, &exitError{exitUnavailable, err}
	}
	defer func() { _ = answer.Body.Close() }() // read
	raw, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, &exitError{exitUnavailable, err}
	}
	if answer.StatusCode < http.StatusBadRequest {
		return raw, nil
	}
	var p client.Problem
	if err := json.Unmarshal(raw, &p); err != nil || p.Detail == "" {
		p.Detail = strings.TrimSpace(answer.Status + " " + string(raw))
	}
	return nil, &exitError{exitCodeOf(answer.StatusCode), errors.New(p.Detail)}
}

func exitCodeOf(status int) int {
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusRequestEntityTooLarge:
		return exitUsage
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusConflict:
		return exitConflict
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		return exitUnavailable
	}
	return exitFailed
}

// table is what is printed for people.
type table struct {
	header []string
	rows   [][]string
}

// print writes v as JSON, or t as a table.
func (c *connection) print(v any, t table) error {
	if c.output == "json" {
		raw, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.p.stdout, string(raw))
		return err
	}
	w := tabwriter.NewWriter(c.p.stdout, 0, 4, 2, ' ', 0)
	if len(t.header) > 0 {
		fmt.Fprintln(w, strings.Join(t.header, "\t"))
	}
	for _, r := range t.rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// fields prints pairs of name and value, one a line.
func fields(pairs ...string) table {
	var t table
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			t.rows = append(t.rows, []string{pairs[i], pairs[i+1]})
		}
	}
	return t
}

func when(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

func deref[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// once returns an idempotency key, so that a request that is sent again is done once.
func once() *string {
	key := uuid.NewString()
	return &key
}

// settings turns name=value pairs into a JSON object; values that read as JSON are taken so, others are strings.
func settings(pairs []string) (*json.RawMessage, error) {
	if len(pairs) == 0 {
		return nil, nil //nolint:nilnil // nothing to set
	}
	out := map[string]json.RawMessage{}
	for _, p := range pairs {
		name, value, ok := strings.Cut(p, "=")
		if !ok {
			return nil, &exitError{exitUsage, fmt.Errorf("%q: want name=value", p)}
		}
		raw := json.RawMessage(value)
		if !json.Valid(raw) {
			quoted, err := json.Marshal(value)
			if err != nil {
				return nil, err
			}
			raw = quoted
		}
		out[name] = raw
	}
	raw, err := json.Marshal(out)
	message := json.RawMessage(raw)
	return &message, err
}

// watch follows a run until it ends: with a progress bar on a terminal, with a line for every change elsewhere.
func (c *connection) watch(ctx context.Context, api *client.Client, id string) (client.Run, error) {
	show := c.lines()
	if c.interactive() {
		var done func() error
		show, done = c.bar()
		defer func() { _ = done() }() // the terminal is gone; nobody looks
	}
	for {
		run, err := decode[client.Run](api.GetRun(ctx, id))
		if err != nil {
			return run, err
		}
		show(run)
		if run.EndedAt != nil {
			return run, nil
		}
		select {
		case <-ctx.Done():
			return run, ctx.Err()
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// lines shows a run by a line for every change of its state; for JSON it shows nothing.
func (c *connection) lines() func(client.Run) {
	last := ""
	return func(run client.Run) {
		line := fmt.Sprintf("%s %3.0f %%  %s", run.State, 100*run.Progress, run.Phase)
		if line != last && c.output == "table" {
			fmt.Fprintln(c.p.stderr, line)
			last = line
		}
	}
}

// bar shows a run by a bar that moves, with its phase beside it.
func (c *connection) bar() (show func(client.Run), done func() error) {
	const full = 1000
	bar := progressbar.NewOptions(full, progressbar.OptionSetWriter(c.p.stderr), progressbar.OptionSetPredictTime(false),
		progressbar.OptionSetWidth(24), progressbar.OptionClearOnFinish(), progressbar.OptionSetElapsedTime(true))
	return func(run client.Run) {
		bar.Describe(strings.ToLower(run.State) + ", " + run.Phase)
		_ = bar.Set(int(full * run.Progress)) // as above
	}, bar.Exit
}

// finish prints a run that ended and makes the exit code of it.
func (c *connection) finish(run client.Run) error {
	if err := c.print(run, runTable([]client.Run{run})); err != nil {
		return err
	}
	if run.State == "SUCCEEDED" {
		return nil
	}
	code := exitFailed
	if run.Kind == "rollout" {
		code = exitNotPromoted
	}
	return &exitError{code, fmt.Errorf("run %s: %s %s: %s", run.Id, run.State, run.Outcome, run.Message)}
}

func runTable(runs []client.Run) table {
	t := table{header: []string{"RUN", "KIND", "MODEL", "VERSION", "STATE", "OUTCOME", "PHASE", "MESSAGE"}}
	for _, r := range runs {
		t.rows = append(t.rows, []string{r.Id, r.Kind, r.Model, strconv.Itoa(r.Version), r.State, r.Outcome, r.Phase, r.Message})
	}
	return t
}
