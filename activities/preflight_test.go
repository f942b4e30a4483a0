package activities

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
)

func TestPreflight_ChecksTheCandidateAndTheRun(t *testing.T) {
	t.Parallel()
	b := newBench(t) // run r owns the route
	ask := func(run string, candidate int) (PreflightResult, error) {
		return b.a.Preflight(t.Context(), PreflightInput{RunID: run, Model: "m", Candidate: candidate, Plan: RolloutPlan{Strategy: registry.AllAtOnce}})
	}
	for _, id := range []string{"r", "other"} {
		_, err := b.store.InsertRun(t.Context(), registry.Run{ID: id, Kind: registry.KindRollout, Model: "m", Version: 2})
		require.NoError(t, err)
	}
	out, err := ask("r", 2)
	require.NoError(t, err)
	require.Equal(t, 1, out.Route.StableVersion())
	require.False(t, out.Warm, "no worker has it")
	_, err = ask("other", 2)
	require.ErrorContains(t, err, "owned by run r")
	_, err = ask("r", 3)
	require.ErrorContains(t, err, "no version 3")

	message := "aborted by ann before it began"
	_, err = b.store.UpdateRun(t.Context(), registry.RunUpdate{ID: "r", State: registry.RunCancelled, Outcome: registry.Aborted, Message: &message})
	require.NoError(t, err)
	_, err = ask("r", 2)
	require.Equal(t, registry.Precondition, CodeOf(err))
	require.ErrorContains(t, err, message)
}
