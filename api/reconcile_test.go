package api

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/log"

	"github.com/orrery-ml/orrery/registry"
	sqlstore "github.com/orrery-ml/orrery/registry/store"
)

func TestTurn_LooksAtEveryRunInTurn(t *testing.T) {
	t.Parallel()
	runs := func(ids ...string) (out []registry.Run) {
		for _, id := range ids {
			out = append(out, registry.Run{ID: id})
		}
		return out
	}
	last := ""
	var seen [][]registry.Run
	for _, open := range [][]registry.Run{runs("e", "a", "c", "b", "d"), runs("a", "b", "c", "d", "e"), runs("a", "b", "d"), runs("z"), nil, runs("a", "b")} {
		var next []registry.Run
		next, last = turn(open, last, 2)
		seen = append(seen, next)
	}
	require.Equal(t, [][]registry.Run{runs("a", "b"), runs("c", "d"), runs("a", "b"), runs("z"), nil, runs("a", "b")}, seen)
	require.Equal(t, "b", last)
}

// deaf is a registry that refuses to change the route of one model.
type deaf struct {
	*sqlstore.Store

	model string
}

func (d deaf) SetRoute(ctx context.Context, c registry.RouteChange) (registry.Route, error) {
	if c.Model == d.model {
		return registry.Route{}, registry.Errorf(registry.Internal, "no way to %s", c.Model)
	}
	return d.Store.SetRoute(ctx, c)
}

// orphans makes models whose routes belong to runs that have ended.
func orphans(t *testing.T, models ...string) *sqlstore.Store {
	t.Helper()
	r, err := sqlstore.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "registry.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	for _, model := range models {
		_, err := r.CreateModel(t.Context(), registry.Model{
			Name: model, Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy(), CreatedBy: "ann",
		})
		require.NoError(t, err)
		manifest, err := registry.NewManifest([]registry.File{{Path: "model.onnx", Size: 3, SHA256: strings.Repeat("0", 64)}})
		require.NoError(t, err)
		for n := 1; n <= 2; n++ {
			_, err = r.CreateVersion(t.Context(), registry.Version{Model: model, Manifest: manifest, CreatedBy: "ann"}, registry.Run{})
			require.NoError(t, err)
			_, err = r.FinishVersion(t.Context(), model, n, registry.Derived{}, "")
			require.NoError(t, err)
		}
		run := "run-" + model
		_, err = r.InsertRun(t.Context(), registry.Run{ID: run, Kind: registry.KindRollout, Model: model, Actor: "ann"})
		require.NoError(t, err)
		arms := []registry.Arm{{Version: 1, Role: registry.Stable, Weight: 9000}, {Version: 2, Role: registry.Candidate, Weight: 1000}}
		_, err = r.SetRoute(t.Context(), registry.RouteChange{ChangeID: model, Model: model, Arms: arms, Owner: run, By: run, Actor: "ann"})
		require.NoError(t, err)
		_, err = r.UpdateRun(t.Context(), registry.RunUpdate{ID: run, State: registry.RunFailed})
		require.NoError(t, err)
	}
	return r
}

// One route that cannot be reverted keeps no other one waiting.
func TestReapOrphans_GoesOnAfterAFault(t *testing.T) {
	t.Parallel()
	r := orphans(t, "a", "b")
	s := &Server{store: deaf{Store: r, model: "a"}, log: slog.New(slog.DiscardHandler)}
	require.ErrorContains(t, s.reapOrphans(t.Context()), "no way to a")
	owned, err := r.OwnedRoutes(t.Context())
	require.NoError(t, err)
	require.Len(t, owned, 1)
	require.Equal(t, "a", owned[0].Model)
}

// aged is a registry all of whose open runs began a minute ago.
type aged struct{ *sqlstore.Store }

func (a aged) ListRuns(ctx context.Context, f registry.RunFilter) ([]registry.Run, error) {
	runs, err := a.Store.ListRuns(ctx, f)
	for i := range runs {
		runs[i].CreatedAt = runs[i].CreatedAt.Add(-time.Minute)
	}
	return runs, err
}

// A Temporal that does not answer holds up a turn for seconds, however many runs are open, and no route that is to be
// reverted.
func TestReconcile_WhileTemporalIsAway(t *testing.T) {
	t.Parallel()
	r := orphans(t, "a")
	for _, id := range []string{"1", "2", "3", "4"} {
		_, err := r.InsertRun(t.Context(), registry.Run{ID: id, Kind: registry.KindRollout, Model: "a", WorkflowID: "rollout/a", Actor: "ann"})
		require.NoError(t, err)
		_, err = r.UpdateRun(t.Context(), registry.RunUpdate{ID: id, State: registry.RunRunning})
		require.NoError(t, err)
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed below; it accepts and says nothing
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, silent.Close()) })
	away, err := client.NewLazyClient(client.Options{HostPort: silent.Addr().String(), Logger: log.NewStructuredLogger(slog.New(slog.DiscardHandler))})
	require.NoError(t, err)
	t.Cleanup(away.Close)
	s := &Server{store: aged{r}, temporal: away, log: slog.New(slog.DiscardHandler)}
	began := time.Now()
	_, err = s.reconcileOnce(t.Context(), "")
	require.Error(t, err)
	require.Less(t, time.Since(began), 2*lookLimit)
	owned, err := r.OwnedRoutes(t.Context())
	require.NoError(t, err)
	require.Empty(t, owned)
	open, err := r.ListRuns(t.Context(), registry.RunFilter{Open: true})
	require.NoError(t, err)
	require.Len(t, open, 4, "nobody knows whether their workflows are gone")
}
