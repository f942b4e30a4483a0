package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
)

func TestMain(m *testing.M) {
	testenv.Main(m, func() error {
		return goleak.Find(goleak.IgnoreTopFunction("database/sql.(*DB).connectionOpener"))
	})
}

// backends runs the conformance test f on every database.
func backends(t *testing.T, f func(t *testing.T, dsn string)) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		f(t, "sqlite:"+filepath.Join(t.TempDir(), "registry.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		f(t, testenv.Postgres(t))
	})
}

func open(t *testing.T, dsn string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), dsn)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// seed makes a model with n READY versions.
func seed(t *testing.T, s *store.Store, model string, n int) {
	t.Helper()
	_, err := s.CreateModel(t.Context(), registry.Model{
		Name: model, Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy(), CreatedBy: "ann",
	})
	require.NoError(t, err)
	for i := 1; i <= n; i++ {
		v, err := s.CreateVersion(t.Context(), registry.Version{Model: model, Manifest: manifest(t), CreatedBy: "ann"}, registry.Run{})
		require.NoError(t, err)
		require.Equal(t, i, v.Number)
		_, err = s.FinishVersion(t.Context(), model, i, registry.Derived{}, "")
		require.NoError(t, err)
	}
}

func manifest(t *testing.T) registry.Manifest {
	t.Helper()
	m, err := registry.NewManifest([]registry.File{{Path: "model.onnx", Size: 3, SHA256: fmt.Sprintf("%064x", 1)}})
	require.NoError(t, err)
	return m
}

func TestStore_Models(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		seed(t, s, "flights", 1)

		_, err := s.CreateModel(t.Context(), registry.Model{Name: "flights", Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy()})
		require.Equal(t, registry.Exists, registry.CodeOf(err))
		_, err = s.CreateModel(t.Context(), registry.Model{Name: "a/b", Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy()})
		require.Equal(t, registry.Invalid, registry.CodeOf(err))
		_, err = s.Model(t.Context(), "flihgts")
		require.Equal(t, registry.NotFound, registry.CodeOf(err))
		require.ErrorContains(t, err, `did you mean "flights"?`)

		m, err := s.Model(t.Context(), "flights")
		require.NoError(t, err)
		m.Config.MaxBatch = 7
		m, err = s.ConfigureModel(t.Context(), m, 1, "bob")
		require.NoError(t, err)
		require.EqualValues(t, 2, m.ConfigRevision)
		_, err = s.ConfigureModel(t.Context(), m, 1, "bob")
		require.Equal(t, registry.Conflict, registry.CodeOf(err))
		m.Config.MaxBatch = 0
		_, err = s.ConfigureModel(t.Context(), m, 2, "bob")
		require.Equal(t, registry.Invalid, registry.CodeOf(err))
		m, err = s.Model(t.Context(), "flights")
		require.NoError(t, err)
		require.Equal(t, 7, m.Config.MaxBatch)
	})
}

func TestStore_Versions(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		seed(t, s, "m", 1)
		run := registry.Run{ID: "r1", Kind: registry.KindRegister, Model: "m", WorkflowID: "register/m/2", Actor: "ann"}
		v, err := s.CreateVersion(t.Context(), registry.Version{Model: "m", Manifest: manifest(t), CreatedBy: "ann"}, run)
		require.NoError(t, err)
		require.Equal(t, registry.Pending, v.Status)
		got, err := s.Run(t.Context(), "r1")
		require.NoError(t, err)
		require.Equal(t, 2, got.Version)

		v, err = s.FinishVersion(t.Context(), "m", 2, registry.Derived{}, "not an ONNX file")
		require.NoError(t, err)
		require.Equal(t, registry.Failed, v.Status)
		_, err = s.FinishVersion(t.Context(), "m", 2, registry.Derived{}, "not an ONNX file")
		require.NoError(t, err, "the same outcome again is no error")
		_, err = s.FinishVersion(t.Context(), "m", 2, registry.Derived{}, "")
		require.Equal(t, registry.Precondition, registry.CodeOf(err))
		_, err = s.Version(t.Context(), "m", 9)
		require.Equal(t, registry.NotFound, registry.CodeOf(err))
		require.ErrorContains(t, err, "newest is 2")
		all, err := s.ListVersions(t.Context(), "m")
		require.NoError(t, err)
		require.Len(t, all, 2)
		require.Equal(t, 2, all[0].Number)
	})
}

