package activities

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/artifact"
	"github.com/orrery-ml/orrery/registry/store"
)

// bench is a registry in which version 2 of m has a tenth of the traffic, under revision 2.
type bench struct {
	t     *testing.T
	store *store.Store
	a     *Traffic
	in    BakeInput
	start time.Time
}

func newBench(t *testing.T) *bench {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "r.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	_, err = s.CreateModel(t.Context(), registry.Model{Name: "m", Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy()})
	require.NoError(t, err)
	files := []registry.File{{Path: "model.onnx", Size: 1, SHA256: strings.Repeat("0", 64)}}
	for i := range 2 {
		run := registry.Run{ID: fmt.Sprintf("register-%d", i), Kind: registry.KindRegister, Model: "m"}
		v, err := s.CreateVersion(t.Context(), registry.Version{Model: "m", Manifest: registry.Manifest{Files: files}}, run)
		require.NoError(t, err)
		_, err = s.FinishVersion(t.Context(), "m", v.Number, registry.Derived{}, "")
		require.NoError(t, err)
	}
	_, err = s.SetRoute(t.Context(), registry.RouteChange{ChangeID: "1", Model: "m", Arms: registry.StableOnly(1), Actor: "ann"})
	require.NoError(t, err)
	_, err = s.SetRoute(t.Context(), registry.RouteChange{ChangeID: "2", Model: "m", Expected: 1, Owner: "r", By: "r", Actor: "ann", Arms: []registry.Arm{
		{Version: 1, Role: registry.Stable, Weight: 9000}, {Version: 2, Role: registry.Candidate, Weight: 1000},
	}})
	require.NoError(t, err)
	b := &bench{t: t, store: s, a: NewTraffic(s, nil), start: time.Unix(1_700_000_000, 0).UTC()}
	b.in = BakeInput{
		RunID: "r", Model: "m", Versions: []int{2}, Reference: 1, FirstRevision: 2, Revision: 2, Began: b.start, Since: b.start,
		Seconds: 60, Requests: 100, Judge: monitor.DefaultJudge(),
	}
	return b
}

// flush stores a second of traffic of both arms and seals it; without a lease the gateway is gone.
func (b *bench) flush(gateway string, second int, alive bool) {
	b.t.Helper()
	at := b.start.Add(time.Duration(second) * time.Second)
	if alive {
		require.NoError(b.t, b.store.PutLease(b.t.Context(), registry.Lease{ID: gateway, Kind: registry.GatewayLease, Expires: time.Now().Add(time.Hour)}))
	}
	stratum := func(version int, role registry.Role, n int64) registry.Stratum {
		return registry.Stratum{Gateway: gateway, Model: "m", Revision: 2, Version: version, Role: role, Start: at, Requests: n, Votes: n, Latency: registry.LatencyCounts{80: n}, Detail: registry.StratumDetail{Callers: n}}
	}
	require.NoError(b.t, b.store.FlushStrata(b.t.Context(), gateway, []registry.Stratum{
		stratum(1, registry.Stable, 9), stratum(2, registry.Candidate, 1),
	}, at.Add(time.Second)))
}

// counted looks once and returns the candidate's requests in the tally, and in all.
func (b *bench) counted(c *comparison) (folded, all int64) {
	b.t.Helper()
	b.a.gateways.at = time.Time{} // the leases are read anew
	rest, err := b.a.look(context.Background(), b.in, c)
	require.NoError(b.t, err)
	if t := c.Tallies[2]; t != nil {
		folded = t.Candidate.Requests
	}
	return folded, rest.step
}

