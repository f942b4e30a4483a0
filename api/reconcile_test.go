package api

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
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
