package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/history/v1"
	"go.temporal.io/sdk/activity"
	temporal "go.temporal.io/sdk/client"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
)

const turns = 90 // of a measurement that is repeated

// atOnce is a promotion without a bake.
func atOnce(version int) client.NewRollout {
	s, none := client.NewRolloutStrategy("all_at_once"), int64(0)
	return client.NewRollout{Version: &version, Strategy: &s, WatchSeconds: &none}
}

// promotion measures asking for a roll-out, and a promotion without a bake beside a bare workflow with as many
// activities, in turns. Every turn has a model of its own: Temporal reads a shard's queue at most twenty times a second
// (history.transferProcessorMaxPollRPS), so that the same workflow id again and again would measure that.
func promotion(ctx context.Context, p *platform, r *report) error {
	names := make([]string, turns+3)
	for i := range names {
		names[i] = fmt.Sprintf("promotion-%d", i)
		if err := p.seed(ctx, names[i], p.digest, p.size); err != nil {
			return err
		}
		// The candidate is loaded: loading is not what is measured.
		h := registry.Hold{Model: names[i], Version: 2, Holder: "bench", Until: time.Now().Add(time.Hour)}
		if err := p.store.SetHold(ctx, h, "bench"); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := eventually(ctx, "candidates", func() bool { return p.warm(ctx, name, 2) }); err != nil {
			return err
		}
	}
	bare, stop, err := bareWorkflow(p.temporal)
	if err != nil {
		return err
	}
	defer stop()
	var asked, promoted, plain []time.Duration
	activities := 0
	for i, name := range names {
		began := time.Now()
		run, err := decode[client.Run](p.apis[0].StartRollout(ctx, name, nil, atOnce(2)))
		if err != nil {
			return err
		}
		took := time.Since(began)
		var out struct{ Outcome string }
		if err := p.temporal.GetWorkflow(ctx, run.WorkflowId, "").Get(ctx, &out); err != nil {
			return err
		}
		whole := time.Since(began)
		if out.Outcome != string(registry.Promoted) {
			return fmt.Errorf("run %s ended %s", run.Id, out.Outcome)
		}
		if activities == 0 {
			if activities, err = count(ctx, p.temporal, run.WorkflowId, enums.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED); err != nil {
				return err
			}
		}
		began = time.Now()
		if err := bare(ctx, activities); err != nil {
			return err
		}
		if i >= 3 { // warm
			asked, promoted, plain = append(asked, took), append(promoted, whole), append(plain, time.Since(began))
		}
	}
	r.row("POST to first answer", fmt.Sprintf("p50 %s, p99 %s", millis(quantile(asked, 0.5)), millis(quantile(asked, 0.99))), "< 20 ms")
	mine, theirs := quantile(promoted, 0.5), quantile(plain, 0.5)
	r.row(fmt.Sprintf("promotion with zero bake / bare workflow of %d activities", activities),
		fmt.Sprintf("%.2f (%s / %s, medians of %d)", mine.Seconds()/theirs.Seconds(), millis(mine), millis(theirs), turns), "<= 1.3")
	return nil
}

// bareWorkflow starts a worker of nothing but empty activities, and returns how to run n of them one after the other.
func bareWorkflow(c temporal.Client) (run func(ctx context.Context, n int) error, stop func(), err error) {
	const queue = "bare"
	w := worker.New(c, queue, worker.Options{})
	w.RegisterActivityWithOptions(func(context.Context) error { return nil }, activity.RegisterOptions{Name: "Nothing"})
	w.RegisterWorkflowWithOptions(func(ctx workflow.Context, n int) error {
		ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{StartToCloseTimeout: time.Minute})
		for range n {
			if err := workflow.ExecuteActivity(ctx, "Nothing").Get(ctx, nil); err != nil {
				return err
			}
		}
		return nil
	}, workflow.RegisterOptions{Name: "Bare"})
	if err := w.Start(); err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context, n int) error {
		run, err := c.ExecuteWorkflow(ctx, temporal.StartWorkflowOptions{TaskQueue: queue}, "Bare", n)
		if err != nil {
			return err
		}
		return run.Get(ctx, nil)
	}, w.Stop, nil
}