func TestLook_FoldsEachStratumOnceWhenItsWindowIsOver(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	for second := range 4 {
		b.flush("g", second, true)
	}
	folded, all := b.counted(c)
	require.EqualValues(t, 0, folded, "the window is not over")
	require.EqualValues(t, 4, all, "but the requests are known")
	b.flush("g", 4, true)
	for range 3 { // looking again changes nothing
		folded, all = b.counted(c)
		require.EqualValues(t, 5, folded)
		require.EqualValues(t, 5, all)
	}
	require.EqualValues(t, 45, c.Tallies[2].Stable.Requests)
	require.Equal(t, monitor.Split{Share: 0.1, Stable: 45, Candidate: 5}, c.Tallies[2].Splits[2], "by the route's own weights")

	// A restart in the middle of the next window: whoever goes on reads the stored tally.
	require.NoError(t, b.a.writeComparison(t.Context(), "r", c))
	b.flush("g", 5, true)
	b.counted(c) // by the one that dies
	again, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	for second := 6; second < 10; second++ {
		b.flush("g", second, true)
	}
	folded, all = b.counted(again)
	require.EqualValues(t, 10, folded)
	require.EqualValues(t, 10, all)
}

// A gateway that stops reporting, is cut off past its lease, or whose clock is behind holds nobody up, and what it
// brings late counts then, once.
func TestLook_GatewaysDoNotWaitForOneAnother(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	b.flush("stuck", 0, true)
	for second := range 10 {
		b.flush("good", second, true)
		b.flush("slow clock", second-3600, true)
	}
	folded, _ := b.counted(c)
	require.EqualValues(t, 20, folded, "all but the stuck one's, whose window is not over")
	for second := 1; second < 7; second++ { // late
		b.flush("stuck", second, true)
	}
	folded, _ = b.counted(c)
	require.EqualValues(t, 27, folded)

	require.NoError(t, b.store.DropLease(t.Context(), "stuck")) // cut off in the middle of a window
	b.flush("stuck", 8, false)
	folded, _ = b.counted(c)
	require.EqualValues(t, 28, folded, "what a gateway without a lease said is all it will say")
	b.flush("stuck", 9, true) // it comes back
	b.flush("stuck", 14, true)
	folded, all := b.counted(c)
	require.EqualValues(t, 30, all)
	require.EqualValues(t, 30, folded)
}

// Looking often changes nothing: what is not folded yet is for guardrails only, and never gets into the tally's
// distributions.
func TestJudge_LookingAgainChangesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	for second := range 8 {
		b.flush("g", second, true)
		b.a.gateways.at = time.Time{}
		for range 3 {
			_, err = b.a.judge(t.Context(), b.in, c, newLabelled(nil), b.start.Add(8*time.Second))
			require.NoError(t, err)
		}
	}
	for _, arm := range []monitor.ArmCount{c.Tallies[2].Candidate, c.Tallies[2].Stable} {
		require.Positive(t, arm.Requests)
		require.Equal(t, arm.Requests, arm.Latency[80])
		require.Equal(t, arm.Requests, arm.VoteLatency[80])
	}
}

// A day's bake is a few hundred events of its workflow's history (Argo Rollouts #1107: analysis runs created endlessly).
func TestBake_ADayIsAFewHundredEvents(t *testing.T) {
	t.Parallel()
	const eventsOfASlice = 6 // an activity and a workflow task, scheduled, started and completed
	require.Less(t, int(24*time.Hour/bakeSlice)*eventsOfASlice, 1000)
}

func TestJudge_GuardrailsDoNotWaitForAWindow(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	b.flush("g", 0, true)
	j, err := b.a.judge(t.Context(), b.in, c, newLabelled(nil), b.start.Add(time.Second))
	require.NoError(t, err)
	require.Equal(t, monitor.Continue, j.Verdict, j.Reason)
	require.NoError(t, b.store.FlushStrata(t.Context(), "g", []registry.Stratum{
		{Gateway: "g", Model: "m", Revision: 2, Version: 2, Role: registry.Candidate, Start: b.start.Add(time.Second), Requests: 1, NotFinite: 1},
	}, b.start.Add(2*time.Second)))
	j, err = b.a.judge(t.Context(), b.in, c, newLabelled(nil), b.start.Add(2*time.Second))
	require.NoError(t, err)
	require.Equal(t, monitor.Rollback, j.Verdict)
	require.Contains(t, j.Reason, "NaN")
}