func change(id string, expected int64, arms []registry.Arm) registry.RouteChange {
	return registry.RouteChange{ChangeID: id, Model: "m", Expected: expected, Arms: arms, Actor: "ann", Reason: "test"}
}

// A gated change is made when the policy lets traffic move, with the hold that it places; once made it stays made.
func TestStore_SetRouteGated(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		seed(t, s, "m", 2)
		first := change("c1", 0, registry.StableOnly(1))
		first.Gated = true
		_, err := s.SetRoute(t.Context(), first)
		require.NoError(t, err)

		freeze := func(until time.Time) {
			m, err := s.Model(t.Context(), "m")
			require.NoError(t, err)
			m.Rollout.FrozenUntil, m.Rollout.FreezeReason = until, "inventory"
			_, err = s.ConfigureModel(t.Context(), m, m.ConfigRevision, "ann")
			require.NoError(t, err)
		}
		until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
		freeze(until)
		next := change("c2", 1, registry.StableOnly(2))
		next.Gated, next.Hold = true, &registry.Hold{Model: "m", Version: 1, Holder: "watch", Until: time.Now().Add(time.Hour).UTC().Truncate(time.Microsecond)}
		_, err = s.SetRoute(t.Context(), next)
		require.Equal(t, registry.Precondition, registry.CodeOf(err))
		var closed *registry.GateClosed
		require.ErrorAs(t, err, &closed)
		require.Equal(t, until, closed.Opens.UTC())
		require.Contains(t, closed.Why, "inventory")
		holds, err := s.Holds(t.Context(), time.Now())
		require.NoError(t, err)
		require.Empty(t, holds)

		freeze(time.Time{})
		made, err := s.SetRoute(t.Context(), next)
		require.NoError(t, err)
		holds, err = s.Holds(t.Context(), time.Now())
		require.NoError(t, err)
		require.Equal(t, []registry.Hold{*next.Hold}, holds)

		freeze(until)
		again, err := s.SetRoute(t.Context(), next)
		require.NoError(t, err, "whoever did not hear of it asks again")
		require.Equal(t, made, again)
	})
}

func TestStore_PickVersions(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		seed(t, s, "m", 3)
		found, err := s.PickVersions(t.Context(), "m", 3, 1)
		require.NoError(t, err)
		require.Len(t, found, 2)
		require.Equal(t, [2]int{1, 3}, [2]int{found[1].Number, found[3].Number})
		_, err = s.PickVersions(t.Context(), "m", 1, 4)
		require.Equal(t, registry.NotFound, registry.CodeOf(err))
		require.ErrorContains(t, err, "no version 4; its newest is 3")
		_, err = s.PickVersions(t.Context(), "n", 1)
		require.ErrorContains(t, err, `no model "n"`)
	})
}