// events reads a workflow's history.
func events(ctx context.Context, c temporal.Client, id string) (out []*history.HistoryEvent, err error) {
	list := c.GetWorkflowHistory(ctx, id, "", false, enums.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT)
	for list.HasNext() {
		e, err := list.Next()
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, nil
}

func count(ctx context.Context, c temporal.Client, id string, kind enums.EventType) (int, error) {
	n := 0
	list, err := events(ctx, c, id)
	for _, e := range list {
		if e.GetEventType() == kind {
			n++
		}
	}
	return n, err
}

// routeChange measures how long a change of the route takes until every gateway answers by it, under load.
func routeChange(ctx context.Context, p *platform, r *report) error {
	if err := p.seed(ctx, "route", p.digest, p.size); err != nil {
		return err
	}
	if err := p.store.SetHold(ctx, registry.Hold{Model: "route", Version: 2, Holder: "bench", Until: time.Now().Add(time.Hour)}, "bench"); err != nil {
		return err
	}
	if err := eventually(ctx, "both versions", func() bool { return p.warm(ctx, "route", 1) && p.warm(ctx, "route", 2) }); err != nil {
		return err
	}
	loaded, stop := context.WithCancel(ctx)
	var load sync.WaitGroup
	var asked, failed atomic.Int64
	for g := range 4 {
		load.Go(func() {
			for loaded.Err() == nil {
				if _, err := p.infer(loaded, g%len(p.servers), "route", 1); err != nil && loaded.Err() == nil {
					failed.Add(1)
				}
				asked.Add(1)
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	var took []time.Duration
	for i := range 300 {
		began := time.Now()
		route, err := decode[registry.Route](p.apis[0].SetRoute(ctx, "route", client.RouteChange{Version: 2 - i%2, Reason: "bench"}))
		if err != nil {
			stop()
			return err
		}
		took = append(took, time.Since(began)) // the answer waits for every leased gateway
		for s := range p.servers {
			revision, err := p.infer(ctx, s, "route", 1)
			if n, _ := strconv.ParseInt(revision, 10, 64); err != nil || n < route.Revision {
				stop()
				return fmt.Errorf("server %d answered by revision %s after %d was acknowledged: %w", s, revision, route.Revision, err)
			}
		}
	}
	stop()
	load.Wait()
	r.row("route change, decided, written and applied by every gateway",
		fmt.Sprintf("p50 %s, p99 %s; %d of %d requests failed", millis(quantile(took, 0.5)), millis(quantile(took, 0.99)), failed.Load(), asked.Load()), "p99 < 50 ms, none fails")
	return nil
}

// warm says whether a version answers.
func (p *platform) warm(ctx context.Context, name string, version int) bool {
	leases, err := decode[[]client.Lease](p.apis[0].ListLeases(ctx))
	if err != nil {
		return false
	}
	for _, l := range leases {
		for _, v := range l.Worker.Loaded {
			if v.Model == name && v.Version == version && v.State == registry.Loaded {
				return true
			}
		}
	}
	return false
}

// guardrail measures how long a candidate that answers NaN keeps its traffic.
func guardrail(ctx context.Context, p *platform, r *report) error {
	if err := p.seed(ctx, "guard", p.nan, p.nanSize); err != nil {
		return err
	}
	var took []time.Duration
	for range 10 {
		s, none, requests, steps := client.NewRolloutStrategy("steps"), int64(0), int64(1_000_000), []float32{50}
		run, err := decode[client.Run](p.apis[0].StartRollout(ctx, "guard", nil, client.NewRollout{
			Version: new(2), Strategy: &s, Steps: &steps, BakeSeconds: &none, BakeRequests: &requests, WatchSeconds: &none,
		}))
		if err != nil {
			return err
		}
		split := func() bool {
			route, err := p.store.Route(ctx, "guard")
			arm, ok := route.Arm(2)
			return err == nil && ok && arm.Weight > 0
		}
		if err := eventually(ctx, "the candidate's traffic", split); err != nil {
			return err
		}
		time.Sleep(time.Second)
		for {
			if _, err := p.infer(ctx, 0, "guard", -1); err != nil { // NaN has no JSON form
				break
			}
		}
		began := time.Now()
		if err := eventually(ctx, "the way back", func() bool { return !split() }); err != nil {
			return err
		}
		took = append(took, time.Since(began))
		if err := p.temporal.GetWorkflow(ctx, run.WorkflowId, "").Get(ctx, nil); err != nil {
			return err
		}
	}
	r.row("guardrail: from the first NaN answer to the route without the candidate", fmt.Sprintf("p50 %s, longest %s", millis(quantile(took, 0.5)), millis(quantile(took, 1))), "< 3 s")
	return nil
}

// crowd runs n roll-outs at once on one orchestrator and reads from their histories how long tasks waited.
func crowd(ctx context.Context, p *platform, r *report, n int) error {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("crowd-%03d", i)
		if err := p.seed(ctx, names[i], p.digest, p.size); err != nil {
			return err
		}
	}
	if err := eventually(ctx, "all stable versions", func() bool { return p.warm(ctx, names[n-1], 1) }); err != nil {
		return err
	}
	began := time.Now()
	var ids []string
	for _, name := range names {
		s, bake, most, steps := client.NewRolloutStrategy("steps"), int64(60), int64(60), []float32{10}
		run, err := decode[client.Run](p.apis[0].StartRollout(ctx, name, nil, client.NewRollout{
			Version: new(2), Strategy: &s, Steps: &steps, BakeSeconds: &bake, MaxBakeSeconds: &most,
		}))
		if err != nil {
			return err
		}
		ids = append(ids, run.WorkflowId)
	}
	started := time.Since(began)
	for _, id := range ids {
		if err := p.temporal.GetWorkflow(ctx, id, "").Get(ctx, nil); err != nil {
			return err
		}
	}
	whole := time.Since(began)
	var waits []time.Duration
	most := 0
	for _, id := range ids {
		list, err := events(ctx, p.temporal, id)
		if err != nil {
			return err
		}
		most = max(most, len(list))
		waits = append(waits, scheduleToStart(list)...)
	}
	r.row(fmt.Sprintf("%d roll-outs at once: schedule to start of %d tasks", n, len(waits)),
		fmt.Sprintf("p50 %s, p99 %s; started in %.1f s, all ended (no traffic: inconclusive) after %.0f s", millis(quantile(waits, 0.5)), millis(quantile(waits, 0.99)), started.Seconds(), whole.Seconds()), "p99 < 1 s")
	const sliceEvents, day = 6, 24 * 4 // a bake reports every quarter of an hour
	r.row("history of a 24-hour bake", fmt.Sprintf("about %d events (%d of a roll-out of one slice, and %d for each of %d further slices)", most+sliceEvents*(day-1), most, sliceEvents, day-1), "< 1,000")
	return nil
}

// scheduleToStart returns how long each task of a history waited for somebody to take it.
func scheduleToStart(list []*history.HistoryEvent) (out []time.Duration) {
	scheduled := map[int64]time.Time{}
	for _, e := range list {
		at := e.GetEventTime().AsTime()
		switch e.GetEventType() {
		case enums.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED, enums.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED:
			scheduled[e.GetEventId()] = at
		case enums.EVENT_TYPE_ACTIVITY_TASK_STARTED:
			out = append(out, at.Sub(scheduled[e.GetActivityTaskStartedEventAttributes().GetScheduledEventId()]))
		case enums.EVENT_TYPE_WORKFLOW_TASK_STARTED:
			out = append(out, at.Sub(scheduled[e.GetWorkflowTaskStartedEventAttributes().GetScheduledEventId()]))
		default:
		}
	}
	return out
}
