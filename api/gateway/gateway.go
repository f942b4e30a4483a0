package gateway

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/registry"
)

const (
	leaseTTL     = 5 * time.Second // a gateway or worker that is silent for longer is cut off
	storeTimeout = 3 * time.Second // of one call to the registry
	flushEvery   = 500 * time.Millisecond
)

// store is the part of the registry a gateway uses.
type store interface {
	registry.Feed
	registry.Fleet
	FlushStrata(ctx context.Context, gateway string, strata []registry.Stratum, sealed time.Time) error
}

// Recorder is told of every answered request that was routed. It must not block.
type Recorder interface {
	Record(t Traffic)
	// Configure tells the recorder of a model's serving config and its versions.
	Configure(m registry.Model, versions map[int]registry.Version)
}

// Config is a gateway's configuration.
type Config struct {
	Node      string // name people know it by
	Address   string // where its gRPC server listens, for display
	StateFile string // last table, for restarts while the registry is away; "" = none
	JoinToken string // workers present it
}

// Gateway is the data plane of a server.
type Gateway struct {
	config   Config
	id       string // incarnation
	store    store
	log      *slog.Logger
	recorder Recorder
	table    atomic.Pointer[table]
	journal  *journal // used by New, then by follow, then by Run's end
	fleet    *fleet
	counter  *counter
	metrics  *metrics
	started  time.Time
	stopping chan struct{}
	stopOnce sync.Once
	mirrors  chan struct{} // slots for mirrored requests
	mirrored sync.WaitGroup
	trace    telemetry.Tracer
	synced   atomic.Bool // the feed was read at least once by this incarnation

	demandMu sync.Mutex
	demand   map[demandKey]time.Time // when a version that nothing leases was last asked for
}

type demandKey struct {
	model   string
	version int
}

// maxMirrors bounds the mirrored requests under way; more are dropped and counted.
const maxMirrors = 64

// New reads the last table from disk. Run follows the feed.
func New(c Config, s store, recorder Recorder, m *Metrics, log *slog.Logger) (*Gateway, error) {
	if c.JoinToken == "" {
		return nil, errors.New("a gateway needs the workers' join token (ORRERY_JOIN_TOKEN)")
	}
	id := "g-" + uuid.NewString()
	g := &Gateway{
		config: c, id: id, store: s, log: log, recorder: recorder, fleet: newFleet(), counter: newCounter(id, time.Now),
		metrics: m.inner, started: time.Now(), stopping: make(chan struct{}), mirrors: make(chan struct{}, maxMirrors),
		demand: map[demandKey]time.Time{}, journal: &journal{path: c.StateFile}, trace: telemetry.NewTracer("orrery/gateway"),
	}
	g.table.Store(newTable(registry.Snapshot{}))
	switch t, err := g.journal.read(); {
	case err == nil:
		g.install(t)
		log.Info("serving the last route on disk until the registry answers", "position", t.position)
	case !errors.Is(err, fs.ErrNotExist):
		log.Warn("the last route on disk cannot be used", "file", c.StateFile, "error", err)
	}
	return g, nil
}

// ID returns the gateway's incarnation.
func (g *Gateway) ID() string { return g.id }

// Position returns the number of the last event applied, and whether the feed was reached since the start.
func (g *Gateway) Position() (int64, bool) { return g.table.Load().position, g.synced.Load() }

// install makes t the table every request from now on sees. It names the models that changed; none means all.
func (g *Gateway) install(t *table, changed ...string) {
	g.table.Store(t)
	names := changed
	if len(names) == 0 {
		names = slices.Collect(maps.Keys(t.models))
	}
	for _, name := range names {
		if m, ok := t.models[name]; ok {
			g.recorder.Configure(m.model, m.versions)
		}
	}
	g.fleet.ring(changed...)
}

// Stop tells attached workers that the server stops, so that their streams end before requests are waited for.
func (g *Gateway) Stop() { g.stopOnce.Do(func() { close(g.stopping) }) }