func TestStore_SetRoute(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		seed(t, s, "m", 3)

		first, err := s.SetRoute(t.Context(), change("c1", 0, registry.StableOnly(1)))
		require.NoError(t, err)
		require.EqualValues(t, 1, first.Revision)

		again, err := s.SetRoute(t.Context(), change("c1", 0, registry.StableOnly(1)))
		require.NoError(t, err, "a lost acknowledgement is harmless")
		require.Equal(t, first, again)

		_, err = s.SetRoute(t.Context(), change("c2", 0, registry.StableOnly(2)))
		require.Equal(t, registry.Conflict, registry.CodeOf(err))
		_, err = s.SetRoute(t.Context(), change("c3", 1, registry.StableOnly(9)))
		require.Equal(t, registry.NotFound, registry.CodeOf(err))

		split := change("c4", 1, []registry.Arm{{Version: 1, Role: registry.Stable, Weight: 9000}, {Version: 2, Role: registry.Candidate, Weight: 1000}})
		_, err = s.SetRoute(t.Context(), split)
		require.Equal(t, registry.Invalid, registry.CodeOf(err), "a candidate needs an owner")
		split.Owner, split.By, split.Aliases = "run-1", "run-1", map[string]int{"challenger": 2}
		owned, err := s.SetRoute(t.Context(), split)
		require.NoError(t, err)
		all, err := s.OwnedRoutes(t.Context())
		require.NoError(t, err)
		require.Equal(t, []registry.Route{owned}, all)

		_, err = s.SetRoute(t.Context(), change("c5", owned.Revision, registry.StableOnly(3)))
		require.Equal(t, registry.Conflict, registry.CodeOf(err))
		require.ErrorContains(t, err, "run-1")
		take := change("c6", owned.Revision, registry.StableOnly(2))
		take.Take = true
		_, err = s.SetRoute(t.Context(), take)
		require.NoError(t, err)
		all, err = s.OwnedRoutes(t.Context())
		require.NoError(t, err)
		require.Empty(t, all)

		aliases, err := s.Aliases(t.Context(), "m")
		require.NoError(t, err)
		require.Len(t, aliases, 2)
		require.Equal(t, 2, aliases[1].Version, "champion is the stable arm's version")
		moves, err := s.AliasHistory(t.Context(), "m", registry.Champion)
		require.NoError(t, err)
		require.Len(t, moves, 2)
		require.Equal(t, [2]int{1, 2}, [2]int{moves[0].From, moves[0].To})
		err = s.ArchiveVersion(t.Context(), "m", 2, "ann")
		require.Equal(t, registry.Conflict, registry.CodeOf(err))
		require.NoError(t, s.ArchiveVersion(t.Context(), "m", 3, "ann"))
	})
}

// Many writers in several processes' worth of stores race for the same revisions while readers follow the feed.
func TestStore_ConcurrentWritersSkipNoEventAndApplyNothingTwice(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		const writers, each = 4, 12
		seed(t, open(t, dsn), "m", 2)
		reader := open(t, dsn)
		start, err := reader.Snapshot(t.Context())
		require.NoError(t, err)

		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		var wrote, read sync.WaitGroup
		made := make(chan int64, writers*each)
		for w := range writers {
			s := open(t, dsn)
			wrote.Go(func() {
				for i := range each {
					revision, err := setUntilDone(ctx, s, fmt.Sprintf("w%d-%d", w, i))
					if err != nil {
						t.Errorf("writer %d: %v", w, err)
						return
					}
					made <- revision
				}
			})
		}
		routes := map[int64]bool{}
		read.Go(func() { follow(ctx, t, reader, start.Position, writers*each, routes) })
		wrote.Wait()
		read.Wait()
		close(made)
		seen := map[int64]bool{}
		for r := range made {
			require.False(t, seen[r], "revision %d was made twice", r)
			seen[r] = true
		}
		require.Len(t, seen, writers*each)
		require.Equal(t, seen, routes, "the feed announced every revision once")
	})
}

// setUntilDone makes one change, retrying lost races, and sends it twice as a caller whose acknowledgement was lost.
func setUntilDone(ctx context.Context, s *store.Store, id string) (int64, error) {
	for {
		now, err := s.Route(ctx, "m")
		if err != nil {
			return 0, err
		}
		c := change(id, now.Revision, registry.StableOnly(1+int(now.Revision%2)))
		r, err := s.SetRoute(ctx, c)
		if registry.CodeOf(err) == registry.Conflict {
			continue
		}
		if err != nil {
			return 0, err
		}
		repeat, err := s.SetRoute(ctx, c)
		if err == nil && repeat.Revision != r.Revision {
			err = errors.New("a repeated change made another revision")
		}
		return r.Revision, err
	}
}

