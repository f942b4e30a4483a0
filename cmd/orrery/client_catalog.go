package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
)

func modelTable(models []client.Model) table {
	t := table{header: []string{"MODEL", "ROUTE", "REVISION", "OWNER", "DESCRIPTION"}}
	for _, m := range models {
		t.rows = append(t.rows, []string{m.Name, routeText(m.Route), strconv.FormatInt(m.Route.Revision, 10), m.Route.Owner, m.Description})
	}
	return t
}

func routeText(r registry.Route) string {
	var parts []string
	for _, a := range r.Arms {
		parts = append(parts, fmt.Sprintf("%d:%s:%.4g%%", a.Version, a.Role, float64(a.Weight)/100))
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, " ")
}

func (c *connection) modelCommand() *cobra.Command {
	root := &cobra.Command{Use: "model", Short: "Create, list and configure models"}
	var description string
	var set modelSettings
	create := &cobra.Command{Use: "create NAME", Short: "Create a model", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		return c.saveModel(set, func(api *client.Client, config, retrain, rollout *json.RawMessage) (*http.Response, error) {
			return api.CreateModel(cmd.Context(), client.NewModel{Name: args[0], Description: &description, Config: config, Retrain: retrain, Rollout: rollout})
		})
	}}
	configure := &cobra.Command{Use: "configure NAME", Short: "Change the serving config, the retrain policy or the roll-out policy", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		return c.saveModel(set, func(api *client.Client, config, retrain, rollout *json.RawMessage) (*http.Response, error) {
			r := client.ModelConfiguration{Config: config, Retrain: retrain, Rollout: rollout}
			if cmd.Flags().Changed("description") {
				r.Description = &description
			}
			return api.ConfigureModel(cmd.Context(), args[0], r)
		})
	}}
	for _, cmd := range []*cobra.Command{create, configure} {
		cmd.Flags().StringVar(&description, "description", "", "what the model is for")
		cmd.Flags().StringArrayVar(&set.config, "config", nil, "a field of the serving config, such as max_batch=64; repeat for more")
		cmd.Flags().StringArrayVar(&set.retrain, "retrain", nil, "a field of the retrain policy, such as trainer=flights; repeat for more")
		cmd.Flags().StringArrayVar(&set.rollout, "rollout", nil, "a field of the roll-out policy, such as approvals=1; repeat for more")
	}
	list := &cobra.Command{Use: "list", Short: "List models with their live routes", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]client.Model](api.ListModels(cmd.Context()))
		if err != nil {
			return err
		}
		return c.print(list, modelTable(list))
	}}
	show := &cobra.Command{Use: "show NAME", Short: "Show a model", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		m, err := decode[client.Model](api.GetModel(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		return c.print(m, modelTable([]client.Model{m}))
	}}
	root.AddCommand(create, configure, list, show)
	return root
}

// modelSettings are fields of a model's configuration and policies, as they are typed.
type modelSettings struct{ config, retrain, rollout []string }

// saveModel sends a model's settings and prints the model.
func (c *connection) saveModel(set modelSettings, send func(api *client.Client, config, retrain, rollout *json.RawMessage) (*http.Response, error)) error {
	api, err := c.dial()
	if err != nil {
		return err
	}
	var parts [3]*json.RawMessage
	for i, list := range [][]string{set.config, set.retrain, set.rollout} {
		if parts[i], err = settings(list); err != nil {
			return err
		}
	}
	m, err := decode[client.Model](send(api, parts[0], parts[1], parts[2]))
	if err != nil {
		return err
	}
	return c.print(m, modelTable([]client.Model{m}))
}

func versionTable(list []client.Version) table {
	t := table{header: []string{"MODEL", "VERSION", "STATUS", "SIZE", "CREATED", "BY", "REASON"}}
	for _, v := range list {
		t.rows = append(t.rows, []string{v.Model, strconv.Itoa(v.Version), v.Status, strconv.FormatInt(v.Size, 10), when(v.CreatedAt), v.CreatedBy, deref(v.Reason)})
	}
	return t
}

func (c *connection) versionCommand() *cobra.Command {
	root := &cobra.Command{Use: "version", Short: "Register and list versions"}
	var training, description string
	var wait bool
	register := &cobra.Command{
		Use: "register MODEL PATH", Short: "Upload a model file, or a directory with model.onnx, and register it", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := c.dial()
			if err != nil {
				return err
			}
			run, err := c.register(cmd.Context(), api, args[0], args[1], training, description)
			if err != nil {
				return err
			}
			if wait {
				if run, err = c.watch(cmd.Context(), api, run.Id); err != nil {
					return err
				}
				return c.finish(run)
			}
			return c.print(run, runTable([]client.Run{run}))
		},
	}
	register.Flags().StringVar(&training, "training-data", "", "CSV or Parquet file the model was trained on, for its baseline")
	register.Flags().StringVar(&description, "description", "", "what is new")
	register.Flags().BoolVar(&wait, "wait", true, "wait until it is ready")
	list := &cobra.Command{Use: "list MODEL", Short: "List versions", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]client.Version](api.ListVersions(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		return c.print(list, versionTable(list))
	}}
	show := &cobra.Command{Use: "show MODEL VERSION", Short: "Show a version", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, number, err := c.dialVersion(args[1])
		if err != nil {
			return err
		}
		v, err := decode[client.Version](api.GetVersion(cmd.Context(), args[0], number))
		if err != nil {
			return err
		}
		return c.print(v, versionTable([]client.Version{v}))
	}}
	archive := &cobra.Command{Use: "archive MODEL VERSION", Short: "Archive a version that nothing needs", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, number, err := c.dialVersion(args[1])
		if err != nil {
			return err
		}
		_, err = body(api.ArchiveVersion(cmd.Context(), args[0], number))
		return err
	}}
	root.AddCommand(register, list, show, archive)
	return root
}

