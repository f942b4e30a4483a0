package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/orrery-ml/orrery/api"
	"github.com/orrery-ml/orrery/internal/supervisor"
	"github.com/orrery-ml/orrery/internal/toolpath"
)

// devState is what `orrery dev` writes for the client to find.
type devState struct {
	API  string `json:"api"`
	GRPC string `json:"grpc"`
	UI   string `json:"temporal_ui"`
	PID  int    `json:"pid"`
}

type devOptions struct {
	dir     string
	http    string
	grpc    string
	config  string
	workers int
}

func (p *program) devCommand() *cobra.Command {
	var o devOptions
	c := &cobra.Command{
		Use: "dev", Short: "Run everything on this machine: server, orchestrator, worker, Temporal", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return p.dev(c.Context(), o) },
	}
	c.Flags().StringVar(&o.dir, "dir", ".orrery", "where all state is kept")
	c.Flags().StringVar(&o.http, "http", "127.0.0.1:8080", "listen address of the API and console; another free port when it is taken")
	c.Flags().StringVar(&o.grpc, "grpc", "127.0.0.1:8081", "listen address of gRPC; another free port when it is taken")
	c.Flags().IntVar(&o.workers, "workers", 1, "serving workers")
	c.Flags().StringVar(&o.config, "config", "", "orchestrator configuration with trainers; default DIR/orrery.yaml when it is there")
	return c
}

func (p *program) dev(ctx context.Context, o devOptions) error {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "logs"), 0o700); err != nil {
		return err
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer unlock()
	d := &devRun{p: p, dir: dir, options: o}
	children, err := d.children(ctx)
	if err != nil {
		return err
	}
	log, err := p.logger("warn")
	if err != nil {
		return err
	}
	var group supervisor.Group
	group.Add("processes", func(ctx context.Context) error { return supervisor.Run(ctx, log, children...) })
	group.Add("readiness", func(ctx context.Context) error { return d.announce(ctx, log) })
	err = group.Run(ctx)
	for _, f := range d.logs {
		err = errors.Join(err, f.Close())
	}
	return errors.Join(err, os.Remove(filepath.Join(dir, "dev.json")))
}

// lockDir makes sure that one dev runs in a directory.
func lockDir(dir string) (func(), error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another `orrery dev` runs in %s", dir), f.Close())
	}
	return func() { _ = f.Close() }, nil // closing gives the lock back
}

type devRun struct {
	p       *program
	dir     string
	options devOptions
	state   devState
	admin   string
	logs    []io.Closer
}