// follow reads the feed as a gateway does and checks that numbers have no gap and route revisions ascend by one.
func follow(ctx context.Context, t *testing.T, s *store.Store, position int64, want int, into map[int64]bool) {
	t.Helper()
	for len(into) < want {
		if err := s.Await(ctx, position); err != nil {
			t.Errorf("await: %v", err)
			return
		}
		events, err := s.Events(ctx, position, 5)
		if err != nil {
			t.Errorf("events: %v", err)
			return
		}
		for _, e := range events {
			if e.Number != position+1 {
				t.Errorf("event %d follows %d", e.Number, position)
			}
			position = e.Number
			if e.Type != registry.RouteChanged {
				continue
			}
			var r registry.Route
			if err := json.Unmarshal(e.Data, &r); err != nil || r.Revision != int64(len(into)+1) {
				t.Errorf("event %d carries revision %d after %d: %v", e.Number, r.Revision, len(into), err)
			}
			into[r.Revision] = true
		}
	}
}

// Everybody changes the same run, and takes the same lock, beside changes of a route: each change is said once, in its
// order, and what is stored carries the numbers of its events.
func TestStore_ConcurrentRunsAreToldAsTheyWere(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		const writers, each = 4, 12
		first := open(t, dsn)
		seed(t, first, "m", 2)
		_, err := first.InsertRun(t.Context(), registry.Run{ID: "shared", Kind: registry.KindRollout, Model: "m"})
		require.NoError(t, err)
		begin, err := first.Snapshot(t.Context())
		require.NoError(t, err)
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		var wrote sync.WaitGroup
		for w := range writers {
			s := open(t, dsn)
			wrote.Go(func() {
				for i := range each {
					if err := storm(ctx, s, fmt.Sprintf("w%d-%d", w, i)); err != nil {
						t.Errorf("writer %d: %v", w, err)
						return
					}
				}
			})
		}
		wrote.Wait()
		events, err := first.Events(t.Context(), begin.Position, 100_000)
		require.NoError(t, err)
		phases, routes, moves := map[string]int{}, map[int64]int64{}, map[int64]int64{}
		last := ""
		for i, e := range events {
			require.Equal(t, begin.Position+int64(i)+1, e.Number)
			switch {
			case e.Type == registry.RunChanged && e.Run == "shared":
				var r registry.Run
				require.NoError(t, json.Unmarshal(e.Data, &r))
				phases[r.Phase]++
				last = r.Phase
			case e.Type == registry.RouteChanged:
				var r registry.Route
				require.NoError(t, json.Unmarshal(e.Data, &r))
				routes[e.Number] = r.Revision
			case e.Type == registry.AliasMoved:
				moves[e.Number] = e.Number
			}
		}
		require.Len(t, phases, writers*each)
		for phase, n := range phases {
			require.Equal(t, 1, n, phase)
		}
		run, err := first.Run(t.Context(), "shared")
		require.NoError(t, err)
		require.Equal(t, last, run.Phase)
		requireNumbers(t, first, routes, moves)
	})
}

// storm makes a change of each kind.
func storm(ctx context.Context, s *store.Store, id string) error {
	if _, err := s.UpdateRun(ctx, registry.RunUpdate{ID: "shared", State: registry.RunRunning, Phase: &id}); err != nil {
		return err
	}
	for {
		_, err := s.InsertRun(ctx, registry.Run{ID: id, Kind: registry.KindRollout, Model: "m", Lock: "one at a time"})
		if err == nil {
			break
		}
		if registry.CodeOf(err) != registry.Conflict {
			return err
		}
	}
	if _, err := setUntilDone(ctx, s, id); err != nil {
		return err
	}
	return endOnce(ctx, s, id)
}

