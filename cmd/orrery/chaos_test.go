package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
)

// ORRERY_CHAOS is how long the chaos run breaks things, 20 s when not set; ORRERY_CHAOS_SEED makes it choose the same
// again.
const (
	chaosLength = "ORRERY_CHAOS"
	chaosSeed   = "ORRERY_CHAOS_SEED"
)

// answered is one line of the client's log.
type answered struct {
	sent     time.Time
	x, y     float64
	version  int
	revision int64
	fault    string // of the retry: the request failed
}

// chaos is a run of everything against everything.
type chaos struct {
	c     *cluster
	minio *testenv.MinioServer
	r     *rand.Rand
	until time.Time

	mu  sync.Mutex
	log []answered

	kills    map[string]int
	runs     []string
	outcomes map[string]int
}

// TestChaos kills servers, workers, the orchestrator, Temporal, PostgreSQL and MinIO with SIGKILL, in any order and
// under constant load, while roll-outs go forward and back. Afterwards a checker that knows only the client's log and
// the event table looks whether anything was lost, doubled or untrue.
//
// One server and one worker that holds the version are left alive at any time; a client reconnects, so that a request
// fails only when its one retry does.
func TestChaos(t *testing.T) {
	t.Parallel()
	length := 20 * time.Second
	if v := os.Getenv(chaosLength); v != "" {
		var err error
		length, err = time.ParseDuration(v)
		require.NoError(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv(chaosSeed); v != "" {
		var err error
		seed, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("%s=%d", chaosSeed, seed)
	minio, err := testenv.StartMinio()
	require.NoError(t, err)
	t.Cleanup(minio.Kill)
	c := newClusterOn(t, minio, 2, 2)
	c.model("m", 2)
	c.allAtOnce("m")
	x := &chaos{
		c: c, minio: minio, r: rand.New(rand.NewPCG(seed, 1)), until: time.Now().Add(length),
		kills: map[string]int{}, outcomes: map[string]int{},
	}
	ctx, stop := context.WithCancel(t.Context())
	var load, rest sync.WaitGroup
	for g := range 3 {
		load.Go(func() { x.ask(ctx, g) })
	}
	rest.Go(func() { x.rollOut(rand.New(rand.NewPCG(seed, 2))) })
	x.kill()
	rest.Wait()
	stop()
	load.Wait()
	x.settle()
	x.check()
}

// ask sends requests one after the other until ctx ends.
func (x *chaos) ask(ctx context.Context, g int) {
	for i := g; ctx.Err() == nil; i += 3 {
		a := answered{sent: time.Now(), x: float64(i % 100)}
		for try := range 2 {
			limited, cancel := context.WithTimeout(ctx, 5*time.Second)
			y, version, revision, err := infer(limited, x.c.servers[(i+try)%2].url(), "m", a.x, fmt.Sprintf("caller-%d", i%500))
			cancel()
			if ctx.Err() != nil {
				return
			}
			a.fault = ""
			if err != nil {
				a.fault = err.Error()
				continue
			}
			a.y = y
			a.version, _ = strconv.Atoi(version)
			a.revision, _ = strconv.ParseInt(revision, 10, 64)
			break
		}
		x.mu.Lock()
		x.log = append(x.log, a)
		x.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
}

// kill kills one component after the other, and starts it again.
func (x *chaos) kill() {
	t := x.c.t
	type victim struct {
		name  string
		kill  func()
		start func() error
		ready func() bool // before it may be the turn of its twin
	}
	victims := []victim{
		{"orchestrator", x.c.orchestrator.Kill, x.c.orchestrator.Start, nil},
		{"temporal", x.c.temporal.Kill, x.c.temporal.Start, nil},
		{"postgres", x.c.postgres.Kill, x.c.postgres.Start, nil},
		{"minio", x.minio.Kill, x.minio.Start, nil},
	}
	for i, w := range x.c.workers {
		victims = append(victims, victim{fmt.Sprintf("worker %d", i), w.Kill, w.Start, func() bool { return x.holding() == len(x.c.workers) }})
	}
	for i, s := range x.c.servers {
		victims = append(victims, victim{fmt.Sprintf("server %d", i), s.Kill, s.Start, func() bool { return x.answers(i) && x.holding() == len(x.c.workers) }})
	}
	for time.Now().Before(x.until) {
		v := victims[x.r.IntN(len(victims))]
		if whole := x.answers(0) && x.answers(1) && x.holding() == len(x.c.workers); v.ready != nil && !whole {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		v.kill()
		x.kills[strings.Fields(v.name)[0]]++
		time.Sleep(time.Duration(100+x.r.IntN(1500)) * time.Millisecond)
		require.NoError(t, v.start(), v.name)
		if v.ready != nil {
			require.Eventually(t, v.ready, 90*time.Second, 50*time.Millisecond, "%s does not come back", v.name)
		}
		time.Sleep(time.Duration(x.r.IntN(700)) * time.Millisecond)
	}
}

// answers says whether a server answers a request for inference by itself.
func (x *chaos) answers(server int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _, _, err := infer(ctx, x.c.servers[server].url(), "m", 1, "probe")
	return err == nil
}

// holding counts the workers that hold every version which answered lately. It asks the workers, not the registry, which
// may be away.
func (x *chaos) holding() int {
	versions := map[int]bool{}
	x.mu.Lock()
	for _, a := range slices.Backward(x.log) {
		if time.Since(a.sent) > 2*time.Second {
			break
		}
		if a.fault == "" {
			versions[a.version] = true
		}
	}
	x.mu.Unlock()
	n := 0
	for _, w := range x.c.workers {
		all := len(versions) > 0
		for version := range versions {
			all = all && holds(w, version)
		}
		if all {
			n++
		}
	}
	return n
}

// holds says whether a worker has a version of m ready.
func holds(w *node, version int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/v2/models/m/versions/%d/ready", w.url(), version), nil)
	if err != nil {
		return false
	}
	got, err := http.DefaultClient.Do(r)
	if err != nil {
		return false
	}
	_ = got.Body.Close() // only the status is wanted
	return got.StatusCode == http.StatusOK
}

// rollOut starts roll-outs of the version that is not the champion, and lets them end in every way. Where everything was
// down all the time it starts one afterwards, so that there is always something to check.
func (x *chaos) rollOut(r *rand.Rand) {
	for time.Now().Before(x.until) || len(x.runs) == 0 && time.Now().Before(x.until.Add(time.Minute)) {
		run, err := x.start()
		if err != nil {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		x.runs = append(x.runs, run.Id)
		time.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
		switch server := r.IntN(2); r.IntN(5) {
		case 0:
			x.try(func() error {
				_, err := decode[client.Run](x.c.api(server).DecideRun(context.Background(), run.Id, "abort", client.Decision{}))
				return err
			})
		case 1:
			x.try(func() error {
				_, err := decode[client.Run](x.c.api(server).DecideRun(context.Background(), run.Id, "promote_now", client.Decision{}))
				return err
			})
		case 2:
			x.try(func() error {
				_, err := decode[registry.Route](x.c.api(server).Rollback(context.Background(), "m", client.Decision{}))
				return err
			})
		default: // to its own end
		}
		x.outcomes[x.end(run.Id).Outcome]++
	}
}

func (x *chaos) start() (client.Run, error) {
	none, requests, most := int64(0), int64(150), int64(20)
	for i := range 2 {
		route, err := decode[registry.Route](x.c.api(i).GetRoute(context.Background(), "m"))
		if err != nil {
			continue
		}
		s, steps, candidate := client.NewRolloutStrategy("steps"), []float32{20, 50}, 3-route.StableVersion()
		return decode[client.Run](x.c.api(i).StartRollout(context.Background(), "m", nil, client.NewRollout{
			Version: &candidate, Strategy: &s, Steps: &steps, BakeSeconds: &none, BakeRequests: &requests, MaxBakeSeconds: &most, WatchSeconds: &none,
		}))
	}
	return client.Run{}, errors.New("no server answers")
}

// try does something that may come too late, or while something is down.
func (x *chaos) try(f func() error) {
	for range 3 {
		if f() == nil {
			return
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// end waits for the end of a run, whatever is down meanwhile.
func (x *chaos) end(id string) client.Run {
	var run client.Run
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		for i := range 2 {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			got, err := decode[client.Run](x.c.api(i).GetRun(ctx, id))
			cancel()
			if err == nil {
				run = got
			}
			if run.EndedAt != nil {
				return run
			}
		}
	}
	out, err := exec.CommandContext(context.Background(), x.c.temporal.Bin(), "workflow", "describe", "--workflow-id", run.WorkflowId, "--address", x.c.temporal.Address).CombinedOutput()
	x.c.t.Errorf("run %s did not end: in phase %q; %v\n%s\n--- orchestrator:\n%s", id, run.Phase, err, out, x.c.orchestrator.Log())
	return run
}

// settle waits until the cluster is whole again. No role gave up because something else was away.
func (x *chaos) settle() {
	for _, n := range append(append([]*node{x.c.orchestrator}, x.c.servers...), x.c.workers...) {
		require.False(x.c.t, n.Exited(), "a role ended by itself:\n%s", n.Log())
	}
	for i := range x.c.servers {
		x.c.awaitReady(i, len(x.c.workers))
	}
	for _, id := range x.runs {
		x.end(id)
	}
}

// check reads the client's log and the event table.
func (x *chaos) check() {
	t := x.c.t
	routes, champions, ends := x.history()
	weight := map[string]int{}
	for i, r := range routes {
		require.EqualValues(t, i+1, r.Revision, "revisions have no gap and none is made twice")
		for _, a := range r.Arms {
			weight[fmt.Sprintf("%d/%d", r.Revision, a.Version)] = a.Weight
		}
	}
	changes := map[string]bool{}
	var stable []int
	for _, r := range routes {
		require.False(t, changes[r.ChangeID], "change %s was made twice", r.ChangeID)
		changes[r.ChangeID] = true
		if v := r.StableVersion(); len(stable) == 0 || stable[len(stable)-1] != v {
			stable = append(stable, v)
		}
	}
	require.Equal(t, stable, champions, "the alias moved with the stable arm, each time and never else")
	for _, id := range x.runs {
		require.Equal(t, 1, ends[id], "run %s ended that often", id)
	}
	failed, stale := 0, 0
	var example string
	for _, a := range x.log {
		if a.fault != "" {
			failed++
			example = a.fault
			continue
		}
		require.InDelta(t, a.x+float64(a.version), a.y, 0, "an answer is its version's")
		require.Positive(t, weight[fmt.Sprintf("%d/%d", a.revision, a.version)], "version %d answered under revision %d, in which it has no weight", a.version, a.revision)
		if next := int(a.revision); next < len(routes) && a.sent.Sub(routes[next].At) > 15*time.Second {
			stale++
		}
	}
	require.Zero(t, stale, "answers by a route that was replaced a quarter of a minute before they were asked for")
	require.NotEmpty(t, x.runs)
	require.LessOrEqual(t, float64(failed), 0.001*float64(len(x.log)), "%d of %d requests failed, such as: %s", failed, len(x.log), example)
	last := routes[len(routes)-1]
	require.Len(t, last.Arms, 1)
	require.Empty(t, last.Owner)
	x.c.consistent(last.StableVersion())
	t.Logf("%d requests, %d failed (%.4f %% answered); %d routes; roll-outs %v; killed %v",
		len(x.log), failed, 100*(1-float64(failed)/float64(len(x.log))), len(routes), x.outcomes, x.kills)
}

// history reads the event table: the routes in order, the versions that were champion in order, and how often each run
// ended.
func (x *chaos) history() (routes []registry.Route, champions []int, ends map[string]int) {
	t := x.c.t
	ends = map[string]int{}
	for after := int64(0); ; {
		limit := 1000
		page, err := decode[[]registry.Event](x.c.api(0).ListEvents(t.Context(), &client.ListEventsParams{After: &after, Limit: &limit}))
		require.NoError(t, err)
		if len(page) == 0 {
			return routes, champions, ends
		}
		for _, e := range page {
			require.Equal(t, after+1, e.Number, "events have no gap")
			after = e.Number
			x.read(e, &routes, &champions, ends)
		}
	}
}

func (x *chaos) read(e registry.Event, routes *[]registry.Route, champions *[]int, ends map[string]int) {
	t := x.c.t
	switch e.Type {
	case registry.RouteChanged:
		var r registry.Route
		require.NoError(t, json.Unmarshal(e.Data, &r))
		*routes = append(*routes, r)
	case registry.AliasMoved:
		var m registry.AliasMove
		require.NoError(t, json.Unmarshal(e.Data, &m))
		if m.Name == registry.Champion {
			*champions = append(*champions, m.To)
		}
	case registry.RunChanged:
		var r registry.Run
		require.NoError(t, json.Unmarshal(e.Data, &r))
		if r.State.Ended() && slices.Contains(x.runs, r.ID) {
			ends[r.ID]++
		}
	default:
	}
}
