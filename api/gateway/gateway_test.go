package gateway

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/monitor"
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
	workers := func(ids string) []candidate {
		var out []candidate
		for _, id := range ids {
			out = append(out, candidate{string(id), map[string]string{"gpu": map[bool]string{true: "h100", false: "none"}[id <= 'b']}})
		}
		return out
	}
	held := map[string]int{}
	for version := range 1000 {
		before, after, more := place(workers("abcde"), "m", version, 2, nil), place(workers("abcd"), "m", version, 2, nil), place(workers("abcdef"), "m", version, 2, nil)
		require.Len(t, before, 2)
		for w := range before {
			require.True(t, w == "e" || after[w], "version %d left %s although only e went", version, w)
			held[w]++
		}
		for w := range more {
			require.True(t, w == "f" || before[w], "version %d came to %s although only f came", version, w)
		}
		require.Equal(t, before, place(workers("edcba"), "m", version, 2, nil), "the order of workers says nothing")
	}
	for w, n := range held {
		require.InDelta(t, 400, n, 80, "%s holds its share", w)
	}
	require.Len(t, place(workers("abcde"), "m", 1, 0, nil), 5)
	require.Equal(t, map[string]bool{"a": true, "b": true}, place(workers("abcde"), "m", 1, 3, map[string]string{"gpu": "h100"}))
	require.Empty(t, place(workers("abcde"), "m", 1, 3, map[string]string{"gpu": "b200"}))
}

func TestFleet_PicksTheLessLoadedAndLeavesTheSickOut(t *testing.T) {
	t.Parallel()
	f := newFleet()
	state := registry.WorkerState{Loaded: []registry.LoadedVersion{{Model: "m", Version: 1, State: registry.Loaded}}}
	var all []*attached
	for _, id := range []string{"a", "b", "c"} {
		w, err := f.join(id, id, "127.0.0.1:1")
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, w.conn.Close()) })
		f.report(w, state)
		all = append(all, w)
	}
	busy := state
	busy.Waiting = 100
	f.report(all[0], busy)
	all[1].inflight.Store(5)
	picked := map[string]int{}
	for range 3000 {
		w, _ := f.pick("m", 1, nil)
		picked[w.id]++
	}
	require.Zero(t, picked["a"], "of two the less loaded")
	require.InDelta(t, 1000, picked["b"], 150)
	all[2].failed(time.Now())
	all[2].failed(time.Now())
	for range 100 {
		w, _ := f.pick("m", 1, nil)
		require.NotEqual(t, "c", w.id)
	}
	require.Greater(t, time.Unix(0, all[2].sick.Load()), time.Now().Add(sickFor), "longer each time")
	all[2].answered()
	w, _ := f.pick("m", 1, all[1])
	require.Equal(t, "c", w.id)
	_, why := f.pick("m", 2, nil)
	require.Empty(t, why)
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

// One caller that fails again and again is one failure under a revision; another step asks it again, and callers count
// once in a roll-out.
func TestCounter_ACallerLeavesTheVotesAfterItsFirstFailure(t *testing.T) {
	t.Parallel()
	now := time.Unix(3000, 0)
	c := newCounter("g", func() time.Time { return now })
	route := split(1000)
	count := func(key string, code codes.Code) {
		c.count(attempt{route: route, arm: route.Arms[1], key: key, code: code, took: time.Millisecond, outputs: []int{7}})
	}
	votes := func() [3]int64 {
		now = now.Add(time.Second)
		var out [3]int64
		done, _ := c.take()
		for _, s := range done {
			out = [3]int64{out[0] + s.Votes, out[1] + s.VoteFails, out[2] + s.Detail.Callers}
		}
		return out
	}
	count("broken", codes.Internal)
	count("broken", codes.Internal)
	count("good", codes.OK)
	count("", codes.OK)
	count("", codes.Internal)
	require.Equal(t, [3]int64{4, 2, 4}, votes(), "one vote each, and every request without a key")
	now = now.Add(voteEpoch)
	count("broken", codes.Internal)
	count("good", codes.OK)
	require.Equal(t, [3]int64{1, 0, 0}, votes(), "in the next epoch who has failed is out")
	route.Revision++
	count("broken", codes.Internal)
	require.Equal(t, [3]int64{1, 1, 0}, votes(), "in the next step it is in again, and known")
	now = now.Add(voteEpoch)
	route.Revision, route.Salt = route.Revision+1, "another roll-out"
	count("broken", codes.Internal)
	require.Equal(t, [3]int64{1, 1, 1}, votes())
	route.Revision, route.Arms = route.Revision+1, registry.StableOnly(2)
	c.count(attempt{route: route, arm: route.Arms[0], key: "broken", code: codes.OK})
	require.Empty(t, c.callers, "nobody is remembered while nothing is compared")
}