// endOnce ends a run while somebody notes that it runs.
func endOnce(ctx context.Context, s *store.Store, id string) error {
	noted := make(chan error, 1)
	go func() {
		_, err := s.UpdateRun(ctx, registry.RunUpdate{ID: id, State: registry.RunRunning, Phase: &id})
		noted <- err
	}()
	_, err := s.UpdateRun(ctx, registry.RunUpdate{ID: id, State: registry.RunSucceeded})
	if err := errors.Join(err, <-noted); err != nil {
		return err
	}
	run, err := s.Run(ctx, id)
	if err == nil && (run.State != registry.RunSucceeded || run.EndedAt.IsZero()) {
		err = fmt.Errorf("run %s is %s after it had ended", id, run.State)
	}
	return err
}

// requireNumbers checks that routes and moves of aliases carry the numbers of the events that announced them.
func requireNumbers(t *testing.T, s *store.Store, routes, moves map[int64]int64) {
	t.Helper()
	history, err := s.RouteHistory(t.Context(), "m", 1000)
	require.NoError(t, err)
	stored := map[int64]int64{}
	for _, r := range history {
		stored[r.Event] = r.Revision
	}
	require.Equal(t, routes, stored)
	moved, err := s.AliasHistory(t.Context(), "m", "")
	require.NoError(t, err)
	stored = map[int64]int64{}
	for _, m := range moved {
		stored[m.Event] = m.Event
	}
	require.Equal(t, moves, stored)
}

// A gateway sleeps through what happens to runs, and wakes at once for a route.
func TestStore_AwaitServed(t *testing.T) {
	t.Parallel()
	dsn := testenv.Postgres(t)
	s, other := open(t, dsn), open(t, dsn)
	seed(t, s, "m", 1)
	// rings says whether a bell of the other process rings within d after what is done: nothing else ends these waits.
	rings := func(await func(context.Context, int64) error, d time.Duration, do func()) bool {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		rung := make(chan bool, 1)
		go func() { rung <- await(ctx, math.MaxInt64) == nil }()
		time.Sleep(20 * time.Millisecond) // it waits
		do()
		return <-rung
	}
	routes, runs := 0, 0
	moveRoute := func() {
		routes++
		_, err := s.SetRoute(t.Context(), change(strconv.Itoa(routes), int64(routes-1), registry.StableOnly(1)))
		require.NoError(t, err)
	}
	addRun := func() {
		runs++
		_, err := s.InsertRun(t.Context(), registry.Run{ID: strconv.Itoa(runs), Kind: registry.KindRollout, Model: "m"})
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return rings(other.AwaitServed, 2*time.Second, moveRoute) }, 30*time.Second, time.Millisecond)
	for rings(other.AwaitServed, 500*time.Millisecond, func() {}) { // a listener rings when it connects
	}
	require.True(t, rings(other.AwaitServed, 20*time.Second, moveRoute))
	require.False(t, rings(other.AwaitServed, 500*time.Millisecond, addRun))
	require.Eventually(t, func() bool { return rings(other.Await, 2*time.Second, addRun) }, 30*time.Second, time.Millisecond)
}