func (c *connection) dialVersion(text string) (*client.Client, int, error) {
	number, err := strconv.Atoi(text)
	if err != nil || number < 1 {
		return nil, 0, &exitError{exitUsage, fmt.Errorf("version %q: want a positive number", text)}
	}
	api, err := c.dial()
	return api, number, err
}

// register uploads the files below path and registers them.
func (c *connection) register(ctx context.Context, api *client.Client, model, path, training, description string) (client.Run, error) {
	files, paths, err := listFiles(path)
	if err != nil {
		return client.Run{}, &exitError{exitUsage, err}
	}
	r := client.NewVersion{Files: files, Description: &description}
	for i, f := range files {
		if err := c.upload(ctx, api, paths[i], f); err != nil {
			return client.Run{}, err
		}
	}
	if training != "" {
		f, err := describeFile(training, filepath.Base(training))
		if err != nil {
			return client.Run{}, &exitError{exitUsage, err}
		}
		if err := c.upload(ctx, api, training, f); err != nil {
			return client.Run{}, err
		}
		r.TrainingData = &f.SHA256
	}
	return decode[client.Run](api.RegisterVersion(ctx, model, &client.RegisterVersionParams{IdempotencyKey: once()}, r))
}

// listFiles describes a file, or all files below a directory.
func listFiles(path string) (files []registry.File, paths []string, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if !info.IsDir() {
		f, err := describeFile(path, filepath.Base(path))
		return []registry.File{f}, []string{path}, err
	}
	err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if !e.Type().IsRegular() {
			return fmt.Errorf("%s is neither a file nor a directory", p)
		}
		rel, err := filepath.Rel(path, p)
		if err != nil {
			return err
		}
		f, err := describeFile(p, filepath.ToSlash(rel))
		files, paths = append(files, f), append(paths, p)
		return err
	})
	return files, paths, err
}

func describeFile(path, name string) (registry.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return registry.File{}, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	h := sha256.New()
	n, err := io.Copy(h, f)
	return registry.File{Path: name, Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

// upload sends a file unless the server has it, with a progress bar when people look.
func (c *connection) upload(ctx context.Context, api *client.Client, path string, f registry.File) error {
	if answer, err := api.HeadBlob(ctx, f.SHA256); err == nil {
		_ = answer.Body.Close() // a HEAD has none
		if answer.StatusCode == http.StatusOK {
			return nil
		}
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // opened for reading
	var source io.Reader = file
	if c.interactive() {
		bar := progressbar.NewOptions64(f.Size, progressbar.OptionSetWriter(c.p.stderr), progressbar.OptionShowBytes(true),
			progressbar.OptionSetDescription("upload "+f.Path), progressbar.OptionClearOnFinish())
		reader := progressbar.NewReader(file, bar)
		source = &reader
	}
	setLength := func(_ context.Context, r *http.Request) error {
		r.ContentLength = f.Size
		r.Header.Set("Expect", "100-continue") // a refusal, of a full disk say, then comes before the bytes go
		return nil
	}
	_, err = body(api.PutBlobWithBody(ctx, f.SHA256, &client.PutBlobParams{ContentLength: f.Size}, "application/octet-stream", source, setLength))
	return err
}

// interactive says whether standard output is a terminal.
func (c *connection) interactive() bool {
	f, ok := c.p.stdout.(*os.File)
	if !ok || c.output != "table" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func (c *connection) aliasCommand() *cobra.Command {
	root := &cobra.Command{Use: "alias", Short: "Move aliases and see their history"}
	show := func(list []client.Alias) table {
		t := table{header: []string{"ALIAS", "VERSION", "SINCE", "BY"}}
		for _, a := range list {
			t.rows = append(t.rows, []string{a.Name, strconv.Itoa(a.Version), when(a.UpdatedAt), a.Actor})
		}
		return t
	}
	list := &cobra.Command{Use: "list MODEL", Short: "List aliases", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		list, err := decode[[]client.Alias](api.ListAliases(cmd.Context(), args[0]))
		if err != nil {
			return err
		}
		return c.print(list, show(list))
	}}
	var reason string
	set := &cobra.Command{Use: "set MODEL ALIAS VERSION", Short: "Move an alias; champion moves the route", Args: cobra.ExactArgs(3), RunE: func(cmd *cobra.Command, args []string) error {
		api, number, err := c.dialVersion(args[2])
		if err != nil {
			return err
		}
		list, err := decode[[]client.Alias](api.SetAlias(cmd.Context(), args[0], args[1], client.AliasChange{Version: number, Reason: &reason}))
		if err != nil {
			return err
		}
		return c.print(list, show(list))
	}}
	set.Flags().StringVar(&reason, "reason", "", "why, for the history")
	remove := &cobra.Command{Use: "delete MODEL ALIAS", Short: "Remove an alias", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		_, err = body(api.DeleteAlias(cmd.Context(), args[0], args[1]))
		return err
	}}
	history := &cobra.Command{Use: "history MODEL ALIAS", Short: "Which version it named when, and who moved it", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		moves, err := decode[[]client.AliasMove](api.ListAliasMoves(cmd.Context(), args[0], args[1]))
		if err != nil {
			return err
		}
		t := table{header: []string{"AT", "FROM", "TO", "BY", "REASON"}}
		for _, m := range moves {
			t.rows = append(t.rows, []string{when(m.At), strconv.Itoa(m.From), strconv.Itoa(m.To), m.Actor, m.Reason})
		}
		return c.print(moves, t)
	}}
	root.AddCommand(list, set, remove, history)
	return root
}

// errNoRun is what a command that needs a run says.
var errNoRun = errors.New("no roll-out of that model is under way")
