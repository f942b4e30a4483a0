package worker

import (
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
)

func TestBlackbox_SaysWhatTheDeadProcessRan(t *testing.T) {
	t.Parallel()
	dir, log, now := t.TempDir(), slog.New(slog.DiscardHandler), time.Unix(1_700_000_000, 0).UTC()
	b := openBlackbox(dir, "w", now, log)
	require.Empty(t, b.since(now))
	idle, busy, gone := b.enter(key{"m", 1}), b.enter(key{"m", 2}), b.enter(key{"m", 3})
	idle.begin()
	idle.end()
	busy.begin()
	gone.begin()
	gone.leave()

	// The process dies here: nothing is closed.
	next := openBlackbox(dir, "w", now.Add(time.Minute), log)
	crash := registry.Crash{Model: "m", Version: 2, At: now.Add(time.Minute), Node: "w"}
	require.Equal(t, []registry.Crash{crash}, next.since(now.Add(time.Minute)))
	m := next.enter(key{"m", 2})
	m.begin()
	next.close() // this one ends by its own will

	last := openBlackbox(dir, "w", now.Add(30*time.Minute), log)
	require.Equal(t, []registry.Crash{crash}, last.since(now.Add(30*time.Minute)), "kept for an hour, over restarts")
	require.Empty(t, openBlackbox(dir, "w", now.Add(2*time.Hour), log).since(now.Add(2*time.Hour)))
}

func TestBlackbox_GoesWithoutWhenThereIsNoRoom(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	b := openBlackbox(t.TempDir(), "w", time.Now(), log)
	defer b.close()
	for i := range slots {
		require.NotNil(t, b.enter(key{"m", i}))
	}
	none := b.enter(key{"m", slots})
	require.Nil(t, none)
	none.begin()
	none.end()
	none.leave()
	broken := openBlackbox("/dev/null/no", "w", time.Now(), log)
	broken.enter(key{"m", 1}).begin()
	broken.close()
}
