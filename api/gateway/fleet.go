package gateway

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/registry"
)

// MaxMessage is the largest request or answer, in bytes.
const MaxMessage = 64 << 20

// A worker that could not be reached is left out for sickFor, and for twice as long each time in a row, up to sickMost.
const (
	sickFor  = 500 * time.Millisecond
	sickMost = 30 * time.Second
)

// attached is a worker that is attached to this server.
type attached struct {
	id       string
	node     string
	address  string
	conn     *grpc.ClientConn
	client   inference.GRPCInferenceServiceClient
	inflight atomic.Int64
	sick     atomic.Int64 // Unix nanoseconds until which it is left out
	failures atomic.Int64 // in a row

	state registry.WorkerState // guarded by fleet.mu
	stale map[string]bool      // models whose assignment the stream should look at; guarded by fleet.mu
	all   bool                 // it should look at all of them; guarded by fleet.mu
	wake  chan struct{}        // it should look
}

// fleet is the set of attached workers.
type fleet struct {
	mu      sync.Mutex
	workers map[string]*attached
	left    map[*attached]time.Time // detached workers whose connections may still carry requests
	changed chan struct{}           // closed and replaced on every change
}

func newFleet() *fleet {
	return &fleet{workers: map[string]*attached{}, left: map[*attached]time.Time{}, changed: make(chan struct{})}
}

// signal tells everybody who waits for a change; mu is held.
func (f *fleet) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fleet) watch() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// join adds a worker.
func (f *fleet) join(id, node, address string) (*attached, error) {
	conn, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 2 * time.Second, PermitWithoutStream: true}))
	if err != nil {
		return nil, err
	}
	w := &attached{
		id: id, node: node, address: address, conn: conn, client: inference.NewGRPCInferenceServiceClient(conn),
		stale: map[string]bool{}, wake: make(chan struct{}, 1),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.workers[id] = w
	f.signal()
	return w, nil
}

// leave removes a worker; requests under way on it go on until they end, and then sweep closes its connection.
func (f *fleet) leave(w *attached) {
	f.mu.Lock()
	if _, left := f.left[w]; !left {
		f.left[w] = time.Now()
	}
	if f.workers[w.id] == w {
		delete(f.workers, w.id)
	}
	f.signal()
	f.mu.Unlock()
	f.ring()
}

// failed leaves the worker out for a while; answered lets it back in.
func (w *attached) failed(now time.Time) {
	n := w.failures.Add(1)
	w.sick.Store(now.Add(min(sickFor<<min(n-1, 10), sickMost)).UnixNano())
}

func (w *attached) answered() {
	if w.failures.Load() > 0 {
		w.failures.Store(0)
		w.sick.Store(0)
	}
}

// load is how much a worker has to do: what this gateway sent and, as it said last, what waits there anyway.
func (w *attached) load() int64 { return max(w.inflight.Load(), w.state.Waiting) }

// with lists the workers that have a version ready; version 0 is any, and model "" all workers.
func (f *fleet) with(model string, version int) []*attached {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*attached
	for _, id := range slices.Sorted(maps.Keys(f.workers)) {
		if w := f.workers[id]; model == "" || slices.ContainsFunc(w.state.Loaded, func(v registry.LoadedVersion) bool {
			return v.Model == model && (version == 0 || v.Version == version) && v.State == registry.Loaded
		}) {
			out = append(out, w)
		}
	}
	return out
}

// report stores what a worker says of itself and tells whether it differs from before.
func (f *fleet) report(w *attached, s registry.WorkerState) (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed = !slices.Equal(w.state.Loaded, s.Loaded)
	w.state = s
	if changed {
		f.signal()
	}
	return changed
}

// ring makes every stream look at the assignment of the models given, or of all when none is.
func (f *fleet) ring(models ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.workers {
		w.all = w.all || len(models) == 0
		for _, name := range models {
			w.stale[name] = true
		}
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// rung returns the models that a worker's stream should look at since it last did, and whether it is all of them.
func (f *fleet) rung(w *attached) (models []string, all bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	models, all = slices.Collect(maps.Keys(w.stale)), w.all
	clear(w.stale)
	w.all = false
	return models, all
}

// leftFor is how long a detached worker's connection stays at least: who picked the worker a moment ago still sends.
const leftFor = 2 * time.Second

// sweep closes the connections of detached workers that carry no request any more; all of them when the server ends.
func (f *fleet) sweep(now time.Time, all bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for w, since := range f.left {
		if all || w.inflight.Load() == 0 && now.Sub(since) > leftFor {
			_ = w.conn.Close() // nothing is sent any more
			delete(f.left, w)
		}
	}
}

// candidates lists the attached workers with their labels.
func (f *fleet) candidates() []candidate {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]candidate, 0, len(f.workers))
	for _, id := range slices.Sorted(maps.Keys(f.workers)) {
		out = append(out, candidate{id, f.workers[id].state.Labels})
	}
	return out
}

// pick returns the less loaded of two workers that have the version ready, leaving out the one given. The error says
// why there is none: the faults of the workers that tried.
func (f *fleet) pick(model string, version int, except *attached) (*attached, string) {
	now := time.Now().UnixNano()
	f.mu.Lock()
	defer f.mu.Unlock()
	var able, sick []*attached
	fault := ""
	for _, w := range f.workers {
		i := slices.IndexFunc(w.state.Loaded, func(v registry.LoadedVersion) bool { return v.Model == model && v.Version == version })
		switch {
		case w == except || i < 0:
		case w.state.Loaded[i].State != registry.Loaded:
			fault = w.state.Loaded[i].Error
		case w.sick.Load() > now:
			sick = append(sick, w)
		default:
			able = append(able, w)
		}
	}
	if len(able) == 0 {
		able = sick
	}
	switch len(able) {
	case 0:
		return nil, fault
	case 1:
		return able[0], ""
	}
	i := rand.IntN(len(able))                         //nolint:gosec // load balancing
	j := (i + 1 + rand.IntN(len(able)-1)) % len(able) //nolint:gosec // load balancing
	if able[j].load() < able[i].load() {
		i = j
	}
	return able[i], ""
}
