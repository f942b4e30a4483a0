package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/orrery-ml/orrery/api"
	"github.com/orrery-ml/orrery/api/gateway"
	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/api/webhook"
	"github.com/orrery-ml/orrery/internal/supervisor"
	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
	"github.com/orrery-ml/orrery/workflows"
)

// streamWorkers is how many goroutines are kept for requests over gRPC: their stacks have grown already.
const streamWorkers = 64

type serverOptions struct {
	backends

	http          string
	grpc          string
	node          string
	stateDir      string
	hosts         []string
	temporalUI    string
	continueAfter int
	open          bool
	token         string
	adminKey      string
}

func (p *program) serverCommand() *cobra.Command {
	var o serverOptions
	c := &cobra.Command{
		Use: "server", Short: "Serve the API, the console and inference traffic", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := p.fromEnvironment(c.Flags()); err != nil {
				return err
			}
			p.collectLess()
			o.token, o.adminKey = p.getenv("ORRERY_JOIN_TOKEN"), p.getenv("ORRERY_ADMIN_KEY")
			log, err := p.logger(o.logLevel)
			if err != nil {
				return err
			}
			stop, err := telemetry.Start(c.Context(), "orrery-server", p.getenv)
			if err != nil {
				return &exitError{exitUsage, err}
			}
			defer func() { _ = stop(context.WithoutCancel(c.Context())) }() // spans that are lost are not missed
			return serve(c.Context(), o, log)
		},
	}
	f := c.Flags()
	o.flags(p, f, "registry", "store", "temporal")
	f.StringVar(&o.http, "http", "127.0.0.1:8080", "listen address of REST and the console (ORRERY_HTTP)")
	f.StringVar(&o.grpc, "grpc", "127.0.0.1:8081", "listen address of gRPC: inference and workers (ORRERY_GRPC)")
	f.StringVar(&o.node, "node", "", "name people know this server by; default the host's (ORRERY_NODE)")
	f.StringVar(&o.stateDir, "state-dir", ".orrery/server", "where the last route is kept for restarts (ORRERY_STATE_DIR)")
	f.StringSliceVar(&o.hosts, "hosts", nil, "names the server answers to besides loopback (ORRERY_HOSTS)")
	f.IntVar(&o.continueAfter, "continue-after", workflows.ContinueAfter, "events of history after which a roll-out continues as new")
	f.StringVar(&o.temporalUI, "temporal-ui", "", "where the Temporal UI is, for links (ORRERY_TEMPORAL_UI)")
	f.BoolVar(&o.open, "dev-open", false, "inference needs no key; only when bound to loopback")
	return c
}

func (o serverOptions) validate() error {
	var errs []error
	if o.token == "" {
		errs = append(errs, errors.New("ORRERY_JOIN_TOKEN is missing: workers join with it"))
	}
	for _, address := range []string{o.http, o.grpc} {
		if host, _, err := net.SplitHostPort(address); err != nil {
			errs = append(errs, fmt.Errorf("listen address %q: %w", address, err))
		} else if ip := net.ParseIP(host); o.open && (ip == nil || !ip.IsLoopback()) && host != "localhost" {
			errs = append(errs, fmt.Errorf("--dev-open is for loopback only, not %q", address))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return &exitError{exitUsage, err}
	}
	return nil
}

func serve(ctx context.Context, o serverOptions, log *slog.Logger) error {
	if err := o.validate(); err != nil {
		return err
	}
	if o.node == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		o.node = host
	}
	s, err := o.openRegistry(ctx, log)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }() // nothing is written any more
	objects, err := o.openStore(ctx, log)
	if err != nil {
		return err
	}
	temporal, err := o.openTemporal(log)
	if err != nil {
		return err
	}
	defer temporal.Close()
	if err := ensureAdmin(ctx, s, o.adminKey, log); err != nil {
		return err
	}
	oip.RegisterCompressors()
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	recorder := gateway.NewRecorder(objects, metrics, log)
	g, err := gateway.New(gateway.Config{
		Node: o.node, Address: o.grpc, StateFile: filepath.Join(o.stateDir, "route.json"), JoinToken: o.token,
	}, s, recorder, gateway.NewMetrics(metrics), log)
	if err != nil {
		return err
	}
	sender := webhook.NewSender(s, metrics, log)
	front := api.New(api.Config{
		Open: o.open, Hosts: o.hosts, TemporalUI: o.temporalUI, Namespace: o.namespace, ContinueAfter: o.continueAfter,
	}, api.Parts{Store: s, Objects: objects, Temporal: temporal, Gateway: g, Sender: sender}, log)
	return listenAndServe(ctx, o, plane{g, recorder, sender, front, front.Handler(metrics)}, log)
}