// children are the processes of dev, in the order they are started; they are stopped in reverse.
func (d *devRun) children(ctx context.Context) ([]supervisor.Child, error) {
	temporal, err := toolpath.Find("temporal")
	if err != nil {
		return nil, err
	}
	if _, err := toolpath.OnnxRuntime(d.p.getenv("ORRERY_ONNXRUNTIME_LIB")); err != nil { // its workers would start again for ever
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	token, err := d.secret("join.token", rand.Text)
	if err != nil {
		return nil, err
	}
	if d.admin, err = d.secret("admin.key", api.NewSecret); err != nil {
		return nil, err
	}
	ports, err := freePorts(ctx, d.options.http, d.options.grpc, "127.0.0.1:7233", "127.0.0.1:8233")
	if err != nil {
		return nil, err
	}
	web, rpc, front, ui := ports[0], ports[1], ports[2], ports[3]
	d.state = devState{API: "http://" + web, GRPC: rpc, UI: "http://" + ui, PID: os.Getpid()}
	env := []string{
		"ORRERY_JOIN_TOKEN=" + token, "ORRERY_ADMIN_KEY=" + d.admin, "ORRERY_REGISTRY=sqlite:" + filepath.Join(d.dir, "registry.db"),
		"ORRERY_STORE=dir:" + filepath.Join(d.dir, "objects"), "ORRERY_TEMPORAL=" + front, "ORRERY_TEMPORAL_UI=" + d.state.UI,
		"ORRERY_HTTP=", "ORRERY_GRPC=", "ORRERY_SERVERS=" + rpc, "ORRERY_STATE_DIR=" + filepath.Join(d.dir, "server"),
	}
	list := []supervisor.Child{
		{Name: "temporal", Env: []string{"HOME=" + d.dir}, Args: temporalArgs(temporal, d.dir, front, ui), Patience: 5 * time.Second},
		{Name: "server", Env: env, Args: []string{self, "server", "--dev-open", "--http", web, "--grpc", rpc, "--node", "server"}},
		{Name: "orchestrator", Env: env, Args: []string{self, "orchestrator", "--config", d.config()}},
	}
	for i := range d.options.workers {
		name := fmt.Sprintf("worker-%d", i+1)
		list = append(list, supervisor.Child{
			Name: name, Env: env, Args: []string{self, "worker", "--node", name, "--cache-dir", filepath.Join(d.dir, "cache", name)},
		})
	}
	for i := range list {
		f, err := os.OpenFile(filepath.Join(d.dir, "logs", list[i].Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		d.logs = append(d.logs, f)
		list[i].Log = f
	}
	return list, nil
}

// config is the orchestrator's configuration file, "" when there is none.
func (d *devRun) config() string {
	if d.options.config != "" {
		return d.options.config
	}
	path := filepath.Join(d.dir, "orrery.yaml")
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

func temporalArgs(bin, dir, front, ui string) []string {
	_, port, _ := net.SplitHostPort(front) // made by freePorts
	_, uiPort, _ := net.SplitHostPort(ui)  // made by freePorts
	return []string{
		bin, "server", "start-dev", "--ip", "127.0.0.1", "--port", port, "--ui-ip", "127.0.0.1", "--ui-port", uiPort,
		"--db-filename", filepath.Join(dir, "temporal.db"), "--log-level", "warn",
		"--search-attribute", "OrreryModel=Keyword", "--search-attribute", "OrreryVersion=Int", "--search-attribute", "OrreryKind=Keyword",
		"--search-attribute", "OrreryActor=Keyword", "--search-attribute", "OrreryRun=Keyword",
	}
}

// secret reads a secret that only the user may read, or makes it.
func (d *devRun) secret(name string, fresh func() string) (string, error) {
	path := filepath.Join(d.dir, name)
	raw, err := os.ReadFile(path)
	if err == nil && len(raw) > 20 {
		return strings.TrimSpace(string(raw)), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	made := fresh()
	return made, os.WriteFile(path, []byte(made+"\n"), 0o600)
}

// freePorts returns each address as it is when its port is free, else with another port.
func freePorts(ctx context.Context, addresses ...string) ([]string, error) {
	var listen net.ListenConfig
	out := make([]string, len(addresses))
	for i, a := range addresses {
		l, err := listen.Listen(ctx, "tcp", a)
		if err != nil {
			host, _, splitErr := net.SplitHostPort(a)
			if splitErr != nil {
				return nil, &exitError{exitUsage, fmt.Errorf("address %q: %w", a, splitErr)}
			}
			if l, err = listen.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(0))); err != nil {
				return nil, err
			}
		}
		out[i] = l.Addr().String()
		defer func() { _ = l.Close() }() // held until all are chosen, so that none is chosen twice
	}
	return out, nil
}

// announce waits until everything answers, says where it is, and blocks until ctx ends.
func (d *devRun) announce(ctx context.Context, log *slog.Logger) error {
	began := time.Now()
	for !d.ready(ctx) {
		if time.Since(began) > time.Minute {
			log.Warn("not ready after a minute; see the logs", "dir", filepath.Join(d.dir, "logs"))
			began = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
	raw, err := json.Marshal(d.state)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.dir, "dev.json"), raw, 0o600); err != nil {
		return err
	}
	fmt.Fprintf(d.p.stdout, `Orrery is ready (%.1f s).
  API and console  %s
  inference        %s/v2   grpc://%s
  Temporal UI      %s
  state and logs   %s
  admin key        %s (the client and a log-in to the console use it)
Ctrl-C stops everything; the state stays.
`, time.Since(began).Seconds(), d.state.API, d.state.API, d.state.GRPC, d.state.UI, d.dir, filepath.Join(d.dir, "admin.key"))
	<-ctx.Done()
	return nil
}

// ready says whether the API answers, Temporal does, an orchestrator polls and the workers are attached.
func (d *devRun) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var status api.Status
	if err := d.get(ctx, "/api/v1/status", &status); err != nil || status.Temporal != "ok" || !status.Synced {
		return false
	}
	var leases []api.Lease
	if err := d.get(ctx, "/api/v1/leases", &leases); err != nil {
		return false
	}
	live := 0
	for _, l := range leases {
		if l.Kind == "worker" && l.Live {
			live++
		}
	}
	return live >= d.options.workers
}

func (d *devRun) get(ctx context.Context, path string, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, d.state.API+path, http.NoBody)
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+d.admin)
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }() // read
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", path, answer.Status)
	}
	return json.NewDecoder(answer.Body).Decode(into)
}