func TestJudge_AWorkerThatDiesTwiceOnACandidate(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	c, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	report := func(crashes ...registry.Crash) {
		require.NoError(t, b.store.PutLease(t.Context(), registry.Lease{
			ID: "w", Kind: registry.WorkerLease, Expires: time.Now().Add(time.Hour), Worker: registry.WorkerState{Crashes: crashes},
		}))
		b.a.workers.at = time.Time{}
	}
	old := registry.Crash{Model: "m", Version: 2, At: b.start.Add(-time.Minute), Node: "w"}
	first := registry.Crash{Model: "m", Version: 2, At: b.start.Add(time.Second), Node: "w"}
	report(old, first, first, registry.Crash{Model: "m", Version: 1, At: b.start.Add(time.Second), Node: "w"})
	j, err := b.a.judge(t.Context(), b.in, c, newLabelled(nil), b.start.Add(time.Second))
	require.NoError(t, err)
	require.Equal(t, monitor.Continue, j.Verdict, j.Reason)
	report(first, registry.Crash{Model: "m", Version: 2, At: b.start.Add(2 * time.Second), Node: "w"})
	j, err = b.a.judge(t.Context(), b.in, c, newLabelled(nil), b.start.Add(time.Second))
	require.NoError(t, err)
	require.Equal(t, monitor.Rollback, j.Verdict)
	require.Contains(t, j.Reason, "2 workers died while they ran it")
}

// A policy that plans nothing by itself is refused when it is set, not at three in the morning.
func TestPlanRollout_OfThePolicyAlone(t *testing.T) {
	t.Parallel()
	for _, s := range registry.Strategies {
		p := registry.DefaultRolloutPolicy()
		p.Strategy = s
		_, err := PlanRollout(p, RolloutRequest{})
		planless := s == registry.AB || s == registry.Linear // they need what a policy does not have
		require.Equal(t, planless, err != nil, "%s: %v", s, err)
	}
}

// Labels that come later decide too: the candidate's answers are further from the truth.
func TestJudge_LabelsThatComeLater(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	objects, err := artifact.OpenDir(t.TempDir())
	require.NoError(t, err)
	b.a.objects = objects
	b.in.Judge.MaxLossGain, b.in.Began = 0.05, time.Now().Add(-time.Minute)
	c, err := b.a.readComparison(t.Context(), "r")
	require.NoError(t, err)
	b.flush("g", 0, true)
	labels := newLabelled(objects)
	judge := func() monitor.Judgement {
		j, err := b.a.judge(t.Context(), b.in, c, labels, time.Now())
		require.NoError(t, err)
		labels.at = time.Time{}
		return j
	}
	write := func(version, n int, value float64) {
		var rows []records.Record
		var truth []records.Label
		for i := range n {
			id := fmt.Sprintf("v%d-%d-%v", version, i, value)
			rows = append(rows, records.Record{ID: id, At: time.Now(), Version: version, Features: []float64{1}, Outputs: []float64{1 - value, value + float64(i%2)/10}})
			truth = append(truth, records.Label{ID: id, Value: 1})
		}
		raw, err := records.EncodeRecords([]string{"x"}, rows)
		require.NoError(t, err)
		key := records.Slice{Prefix: records.RecordPrefix, Model: "m", Version: version, From: time.Now(), To: time.Now()}.Key("w", int64(n), "parquet")
		require.NoError(t, objects.Put(t.Context(), key, bytes.NewReader(raw), int64(len(raw))))
		raw, err = records.EncodeLabels(truth, time.Now())
		require.NoError(t, err)
		require.NoError(t, objects.Put(t.Context(), fmt.Sprintf("%smodel=m/%d-%v", records.LabelPrefix, version, value), bytes.NewReader(raw), int64(len(raw))))
	}
	require.Equal(t, monitor.Continue, judge().Verdict)
	write(1, 2000, 0.8)
	write(2, 20, 0.2)
	j := judge()
	require.Equal(t, monitor.Continue, j.Verdict, "twenty labels are no proof")
	require.EqualValues(t, 20, j.Loss.N)
	write(2, 500, 0.25)
	j = judge()
	require.Equal(t, monitor.Rollback, j.Verdict, "%+v", j.Loss)
	require.Contains(t, j.Reason, "labels say")
	require.EqualValues(t, 520, j.Loss.N, "each file is read once")
}

