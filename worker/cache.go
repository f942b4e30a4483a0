package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

const (
	retryLoad  = 5 * time.Second  // between tries to load a version that failed
	drainLimit = 30 * time.Second // requests of a version that goes get this long
)

// key names a version.
type key struct {
	model   string
	version int
}

// held is a version some server wants here.
type held struct {
	key

	digest    string
	manifest  registry.Manifest
	signature registry.Signature
	config    registry.ServingConfig
	leased    bool // never unloaded to make room
}

// same says whether two wishes are served by one loaded model.
func (h held) same(o held) bool {
	return h.key == o.key && h.digest == o.digest && reflect.DeepEqual(h.config, o.config)
}

// cache holds the versions. One goroutine per version walks it through its states, so loading one never blocks another.
type cache struct {
	runtime engine.Runtime
	objects registry.Objects
	dir     string
	log     *slog.Logger
	changed func() // called after every change of state
	metrics *metrics
	memory  memory

	blackbox *blackbox

	cpu   *engine.Device // the threads of the machine
	other *engine.Device // devices whose runs take no thread of it

	mu      sync.Mutex
	wishes  map[string]map[key]held // by server
	entries map[key]*entry
	evicted map[key]bool // unloaded to make room, while a server still wishes for it
	done    sync.WaitGroup
	stop    context.CancelFunc
	ctx     context.Context //nolint:containedctx // the life of the loads, which outlive any one call
}

type entry struct {
	held

	cancel context.CancelFunc
	next   *entry        // loads the same version under a newer serving config, or because it is wished again
	ready  chan struct{} // closed when model is set
	gone   chan struct{} // closed when nothing is left of it
	used   atomic.Int64  // Unix nanoseconds of the last request

	// guarded by cache.mu
	leaving  bool // it is cancelled
	dropped  bool // nothing is left of it
	state    registry.LoadState
	fault    string
	model    *engine.Model
	observer *observer
	provider string
	memory   int64
	took     time.Duration // to load
}

// leave begins the entry's end; cache.mu is held.
func (e *entry) leave() {
	e.leaving = true
	e.cancel()
}

// runsAtOnce bounds the runs on devices other than the CPU, over all models: their threads only wait.
const runsAtOnce = 64

// newCache makes a cache that loads nothing before it is told what to hold.
func newCache(ctx context.Context, c Config, runtime engine.Runtime, objects registry.Objects, log *slog.Logger) *cache {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	return &cache{
		runtime: runtime, objects: objects, dir: c.CacheDir, log: log, blackbox: openBlackbox(c.CacheDir, c.Node, time.Now(), log), changed: func() {},
		cpu: engine.NewDevice(c.Threads), other: engine.NewDevice(runsAtOnce), memory: memory{budget: c.MemoryBudget, resident: residentBytes},
		wishes: map[string]map[key]held{}, entries: map[key]*entry{}, evicted: map[key]bool{}, ctx: ctx, stop: stop,
	}
}

// hold replaces what one server wants held.
func (c *cache) hold(server string, list []held) {
	dropped := map[key]bool{}
	c.mu.Lock()
	for k := range c.wishes[server] {
		dropped[k] = true
	}
	c.mu.Unlock()
	for _, h := range list {
		delete(dropped, h.key)
	}
	c.change(server, list, slices.Collect(maps.Keys(dropped)))
}

// change adds to what one server wants held, and takes away what it wants no more.
func (c *cache) change(server string, list []held, dropped []key) {
	news := false
	c.mu.Lock()
	if c.wishes[server] == nil {
		c.wishes[server] = map[key]held{}
	}
	for _, h := range list {
		c.wishes[server][h.key] = h
		news = c.follow(h.key) || news
	}
	for _, k := range dropped {
		delete(c.wishes[server], k)
		news = c.follow(k) || news
	}
	c.mu.Unlock()
	if news { // what ends says so itself
		c.changed()
	}
}

// follow begins what the wishes for a version ask for, and says whether the versions that the worker reports are others
// now; c.mu is held.
func (c *cache) follow(k key) (news bool) {
	w, wanted := c.wanted(k)
	if c.evicted[k] && (!wanted || w.leased) {
		delete(c.evicted, k)
		news = true
	}
	e, known := c.entries[k]
	switch {
	case known && !wanted:
		e.leave()
		if e.next != nil {
			e.next.leave()
		}
	case c.evicted[k]: // it begins to load again when it is asked for
	case known:
		c.renew(e, w)
	case wanted:
		c.entries[k] = c.start(w)
		news = true
	}
	return news
}

