package gateway

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
)

func event(t *testing.T, number int64, kind registry.EventType, data any) registry.Event {
	t.Helper()
	raw, err := json.Marshal(data)
	require.NoError(t, err)
	return registry.Event{Number: number, Type: kind, Model: "m", Version: 1, Actor: "test", Data: raw}
}

// onRoute is the event that gives a model's traffic to a version.
func onRoute(t *testing.T, number int64, version int) registry.Event {
	t.Helper()
	return event(t, number, registry.RouteChanged, registry.Route{Model: "m", Revision: number, Arms: registry.StableOnly(version)})
}

// after returns the table after events, which need not be neighbours.
func after(t *testing.T, before *table, events ...registry.Event) *table {
	t.Helper()
	next := newTable(before.snapshot())
	for _, e := range events {
		require.NoError(t, next.change(e))
	}
	return next
}

// newJournal returns a journal that keeps a table with a model in it.
func newJournal(t *testing.T) (*journal, *table) {
	t.Helper()
	j := &journal{path: filepath.Join(t.TempDir(), "state", "route.json")}
	now := after(t, newTable(registry.Snapshot{}), event(t, 1, registry.ModelCreated, registry.Model{Name: "m"}))
	require.NoError(t, j.keep(now))
	return j, now
}

// killed returns what a gateway finds that starts after one was killed: the journal is not closed.
func killed(t *testing.T, j *journal) *table {
	t.Helper()
	found, err := (&journal{path: j.path}).read()
	require.NoError(t, err)
	return found
}

func TestJournal_KeepsEveryChangeAtOnce(t *testing.T) {
	t.Parallel()
	_, err := (&journal{path: filepath.Join(t.TempDir(), "route.json")}).read()
	require.ErrorIs(t, err, fs.ErrNotExist)
	j, now := newJournal(t)
	require.Equal(t, now, killed(t, j))
	for _, e := range []registry.Event{onRoute(t, 5, 1), onRoute(t, 9, 2)} { // those between are not served
		now = after(t, now, e)
		require.NoError(t, j.add([]registry.Event{e}, now))
		require.Equal(t, now, killed(t, j))
	}

	require.NoError(t, j.add([]registry.Event{event(t, 10, "of.a.later.build", nil)}, now))
	require.Equal(t, now, killed(t, j), "what is not known is not served")

	stale, err := os.ReadFile(j.eventsPath())
	require.NoError(t, err)
	now = after(t, now, onRoute(t, 11, 3))
	require.NoError(t, j.keep(now))
	require.NoError(t, os.WriteFile(j.eventsPath(), stale, 0o600)) //nolint:gosec // the test's own file
	require.Equal(t, now, killed(t, j), "killed after the snapshot, before the events were emptied")
}

func TestJournal_LeavesOutWhatWasNotWrittenToItsEnd(t *testing.T) {
	t.Parallel()
	j, first := newJournal(t)
	second := after(t, first, onRoute(t, 2, 1))
	require.NoError(t, j.add([]registry.Event{onRoute(t, 2, 1)}, second))
	whole, err := os.ReadFile(j.eventsPath())
	require.NoError(t, err)
	for cut := range len(whole) - 1 { // without its line's end the event is whole
		require.NoError(t, os.WriteFile(j.eventsPath(), whole[:cut], 0o600)) //nolint:gosec // the test's own file
		require.Equal(t, first, killed(t, j), "cut at %d", cut)
	}
}

func TestJournal_AFailedWriteIsMadeUpFor(t *testing.T) {
	t.Parallel()
	j, now := newJournal(t)
	require.NoError(t, j.events.Close()) // as a full disk would
	lost := onRoute(t, 2, 1)
	now = after(t, now, lost)
	require.Error(t, j.add([]registry.Event{lost}, now))
	next := onRoute(t, 3, 2)
	now = after(t, now, next)
	require.NoError(t, j.add([]registry.Event{next}, now))
	require.Equal(t, now, killed(t, j), "the whole table was written, with what was lost")
}

func TestJournal_StaysInProportion(t *testing.T) {
	t.Parallel()
	j, now := newJournal(t)
	largest := int64(0)
	for number := int64(2); number < 12_000; number++ {
		e := onRoute(t, number, 1)
		now = after(t, now, e)
		require.NoError(t, j.add([]registry.Event{e}, now))
		info, err := os.Stat(j.eventsPath())
		require.NoError(t, err)
		largest = max(largest, info.Size())
	}
	require.Equal(t, now, killed(t, j))
	require.Greater(t, largest, int64(leastEvents)-1000)
	require.Less(t, largest, int64(leastEvents)+1000)
}
