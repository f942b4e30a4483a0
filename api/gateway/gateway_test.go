package gateway

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/orrery-ml/orrery/registry"
)

func split(weight int) registry.Route {
	return registry.Route{Model: "m", Revision: 3, Salt: "s", Arms: []registry.Arm{
		{Version: 1, Role: registry.Stable, Weight: registry.FullWeight - weight},
		{Version: 2, Role: registry.Candidate, Weight: weight},
		{Version: 3, Role: registry.Shadow, Weight: registry.FullWeight},
	}}
}

func TestPickArm_FollowsWeightsAndMovesOnlyWhoItMust(t *testing.T) {
	t.Parallel()
	const callers = 20_000
	on := map[int]int{}
	for i := range callers {
		key := fmt.Sprintf("caller-%d", i)
		low, ok := pickArm(split(1000), key)
		require.True(t, ok)
		again, _ := pickArm(split(1000), key)
		require.Equal(t, low, again, "a caller stays on its arm")
		high, _ := pickArm(split(2500), key)
		if low.Version == 2 {
			require.Equal(t, 2, high.Version, "raising the weight takes nobody off the candidate")
		}
		on[low.Version]++
	}
	require.InDelta(t, callers/10, on[2], 150)
	require.Zero(t, on[3], "a shadow answers nobody")
	random := 0
	for range callers {
		if a, _ := pickArm(split(1000), ""); a.Version == 2 {
			random++
		}
	}
	require.InDelta(t, callers/10, random, 200)
	_, ok := pickArm(registry.Route{}, "x")
	require.False(t, ok)
}

func TestPickArm_AnotherSaltPicksOtherPeople(t *testing.T) {
	t.Parallel()
	both, other := 0, split(1000)
	other.Salt = "another"
	for i := range 10_000 {
		key := fmt.Sprintf("caller-%d", i)
		a, _ := pickArm(split(1000), key)
		b, _ := pickArm(other, key)
		if a.Version == 2 && b.Version == 2 {
			both++
		}
	}
	require.InDelta(t, 100, both, 40)
}

func TestPlace_MovesOnlyWhatItMust(t *testing.T) {
	t.Parallel()
	five, four := []string{"a", "b", "c", "d", "e"}, []string{"a", "b", "c", "d"}
	for version := range 100 {
		before, after := place(five, "m", version, 2), place(four, "m", version, 2)
		require.Len(t, before, 2)
		for w := range before {
			require.True(t, w == "e" || after[w], "version %d left %s although only e went", version, w)
		}
	}
	require.Len(t, place(five, "m", 1, 0), 5)
}

func TestCounter_SealsEachSecondOnce(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	c := newCounter("g", func() time.Time { return now })
	a := attempt{route: split(1000), arm: split(1000).Arms[1], key: "k", code: codes.OK, took: time.Millisecond}
	c.count(a)
	a.code = codes.InvalidArgument
	c.count(a)
	a.code = codes.Canceled
	c.count(a)
	a.code = codes.ResourceExhausted
	c.count(a)
	done, sealed := c.take()
	require.Empty(t, done, "the second is not over")
	require.Equal(t, now.UTC(), sealed)

	now = now.Add(1200 * time.Millisecond)
	done, sealed = c.take()
	require.Len(t, done, 1)
	s := done[0]
	require.Equal(t, [6]int64{2, 1, 1, 0, 1, 1}, [6]int64{s.Requests, s.Errors, s.Votes, s.VoteFails, s.Sheds, s.Cancelled},
		"the caller voted with its first request")
	require.Equal(t, time.Unix(1001, 0).UTC(), sealed)

	now = now.Add(-5 * time.Second)
	c.count(a)
	again, _ := c.take()
	require.Empty(t, again, "a clock that steps back reopens nothing")
	c.restore(done)
	now = now.Add(10 * time.Second)
	again, _ = c.take()
	require.Len(t, again, 2)
}

func TestTable_AppliesEventsInOrderOnly(t *testing.T) {
	t.Parallel()
	start := newTable(registry.Snapshot{Position: 4, Models: []registry.Model{{Name: "m"}}})
	_, err := start.apply(registry.Event{Number: 6, Type: registry.RunChanged})
	require.Error(t, err)
	next, err := start.apply(registry.Event{Number: 5, Type: registry.RouteChanged, Model: "m", Data: []byte(`{"model":"m","revision":1,"arms":[{"version":1,"role":"stable","weight":10000}]}`)})
	require.NoError(t, err)
	require.EqualValues(t, 1, next.models["m"].route.Revision)
	require.Zero(t, start.models["m"].route.Revision, "the old table is as it was")
	_, _, err = next.find("n")
	require.Equal(t, registry.NotFound, registry.CodeOf(err))
	_, _, err = next.find("m@champ")
	require.ErrorContains(t, err, `no alias "champ"`)
	require.Equal(t, next.snapshot(), newTable(next.snapshot()).snapshot())
}
