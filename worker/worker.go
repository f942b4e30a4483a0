package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/registry"
)

// MaxMessage is the largest request or answer of a worker, in bytes.
const MaxMessage = 64 << 20

// streamWorkers is how many goroutines are kept for requests: their stacks have grown already. More requests at once get
// goroutines of their own.
const streamWorkers = 64

// Config is a worker's configuration.
type Config struct {
	Node      string            // name people know it by; "" = the host's name
	GRPC      string            // listen address of the protocol's gRPC service
	HTTP      string            // listen address of its REST surface
	Advertise string            // address servers reach GRPC at; "" = the one listened on
	Servers   []string          // attach addresses of the servers
	Token     string            // join token
	CacheDir  string            // where artifacts are kept
	Labels    map[string]string // for placement
	Timeout   time.Duration     // of a request that brings no deadline

	Threads      int   // that runs on the CPU may take at once; 0 = as many as the process may use cores
	MemoryBudget int64 // bytes the process may take; 0 = 80 % of the machine's, negative = no limit
	NoMetrics    bool  // do not observe requests for Prometheus
	Profiling    bool  // serve /debug/pprof/ beside /metrics
}

// Validate joins all faults of the configuration.
func (c Config) Validate() error {
	var errs []error
	if len(trimmed(c.Servers)) == 0 {
		errs = append(errs, errNoServers)
	}
	if c.Token == "" {
		errs = append(errs, errors.New("a worker needs the join token of the servers (ORRERY_JOIN_TOKEN)"))
	}
	if c.CacheDir == "" {
		errs = append(errs, errors.New("a worker needs a cache directory"))
	}
	if c.Threads < 0 {
		errs = append(errs, errors.New("a worker's threads must not be negative"))
	}
	if c.Timeout <= 0 {
		errs = append(errs, errors.New("a worker's request timeout must be positive"))
	}
	return errors.Join(errs...)
}

// Worker is a serving process.
type Worker struct {
	config  Config
	log     *slog.Logger
	id      string
	cache   *cache
	service *service
	grpc    net.Listener
	http    net.Listener
	change  []chan struct{} // one per server
	leaving atomic.Bool
	held    atomic.Bool // a server has said what to hold
	devices func() []registry.Device
	metrics *prometheus.Registry

	providers []string
}

// New listens but serves nothing before Run.
func New(ctx context.Context, c Config, models engine.Runtime, objects registry.Objects, log *slog.Logger) (*Worker, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c.Servers = trimmed(c.Servers)
	if c.Node == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("host name: %w", err)
		}
		c.Node = host
	}
	if c.Threads == 0 {
		c.Threads = runtime.GOMAXPROCS(0)
	}
	switch {
	case c.MemoryBudget == 0:
		c.MemoryBudget = machineBytes() / 5 * 4
	case c.MemoryBudget < 0:
		c.MemoryBudget = 0
	}
	oip.RegisterCompressors()
	w := &Worker{config: c, log: log, id: "w-" + uuid.NewString(), devices: deviceReader(log), providers: models.Providers(), metrics: prometheus.NewRegistry()}
	for range c.Servers {
		w.change = append(w.change, make(chan struct{}, 1))
	}
	var m *metrics
	if !c.NoMetrics {
		m = newMetrics(w.metrics)
	}
	w.cache = newCache(ctx, c, models, objects, log)
	w.cache.metrics, w.cache.changed = m, w.ring
	w.metrics.MustRegister(&collector{w.cache, w.devices}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	w.service = &service{cache: w.cache, timeout: c.Timeout, trace: telemetry.NewTracer("orrery/worker"), ready: func() bool { return w.held.Load() && !w.leaving.Load() }}
	var listen net.ListenConfig
	var err error
	if w.grpc, err = listen.Listen(ctx, "tcp", c.GRPC); err != nil {
		return nil, fmt.Errorf("listen for gRPC: %w", err)
	}
	if w.http, err = listen.Listen(ctx, "tcp", c.HTTP); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for REST: %w", err), w.grpc.Close())
	}
	return w, nil
}

// GRPCAddress returns where the protocol's gRPC service listens.
func (w *Worker) GRPCAddress() string { return w.grpc.Addr().String() }

// HTTPAddress returns where the REST surface listens.
func (w *Worker) HTTPAddress() string { return w.http.Addr().String() }

func (w *Worker) ring() {
	for _, c := range w.change {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

func (w *Worker) report(leaving bool) *attach.AttachRequest {
	address := w.config.Advertise
	if address == "" {
		address = w.GRPCAddress()
	}
	state := registry.WorkerState{
		Labels: w.config.Labels, Devices: w.devices(), Providers: w.providers, MemoryBytes: residentBytes(), BudgetBytes: w.config.MemoryBudget,
		Loaded: w.cache.list(), Crashes: w.cache.blackbox.since(time.Now()),
	}
	for _, l := range w.cache.ready() {
		state.Waiting += l.stats.Queued
	}
	raw, err := json.Marshal(state)
	if err != nil { // plain structs always marshal
		w.log.Error("report", "error", err)
	}
	return &attach.AttachRequest{Id: w.id, Node: w.config.Node, Address: address, State: raw, Leaving: leaving}
}

// Run serves until ctx ends, then says it leaves, lets requests finish and stops.
func (w *Worker) Run(ctx context.Context) error {
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(MaxMessage), grpc.MaxSendMsgSize(MaxMessage), grpc.MaxConcurrentStreams(4096), grpc.NumStreamWorkers(streamWorkers),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	inference.RegisterGRPCInferenceServiceServer(server, w.service)
	healthpb.RegisterHealthServer(server, oip.Health{Ready: func(context.Context) bool { return w.service.ready() }})
	mux := http.NewServeMux()
	protocol := oip.Handler(w.service, MaxMessage)
	mux.Handle("/v2/", protocol)
	mux.Handle("/v2", protocol)
	mux.Handle("GET /metrics", promhttp.HandlerFor(w.metrics, promhttp.HandlerOpts{}))
	if w.config.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	rest := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	var tasks sync.WaitGroup
	failed := make(chan error, 2)
	tasks.Go(func() { failed <- server.Serve(w.grpc) })
	tasks.Go(func() { failed <- rest.Serve(w.http) })
	attached, detach := context.WithCancel(ctx)
	for i, address := range w.config.Servers {
		a := &attacher{
			server: address, token: w.config.Token, cache: w.cache, report: w.report, change: w.change[i],
			onHold: func() { w.held.Store(true) }, log: w.log,
		}
		tasks.Go(func() { a.run(attached) })
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	w.leaving.Store(true)
	detach()
	w.shutdown(ctx, server, rest)
	tasks.Wait()
	w.cache.close()
	return err
}

// shutdown lets requests finish for a while.
func (w *Worker) shutdown(ctx context.Context, server *grpc.Server, rest *http.Server) {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	if err := rest.Shutdown(limit); err != nil {
		w.log.Warn("requests were cut off", "error", err)
	}
	stopped := make(chan struct{})
	go func() { server.GracefulStop(); close(stopped) }() // ends by Stop at the latest
	select {
	case <-stopped:
	case <-limit.Done():
		server.Stop()
		<-stopped
	}
}