func TestStore_Runs(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		run := registry.Run{ID: "0001", Kind: registry.KindRollout, Model: "m", WorkflowID: "rollout/m", Lock: "rollout/m", Actor: "ann"}
		_, err := s.InsertRun(t.Context(), run)
		require.NoError(t, err)
		_, err = s.InsertRun(t.Context(), run)
		require.NoError(t, err, "a repeated id is no error")
		second := run
		second.ID = "0002"
		_, err = s.InsertRun(t.Context(), second)
		require.Equal(t, registry.Conflict, registry.CodeOf(err))
		require.ErrorContains(t, err, "0001")

		phase := "baking"
		r, err := s.UpdateRun(t.Context(), registry.RunUpdate{ID: "0001", State: registry.RunRunning, Phase: &phase})
		require.NoError(t, err)
		require.False(t, r.StartedAt.IsZero())
		_, err = s.UpdateRun(t.Context(), registry.RunUpdate{ID: "0001", State: registry.RunSucceeded, Outcome: registry.Promoted})
		require.NoError(t, err)
		r, err = s.UpdateRun(t.Context(), registry.RunUpdate{ID: "0001", State: registry.RunFailed})
		require.NoError(t, err)
		require.Equal(t, registry.RunSucceeded, r.State, "a run that ended never changes")
		_, err = s.InsertRun(t.Context(), second)
		require.NoError(t, err, "the lock is free again")
		open, err := s.ListRuns(t.Context(), registry.RunFilter{Open: true, Model: "m"})
		require.NoError(t, err)
		require.Len(t, open, 1)
		require.Equal(t, "0002", open[0].ID)
	})
}

func TestStore_LeasesHoldsAndEvidence(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		seed(t, s, "m", 1)
		now := time.Now().UTC().Truncate(time.Second)
		l := registry.Lease{ID: "g1", Kind: registry.GatewayLease, Node: "a", Applied: 7, StartedAt: now, Expires: now.Add(time.Minute)}
		require.NoError(t, s.PutLease(t.Context(), l))
		l.Applied = 5
		require.NoError(t, s.PutLease(t.Context(), l))
		st := registry.Stratum{
			Gateway: "g1", Model: "m", Revision: 3, Version: 1, Role: registry.Stable, Start: now, Requests: 10, Errors: 1,
			Latency: registry.LatencyCounts{4: 9, 5: 1},
			Detail:  registry.StratumDetail{Callers: 4, Outputs: map[int]int64{2050: 3}, Feedback: 2, FeedbackSum: 1.5, FeedbackSquares: 1.25},
		}
		require.NoError(t, s.FlushStrata(t.Context(), "g1", []registry.Stratum{st}, now.Add(time.Second)))
		twice := st
		twice.Requests = 99
		require.NoError(t, s.FlushStrata(t.Context(), "g1", []registry.Stratum{twice}, now))
		strata, err := s.Strata(t.Context(), registry.StrataFilter{Model: "m", MinRevision: 3, MaxRevision: 3})
		require.NoError(t, err)
		require.Equal(t, []registry.Stratum{st}, strata, "a flushed stratum stays as it was")
		for from, want := range map[time.Time]int{now: 1, now.Add(time.Second): 0} {
			strata, err = s.Strata(t.Context(), registry.StrataFilter{Model: "m", From: map[string]time.Time{"g1": from, "g2": now.Add(time.Hour)}})
			require.NoError(t, err)
			require.Len(t, strata, want)
		}
		strata, err = s.Strata(t.Context(), registry.StrataFilter{Model: "m", From: map[string]time.Time{"g2": now.Add(time.Hour)}})
		require.NoError(t, err)
		require.Len(t, strata, 1, "a gateway without a time of its own is read from the start")

		tally, err := s.Tally(t.Context(), "r")
		require.NoError(t, err)
		require.Empty(t, tally.Body)
		for _, body := range []string{`{"a":1}`, `{"a":2}`} {
			require.NoError(t, s.PutTally(t.Context(), registry.Tally{Run: "r", Body: json.RawMessage(body)}))
			tally, err = s.Tally(t.Context(), "r")
			require.NoError(t, err)
			require.JSONEq(t, body, string(tally.Body))
		}
		leases, err := s.Leases(t.Context(), registry.GatewayLease, now)
		require.NoError(t, err)
		require.Len(t, leases, 1)
		require.EqualValues(t, 7, leases[0].Applied, "acknowledgements never go back")
		require.Equal(t, now.Add(time.Second), leases[0].Sealed)

		h := registry.Hold{Model: "m", Version: 1, Holder: "run-1", Until: now.Add(time.Hour)}
		require.NoError(t, s.SetHold(t.Context(), h, "ann"))
		require.Equal(t, registry.Conflict, registry.CodeOf(s.ArchiveVersion(t.Context(), "m", 1, "ann")))
		h.Until = time.Time{}
		require.NoError(t, s.SetHold(t.Context(), h, "ann"))
		holds, err := s.Holds(t.Context(), now)
		require.NoError(t, err)
		require.Empty(t, holds)

		e := registry.Evidence{Run: "r", Seq: 1, At: now, Verdict: "continue", Body: json.RawMessage(`{"e":1.5}`)}
		require.NoError(t, s.AddEvidence(t.Context(), e))
		require.NoError(t, s.AddEvidence(t.Context(), registry.Evidence{Run: "r", Seq: 1, At: now, Verdict: "rollback"}))
		list, err := s.ListEvidence(t.Context(), "r")
		require.NoError(t, err)
		require.Equal(t, []registry.Evidence{e}, list)
	})
}