func TestCounter_PairsAndFeedback(t *testing.T) {
	t.Parallel()
	now := time.Unix(5000, 0)
	c := newCounter("g", func() time.Time { return now })
	route := split(1000)
	c.pair(route, route.Arms[2], "", false, false, 0)
	c.pair(route, route.Arms[2], "", false, false, 0.5)
	c.pair(route, route.Arms[2], "", false, true, 0)
	c.pair(route, route.Arms[2], "", true, false, 0)
	c.pair(route, route.Arms[2], "", true, true, 0)
	require.True(t, c.feedback(route, route.Arms[1], "ann", 2))
	require.False(t, c.feedback(route, route.Arms[1], "ann", 5), "the first counts")
	require.True(t, c.feedback(route, route.Arms[1], "bob", 1))
	now = now.Add(time.Second)
	done, _ := c.take()
	require.Len(t, done, 2)
	byVersion := map[int]registry.StratumDetail{done[0].Version: done[0].Detail, done[1].Version: done[1].Detail}
	shadow := byVersion[3]
	require.Equal(t, [3]int64{5, 1, 1}, [3]int64{shadow.Pairs, shadow.OnlyFailed, shadow.OnlyAnswered})
	require.Equal(t, map[int]int64{0: 1, monitor.GapBucket(0.5): 1}, shadow.Gaps)
	require.Equal(t, [3]float64{2, 3, 5}, [3]float64{float64(byVersion[2].Feedback), byVersion[2].FeedbackSum, byVersion[2].FeedbackSquares})
}

func TestAnswerGapAndOutputKeys(t *testing.T) {
	t.Parallel()
	answer := func(datatype string, raw ...byte) *inference.ModelInferResponse {
		return &inference.ModelInferResponse{
			Outputs:           []*inference.ModelInferResponse_InferOutputTensor{{Name: "y", Datatype: datatype, Shape: []int64{1, 2}}},
			RawOutputContents: [][]byte{raw},
		}
	}
	half, one := []byte{0, 0x38}, []byte{0, 0x3c}
	a, b := answer("FP16", append(half, one...)...), answer("FP16", append(half, half...)...)
	require.InDelta(t, 0.5, answerGap(a, b), 1e-9)
	require.Zero(t, answerGap(a, answer("FP16", append(half, one...)...)))
	require.InDelta(t, 1, answerGap(answer("INT8", 1, 2), answer("INT8", 1, 3)), 0, "a label that differs is another answer")
	require.InDelta(t, 1, answerGap(a, answer("INT8", 1, 3)), 0)
	require.InDelta(t, 1, answerGap(a, &inference.ModelInferResponse{}), 0)
	require.Len(t, outputKeys(a), 2)
	require.Len(t, outputKeys(answer("BYTES", 1, 0, 0, 0, 'a', 2, 0, 0, 0, 'b', 'c')), 2)
	require.Empty(t, outputKeys(answer("BYTES", 200, 0, 0, 0, 'a')), "a lying length")
	require.Len(t, outputKeys(answer("BOOL", 1, 0)), 2)
	require.Empty(t, outputKeys(answer("FP64", 1, 2)), "too short")
}

