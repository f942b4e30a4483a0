package activities

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
)

func TestEndRun_TellsOfTheRunThatItBeganFirst(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, err := store.Open(ctx, "sqlite:"+filepath.Join(t.TempDir(), "r.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	runs := NewRuns(s)
	_, err = s.InsertRun(ctx, registry.Run{ID: "r", Kind: registry.KindRollout, Model: "m", WorkflowID: "rollout/m", Lock: "rollout/m"})
	require.NoError(t, err)
	watch := registry.Run{ID: "r-watch", Kind: registry.KindWatch, Model: "m", Version: 2, WorkflowID: "watch/m/3"}
	end := EndRunInput{
		RunID: "r", State: registry.RunSucceeded, Outcome: registry.Promoted,
		Began: &BeginRunInput{RunID: "r-watch", Phase: "watching", Insert: &watch},
	}
	require.NoError(t, runs.EndRun(ctx, end))
	got, err := s.Run(ctx, "r-watch")
	require.NoError(t, err)
	require.Equal(t, registry.RunRunning, got.State)
	require.Equal(t, "watching", got.Phase)

	require.NoError(t, runs.EndRun(ctx, EndRunInput{RunID: "r-watch", State: registry.RunSucceeded, Message: "nothing went wrong"}))
	require.NoError(t, runs.EndRun(ctx, end), "Temporal may run it again, after the watch ended")
	got, err = s.Run(ctx, "r-watch")
	require.NoError(t, err)
	require.Equal(t, "nothing went wrong", got.Message)
}