func TestPlanRollout(t *testing.T) {
	t.Parallel()
	policy := registry.DefaultRolloutPolicy()
	policy.Approvals, policy.FourEyes, policy.Judge = 2, true, []byte(`{"alpha": 0.01}`)
	n := func(v int64) *int64 { return &v }
	for _, c := range []struct {
		name string
		r    RolloutRequest
		want func(p RolloutPlan)
	}{
		{"the policy's own", RolloutRequest{}, func(p RolloutPlan) {
			require.Equal(t, []int{1000}, p.Steps)
			require.Equal(t, 2, p.Approvals)
			require.True(t, p.FourEyes)
			require.InDelta(t, 0.01, p.Judge.Alpha, 0)
		}},
		{"approvals cannot be taken off", RolloutRequest{RequireApproval: true}, func(p RolloutPlan) { require.Equal(t, 2, p.Approvals) }},
		{"judge over judge", RolloutRequest{Judge: []byte(`{"min_requests": 7}`)}, func(p RolloutPlan) {
			require.InDelta(t, 0.01, p.Judge.Alpha, 0)
			require.EqualValues(t, 7, p.Judge.MinRequests)
		}},
		{"linear", RolloutRequest{Strategy: registry.Linear, StepPercent: 30}, func(p RolloutPlan) { require.Equal(t, []int{3000, 6000, 9000}, p.Steps) }},
		{"steps", RolloutRequest{Strategy: registry.Steps, Steps: []float64{0.5, 50}, BakeSeconds: n(0)}, func(p RolloutPlan) {
			require.Equal(t, []int{50, 5000}, p.Steps)
			require.Zero(t, p.BakeSeconds)
		}},
		{"shadow", RolloutRequest{Strategy: registry.ShadowRun, SharePercent: 20}, func(p RolloutPlan) {
			require.Equal(t, 2000, p.Shadow)
			require.False(t, p.Promote)
		}},
		{"experiment", RolloutRequest{Strategy: registry.AB, Variants: []VariantRequest{{2, 30}, {3, 30}}, Bandit: true}, func(p RolloutPlan) {
			require.Len(t, p.Variants, 2)
			require.Equal(t, &Experiment{Goal: monitor.Higher, Bandit: true, Floor: 500, EverySeconds: 900}, p.Experiment)
		}},
		{"all at once", RolloutRequest{Strategy: registry.AllAtOnce}, func(p RolloutPlan) { require.Empty(t, p.Steps) }},
	} {
		p, err := PlanRollout(policy, c.r)
		require.NoError(t, err, c.name)
		c.want(p)
	}
	for message, r := range map[string]RolloutRequest{
		"want one of":         {Strategy: "yolo"},
		"has no steps":        {Strategy: registry.AllAtOnce, Steps: []float64{5}},
		"one step":            {Strategy: registry.Canary, Steps: []float64{5, 10}},
		"ascend":              {Strategy: registry.Steps, Steps: []float64{10, 5}},
		"less than 100":       {Strategy: registry.Steps, Steps: []float64{100}},
		"step_percent":        {Strategy: registry.Linear},
		"share_percent":       {Strategy: registry.ShadowRun, SharePercent: 101},
		"ab needs":            {Strategy: registry.AB},
		"named twice":         {Strategy: registry.AB, Variants: []VariantRequest{{2, 30}, {2, 30}}},
		"leave some":          {Strategy: registry.AB, Variants: []VariantRequest{{2, 60}, {3, 40}}},
		"floor_percent":       {Strategy: registry.AB, Variants: []VariantRequest{{2, 30}}, FloorPercent: 51},
		"watch_seconds":       {Strategy: registry.BlueGreen, WatchSeconds: n(0)},
		"bake_s -1":           {BakeSeconds: n(-1)},
		`unknown field "zzz"`: {Judge: []byte(`{"zzz": 1}`)},
		"alpha":               {Judge: []byte(`{"alpha": 7}`)},
	} {
		_, err := PlanRollout(policy, r)
		require.ErrorContains(t, err, message)
		require.Equal(t, registry.Invalid, registry.CodeOf(err), message)
	}
}