func TestStore_KeysAndAnswers(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		_, err := s.CreateKey(t.Context(), registry.APIKey{ID: "k1", Name: "ci", Hash: "h1", Role: registry.Deployer, Models: []string{"m"}})
		require.NoError(t, err)
		_, err = s.CreateKey(t.Context(), registry.APIKey{ID: "k2", Name: "ci", Hash: "h2", Role: registry.Deployer})
		require.Equal(t, registry.Exists, registry.CodeOf(err))
		k, err := s.KeyByHash(t.Context(), "h1")
		require.NoError(t, err)
		require.Equal(t, []string{"m"}, k.Models)
		require.NoError(t, s.RevokeKey(t.Context(), "k1", "ann"))
		_, err = s.KeyByHash(t.Context(), "h1")
		require.Equal(t, registry.Unauthenticated, registry.CodeOf(err))

		a := registry.Idempotent{Actor: "ann", Path: "/x", Key: "1", BodyHash: "b", Expires: time.Now().Add(time.Hour)}
		_, fresh, err := s.Reserve(t.Context(), a)
		require.NoError(t, err)
		require.True(t, fresh)
		_, _, err = s.Reserve(t.Context(), a)
		require.Equal(t, registry.Conflict, registry.CodeOf(err), "the first is still under way")
		a.Status, a.Body = 202, []byte(`{"id":"r"}`)
		require.NoError(t, s.Remember(t.Context(), a))
		got, fresh, err := s.Reserve(t.Context(), a)
		require.NoError(t, err)
		require.False(t, fresh)
		require.JSONEq(t, `{"id":"r"}`, string(got.Body))
		a.BodyHash = "other"
		_, _, err = s.Reserve(t.Context(), a)
		require.Equal(t, registry.Conflict, registry.CodeOf(err))
	})
}

// Servers that start at once all make the admin key; one of them does, and the others are told that it exists.
func TestStore_AKeyIsCreatedOnce(t *testing.T) {
	backends(t, func(t *testing.T, dsn string) {
		s := open(t, dsn)
		codes := make(chan registry.Code, 8)
		for range cap(codes) {
			go func() {
				_, err := s.CreateKey(t.Context(), registry.APIKey{ID: "admin", Name: "admin", Hash: "h", Role: registry.Admin})
				codes <- registry.CodeOf(err)
			}()
		}
		count := map[registry.Code]int{}
		for range cap(codes) {
			count[<-codes]++
		}
		require.Equal(t, map[registry.Code]int{"": 1, registry.Exists: 7}, count)
	})
}

func TestOpen_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	_, err := store.Open(t.Context(), "mysql://x")
	require.Equal(t, registry.Invalid, registry.CodeOf(err))
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Second)
	defer stop()
	_, err = store.Open(ctx, "postgres://nobody@127.0.0.1:1/x?sslmode=disable")
	require.Equal(t, registry.Unavailable, registry.CodeOf(err))
}
