package api

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

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

// One route that cannot be reverted keeps no other one waiting.
func TestReapOrphans_GoesOnAfterAFault(t *testing.T) {
	t.Parallel()
	r, err := sqlstore.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "registry.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	for _, model := range []string{"a", "b"} {
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
		_, err = r.InsertRun(t.Context(), registry.Run{ID: "run-" + model, Kind: registry.KindRollout, Model: model, Actor: "ann"})
		require.NoError(t, err)
		arms := []registry.Arm{{Version: 1, Role: registry.Stable, Weight: 9000}, {Version: 2, Role: registry.Candidate, Weight: 1000}}
		_, err = r.SetRoute(t.Context(), registry.RouteChange{ChangeID: model, Model: model, Arms: arms, Owner: "run-" + model, By: "run-" + model, Actor: "ann"})
		require.NoError(t, err)
		_, err = r.UpdateRun(t.Context(), registry.RunUpdate{ID: "run-" + model, State: registry.RunFailed})
		require.NoError(t, err)
	}
	s := &Server{store: deaf{Store: r, model: "a"}, log: slog.New(slog.DiscardHandler)}
	require.ErrorContains(t, s.reapOrphans(t.Context()), "no way to a")
	owned, err := r.OwnedRoutes(t.Context())
	require.NoError(t, err)
	require.Len(t, owned, 1)
	require.Equal(t, "a", owned[0].Model)
}