// ensureAdmin makes the key in ORRERY_ADMIN_KEY an admin key when it is not known yet. While the registry is away that
// is left for the next start.
func ensureAdmin(ctx context.Context, s *store.Store, secret string, log *slog.Logger) error {
	if secret == "" {
		return nil
	}
	if len(secret) < 20 {
		return &exitError{exitUsage, errors.New("ORRERY_ADMIN_KEY is shorter than 20 characters")}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	hash := api.HashSecret(secret)
	_, err := s.KeyByHash(ctx, hash)
	if registry.CodeOf(err) == registry.Unauthenticated {
		_, err = s.CreateKey(ctx, registry.APIKey{ID: "admin-" + hash[:12], Name: "admin-" + hash[:6], Hash: hash, Role: registry.Admin, CreatedBy: "set-up"})
		if registry.CodeOf(err) == registry.Exists {
			err = nil // another server was first
		}
	}
	if registry.CodeOf(err) == registry.Unavailable {
		log.Warn("the admin key cannot be checked while the registry is away", "error", err)
		return nil
	}
	return err
}

// plane is what a server serves.
type plane struct {
	gateway  *gateway.Gateway
	recorder *gateway.TrafficRecorder
	sender   *webhook.Sender
	front    *api.Server
	handler  http.Handler
}

func listenAndServe(ctx context.Context, o serverOptions, p plane, log *slog.Logger) error {
	var listen net.ListenConfig
	web, err := listen.Listen(ctx, "tcp", o.http)
	if err != nil {
		return fmt.Errorf("listen for HTTP: %w", err)
	}
	rpc, err := listen.Listen(ctx, "tcp", o.grpc)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for gRPC: %w", err), web.Close())
	}
	rest := &http.Server{Handler: p.handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(gateway.MaxMessage), grpc.MaxSendMsgSize(gateway.MaxMessage), grpc.NumStreamWorkers(streamWorkers), grpc.ChainUnaryInterceptor(p.front.UnaryAuth),
		grpc.ChainStreamInterceptor(p.front.StreamAuth),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	inference.RegisterGRPCInferenceServiceServer(server, p.gateway.Service())
	healthpb.RegisterHealthServer(server, p.gateway.Service().Health())
	attach.RegisterAttachServiceServer(server, p.gateway.AttachService())
	var group supervisor.Group
	// Requests end before what was counted and recorded of them is written.
	drained := make(chan struct{})
	afterwards := func(f func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
			defer cancel()
			go func() { <-ctx.Done(); p.gateway.Stop(); <-drained; cancel() }() // ends with f
			return f(inner)
		}
	}
	group.Add("gateway", afterwards(p.gateway.Run))
	group.Add("recorder", afterwards(p.recorder.Run))
	group.Add("http", func(ctx context.Context) error {
		defer close(drained)
		return serveBoth(ctx, rest, web, server, rpc)
	})
	group.Add("reconciler", p.front.Reconcile)
	group.Add("webhooks", p.sender.Run)
	log.Info("serving", "http", web.Addr().String(), "grpc", rpc.Addr().String(), "hosts", strings.Join(slices.Clone(o.hosts), ","))
	err = group.Run(ctx)
	p.front.Close()
	return err
}

// serveBoth serves until ctx ends, then lets requests finish for a while.
func serveBoth(ctx context.Context, rest *http.Server, web net.Listener, server *grpc.Server, rpc net.Listener) error {
	failed := make(chan error, 2)
	go func() { failed <- rest.Serve(web) }()   // ends by Shutdown
	go func() { failed <- server.Serve(rpc) }() // ends by Stop
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer cancel()
	stopped := make(chan struct{})
	go func() { server.GracefulStop(); close(stopped) }() // ends by Stop at the latest
	shut := rest.Shutdown(limit)
	select {
	case <-stopped:
	case <-limit.Done():
		server.Stop()
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, shut)
}