// wanted joins the wishes of all servers for a version; c.mu is held.
func (c *cache) wanted(k key) (w held, wanted bool) {
	for _, server := range slices.Sorted(maps.Keys(c.wishes)) {
		if h, ok := c.wishes[server][k]; ok {
			h.leased = h.leased || w.leased
			w, wanted = h, true
		}
	}
	return w, wanted
}

// renew brings an entry up to date with what is wished; c.mu is held.
func (c *cache) renew(e *entry, w held) {
	e.leased = w.leased
	if newest := cmp.Or(e.next, e); newest.leaving || !w.same(newest.held) {
		if e.next != nil {
			e.next.leave()
		}
		e.next = c.start(w) // takes e's place when it is ready
	}
}

// start begins to load a version; c.mu is held.
func (c *cache) start(h held) *entry {
	ctx, cancel := context.WithCancel(c.ctx)
	e := &entry{held: h, cancel: cancel, ready: make(chan struct{}), gone: make(chan struct{}), state: registry.Cold}
	e.used.Store(time.Now().UnixNano())
	c.done.Go(func() {
		defer cancel()
		defer close(e.gone)
		c.live(ctx, e)
	})
	return e
}

// live is the life of one entry, from COLD until it is dropped.
func (c *cache) live(ctx context.Context, e *entry) {
	for {
		err := c.load(ctx, e)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			c.drop(e)
			return
		}
		c.log.Error("load version", "model", e.key.model, "version", e.version, "error", err)
		c.set(e, registry.Cold, err.Error())
		select {
		case <-ctx.Done():
			c.drop(e)
			return
		case <-time.After(retryLoad):
		}
	}
	<-ctx.Done()
	c.set(e, registry.Draining, "")
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	if err := e.model.Close(drain); err != nil {
		c.log.Warn("close version", "model", e.key.model, "version", e.version, "error", err)
	}
	c.runtime.Trim()
	c.drop(e)
}

func (c *cache) load(ctx context.Context, e *entry) error {
	began := time.Now()
	c.set(e, registry.Fetching, "")
	dir := filepath.Join(c.dir, e.digest)
	if err := registry.FetchVersion(ctx, c.objects, e.manifest, dir); err != nil {
		return err
	}
	file, err := e.manifest.Entry()
	if err != nil {
		return err
	}
	c.set(e, registry.Loading, "")
	free, err := c.makeRoom(ctx, e)
	if err != nil {
		return err
	}
	defer free()
	before := residentBytes()
	mark := c.blackbox.enter(e.key)
	mark.begin()
	opened, err := c.runtime.Open(filepath.Join(dir, filepath.FromSlash(file)), e.signature, engine.Options{
		Provider: e.config.Provider, ProviderOptions: e.config.ProviderOptions, Fallback: e.config.Fallback, Threads: e.config.Threads,
	})
	mark.end()
	if err != nil {
		mark.leave()
		return err
	}
	session := &markedSession{Session: opened, mark: mark}
	c.set(e, registry.Warming, "")
	measured, err := engine.Warm(ctx, session, e.config.MaxBatch)
	if err != nil {
		return errors.Join(fmt.Errorf("warm up: %w", err), session.Close())
	}
	device := c.cpu
	if session.Provider() != "cpu" {
		device = c.other
	}
	model := engine.NewModel(device, session, e.config, measured)
	seen := c.metrics.observer(e.key)
	if seen != nil {
		model.OnRun(seen.ran)
	}
	c.mu.Lock()
	e.model, e.provider, e.memory, e.state = model, session.Provider(), max(residentBytes()-before, 0), registry.Loaded
	e.observer, e.took = seen, time.Since(began)
	close(e.ready)
	if old := c.entries[e.key]; old != e {
		c.entries[e.key] = e
		if old != nil {
			e.leased = old.leased
			old.leave()
		}
	}
	c.mu.Unlock()
	c.changed()
	return nil
}

func (c *cache) set(e *entry, s registry.LoadState, fault string) {
	c.mu.Lock()
	e.state, e.fault = s, fault
	c.mu.Unlock()
	c.changed()
}