func TestReassign_TellsWhatChanged(t *testing.T) {
	t.Parallel()
	g, told := &Gateway{}, assignment{}
	models := newTable(registry.Snapshot{Models: []registry.Model{{Name: "m"}}, Versions: []registry.Version{
		{Model: "m", Number: 1}, {Model: "m", Number: 2}, {Model: "m", Number: 3},
	}})
	tell := func(list ...given) (held, dropped []string) {
		var news attach.AttachResponse
		g.reassign(told, models, "m", list, &news)
		for _, h := range news.GetHeld() {
			held = append(held, fmt.Sprintf("%s/%d leased %v", h.GetModel(), h.GetVersion(), h.GetLeased()))
		}
		for _, d := range news.GetDropped() {
			dropped = append(dropped, fmt.Sprintf("%s/%d", d.GetModel(), d.GetVersion()))
		}
		return held, dropped
	}
	held, dropped := tell(given{1, 1, true}, given{2, 1, false})
	require.Equal(t, []string{"m/1 leased true", "m/2 leased false"}, held)
	require.Empty(t, dropped)
	held, dropped = tell(given{1, 1, true}, given{2, 1, false})
	require.Empty(t, slices.Concat(held, dropped), "nothing changed")
	held, dropped = tell(given{2, 1, true}, given{3, 1, true})
	require.Equal(t, []string{"m/2 leased true", "m/3 leased true"}, held)
	require.Equal(t, []string{"m/1"}, dropped)
	held, _ = tell(given{2, 2, true}, given{3, 2, true})
	require.Len(t, held, 2, "the serving config changed")
	list := []given{{2, 2, false}, {3, 3, false}}
	told.keepLeased("m", list)
	require.Equal(t, []given{{2, 2, true}, {3, 3, false}}, list, "what changed otherwise is told as it is")
	held, dropped = tell()
	require.Empty(t, held)
	require.Equal(t, []string{"m/2", "m/3"}, dropped)
	require.Empty(t, told)
}

func TestFleet_RingsForModelsOrAll(t *testing.T) {
	t.Parallel()
	f := newFleet()
	w, err := f.join("w", "w", "127.0.0.1:1")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.conn.Close()) })
	f.ring("a")
	f.ring("b", "a")
	models, all := f.rung(w)
	require.ElementsMatch(t, []string{"a", "b"}, models)
	require.False(t, all)
	models, _ = f.rung(w)
	require.Empty(t, models, "once")
	f.ring("a")
	f.ring()
	_, all = f.rung(w)
	require.True(t, all)
	_, all = f.rung(w)
	require.False(t, all, "once")
}

func TestTable_AppliesEventsInOrderOnly(t *testing.T) {
	t.Parallel()
	start := newTable(registry.Snapshot{Position: 4, Models: []registry.Model{{Name: "m"}}})
	_, _, err := start.apply(registry.Event{Number: 6, Type: registry.RunChanged})
	require.Error(t, err)
	same, changed, err := start.apply(registry.Event{Number: 5, Type: registry.RunChanged, Model: "m"})
	require.NoError(t, err)
	require.Empty(t, changed, "a run says nothing of what is served")
	require.EqualValues(t, 5, same.position)
	later, changed, err := start.apply(registry.Event{Number: 5, Type: "of.a.later.build", Model: "n"})
	require.NoError(t, err)
	require.Empty(t, changed, "what is not known is not served")
	require.Len(t, later.models, 1)
	next, changed, err := same.apply(registry.Event{Number: 6, Type: registry.KeyChanged}, registry.Event{Number: 7, Type: registry.RouteChanged, Model: "m", Data: []byte(`{"model":"m","revision":1,"arms":[{"version":1,"role":"stable","weight":10000}]}`)})
	require.NoError(t, err)
	require.Len(t, changed, 1)
	require.EqualValues(t, 7, next.position)
	require.EqualValues(t, 7, next.models["m"].route.Event)
	require.EqualValues(t, 1, next.models["m"].route.Revision)
	require.Zero(t, start.models["m"].route.Revision, "the old table is as it was")
	labelled, _, err := next.apply(event(t, 8, registry.ModelConfigured, registry.Model{Name: "m", Config: registry.ServingConfig{WorkerLabels: map[string]string{"gpu": "h100"}}}))
	require.NoError(t, err)
	bare, _, err := labelled.apply(event(t, 9, registry.ModelConfigured, registry.Model{Name: "m", Config: registry.ServingConfig{WorkerLabels: map[string]string{"rack": "2"}}}))
	require.NoError(t, err)
	require.Equal(t, map[string]string{"rack": "2"}, bare.models["m"].model.Config.WorkerLabels)
	require.Equal(t, map[string]string{"gpu": "h100"}, labelled.models["m"].model.Config.WorkerLabels, "the old table is as it was")
	_, _, err = next.find("n")
	require.Equal(t, registry.NotFound, registry.CodeOf(err))
	_, _, err = next.find("m@champ")
	require.ErrorContains(t, err, `no alias "champ"`)
	require.Equal(t, next.snapshot(), newTable(next.snapshot()).snapshot())
}