// Run follows the feed, renews the lease and flushes strata until ctx ends; then it flushes what is left and gives the
// lease back.
func (g *Gateway) Run(ctx context.Context) error {
	var tasks sync.WaitGroup
	tasks.Go(func() { g.follow(ctx) })
	tasks.Go(func() { g.every(ctx, leaseTTL/4, g.renew) })
	tasks.Go(func() { g.every(ctx, flushEvery, g.flush) })
	tasks.Go(func() { g.every(ctx, leftFor, func(context.Context) { g.fleet.sweep(time.Now(), false) }) })
	<-ctx.Done()
	g.Stop()
	tasks.Wait()
	g.mirrored.Wait()
	g.fleet.sweep(time.Now(), true)
	last := context.WithoutCancel(ctx)
	g.flush(last)
	g.dropLease(last, g.id)
	return errors.Join(g.journal.keep(g.table.Load()), g.journal.close())
}

func (g *Gateway) every(ctx context.Context, d time.Duration, f func(context.Context)) {
	ticker := time.NewTicker(d)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			f(ctx)
		}
	}
}

// follow keeps the table up to date, and starts over from a snapshot when the feed breaks.
func (g *Gateway) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := g.followOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		g.log.Warn("the registry's feed broke; serving what is known", "position", g.table.Load().position, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (g *Gateway) followOnce(ctx context.Context) error {
	s, err := g.store.Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	t := newTable(s)
	g.kept(g.journal.keep(t))
	g.install(t)
	g.synced.Store(true)
	g.renew(ctx)
	for {
		if err := g.store.AwaitServed(ctx, t.position); err != nil {
			return fmt.Errorf("await events: %w", err)
		}
		events, err := g.store.Events(ctx, t.position, 1000)
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		next, served, err := t.apply(events...)
		if err != nil {
			return err
		}
		t = next
		if len(served) == 0 { // nobody waits for it: the next renewal acknowledges it
			g.table.Store(t)
			continue
		}
		g.kept(g.journal.add(served, t)) // first: the lease says that it is applied as soon as it is installed
		changed := make([]string, len(served))
		for i, e := range served {
			changed[i] = e.Model
		}
		g.install(t, changed...)
		g.renew(ctx)
	}
}

// kept says that something could not be kept on disk; it is served all the same.
func (g *Gateway) kept(err error) {
	if err != nil {
		g.log.Warn("keep the route on disk", "file", g.config.StateFile, "error", err)
	}
}

func (g *Gateway) renew(ctx context.Context) {
	if !g.synced.Load() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	now := time.Now()
	err := g.store.PutLease(ctx, registry.Lease{
		ID: g.id, Kind: registry.GatewayLease, Node: g.config.Node, Address: g.config.Address, Applied: g.table.Load().position,
		StartedAt: g.started, Expires: now.Add(leaseTTL),
	})
	if err != nil && ctx.Err() == nil {
		g.log.Warn("renew the gateway's lease", "error", err)
	}
}

func (g *Gateway) flush(ctx context.Context) {
	strata, sealed := g.counter.take()
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := g.store.FlushStrata(ctx, g.id, strata, sealed); err != nil {
		g.counter.restore(strata)
		if ctx.Err() == nil {
			g.log.Warn("flush strata", "count", len(strata), "error", err)
		}
	}
}

// want remembers that a version is leased or was asked for, and tells whether that is news.
func (g *Gateway) want(model string, version int) (news bool) {
	g.demandMu.Lock()
	defer g.demandMu.Unlock()
	k := demandKey{model, version}
	_, known := g.demand[k]
	g.demand[k] = time.Now()
	return !known
}

// leastKeep is how long a version stays at least after it was last leased or asked for: requests that were routed to
// it before the route changed are still under way.
const leastKeep = 10 * time.Second

func (g *Gateway) wanted(model string, version int, now time.Time, keep time.Duration) bool {
	g.demandMu.Lock()
	defer g.demandMu.Unlock()
	k := demandKey{model, version}
	last, ok := g.demand[k]
	if ok && now.Sub(last) > max(keep, leastKeep) {
		delete(g.demand, k)
		return false
	}
	return ok
}