// drop forgets an entry, and its files when no other entry needs them.
func (c *cache) drop(e *entry) {
	c.mu.Lock()
	e.dropped = true
	if c.entries[e.key] == e {
		delete(c.entries, e.key)
		if e.next != nil && !e.next.dropped {
			c.entries[e.key] = e.next
		}
	}
	shared := c.evicted[e.key] // it may be back soon
	for _, o := range c.entries {
		shared = shared || o.digest == e.digest
	}
	c.mu.Unlock()
	if !shared && c.ctx.Err() == nil {
		if err := os.RemoveAll(filepath.Join(c.dir, e.digest)); err != nil {
			c.log.Warn("remove files of a dropped version", "error", err)
		}
	}
	c.changed()
}

// get returns a loaded version, waiting for one that loads until ctx ends. Version 0 is the newest that is held. It
// ends in NotFound when the version is not held here and Unavailable when it does not become ready in time.
func (c *cache) get(ctx context.Context, model string, version int) (*entry, error) {
	e, err := c.find(model, version)
	if err != nil {
		return nil, err
	}
	e.used.Store(time.Now().UnixNano())
	select {
	case <-e.ready:
		return e, nil
	default:
	}
	select {
	case <-e.ready:
		return e, nil
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.fault != "" {
		return nil, registry.Errorf(registry.Unavailable, "version %d of %s cannot be loaded: %s", e.version, model, e.fault)
	}
	return nil, registry.Errorf(registry.Unavailable, "version %d of %s is not loaded yet: it is %s", e.version, model, e.state)
}

// find returns the entry that serves a version. One that was unloaded to make room begins to load again.
func (c *cache) find(model string, version int) (*entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if version > 0 { // what nearly every request asks for
		if e, ok := c.entries[key{model, version}]; ok {
			return e, nil
		}
	}
	var best *entry
	var names []string
	for k, e := range c.entries {
		names = append(names, k.model)
		if k.model == model && version == 0 && (best == nil || betterThan(e, best)) {
			best = e
		}
	}
	if best != nil {
		return best, nil
	}
	for k := range c.evicted {
		if h, wanted := c.wanted(k); wanted && k.model == model && (version == 0 || k.version == version) {
			delete(c.evicted, k)
			c.entries[k] = c.start(h)
			return c.entries[k], nil
		}
	}
	slices.Sort(names)
	if slices.Contains(names, model) {
		return nil, registry.Errorf(registry.NotFound, "version %d of %q is not held by this worker", version, model)
	}
	if near := registry.Closest(model, names); near != "" {
		return nil, registry.Errorf(registry.NotFound, "no model %q on this worker; did you mean %q?", model, near)
	}
	return nil, registry.Errorf(registry.NotFound, "no model %q on this worker", model)
}

// betterThan prefers what is ready, then what is newer.
func betterThan(a, b *entry) bool {
	if ready := a.state == registry.Loaded; ready != (b.state == registry.Loaded) {
		return ready
	}
	return a.version > b.version
}

// list reports the versions in order of model and number.
func (c *cache) list() []registry.LoadedVersion {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]registry.LoadedVersion, 0, len(c.entries))
	for k, e := range c.entries {
		out = append(out, registry.LoadedVersion{
			Model: k.model, Version: k.version, State: e.state, Error: e.fault, MemoryBytes: e.memory, Provider: e.provider,
		})
	}
	for k := range c.evicted {
		if _, ok := c.entries[k]; !ok {
			out = append(out, registry.LoadedVersion{Model: k.model, Version: k.version, State: registry.Cold, Evicted: true})
		}
	}
	slices.SortFunc(out, func(a, b registry.LoadedVersion) int {
		return cmp.Or(strings.Compare(a.Model, b.Model), a.Version-b.Version)
	})
	return out
}

// loaded is a version that is ready, for statistics.
type loaded struct {
	key

	provider string
	stats    engine.Stats
}

// ready lists the versions that are ready with their statistics, in order of model and number.
func (c *cache) ready() []loaded {
	c.mu.Lock()
	entries := slices.Collect(maps.Values(c.entries))
	c.mu.Unlock()
	var out []loaded
	for _, e := range entries {
		select {
		case <-e.ready:
			stats := e.model.Stats()
			stats.Memory = e.memory
			out = append(out, loaded{e.key, e.provider, stats})
		default:
		}
	}
	slices.SortFunc(out, func(a, b loaded) int { return cmp.Or(strings.Compare(a.model, b.model), a.version-b.version) })
	return out
}

// close drains every version.
func (c *cache) close() {
	c.stop()
	c.done.Wait()
	c.cpu.Close()
	c.other.Close()
	c.blackbox.close()
}
