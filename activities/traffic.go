package activities

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

const (
	pollFirst   = time.Millisecond      // while waiting for gateways and workers; later a quarter of what was waited
	pollLast    = 50 * time.Millisecond //
	fleetFresh  = time.Millisecond / 2  // leases read by one activity serve the others for as long
	fastestBake = 250 * time.Millisecond
	slowestBake = 2 * time.Second
	bakeSpacing = 4 * time.Millisecond // times the bakes under way
	denseNotes  = 10 * time.Minute     // evidence is stored every few seconds for as long, and at every verdict
	denseEvery  = 5 * time.Second
	sparseEvery = time.Minute
	bakeSlice   = 15 * time.Minute // a bake reports back to its workflow this often: a day is some 600 events
)

// trafficStore is the part of the registry that roll-outs work on.
type trafficStore interface {
	registry.Versions
	registry.Routes
	registry.Runs
	registry.Fleet
	registry.EvidenceLog
	Model(ctx context.Context, name string) (registry.Model, error)
}

// Traffic moves models' traffic and watches what comes of it.
type Traffic struct {
	store    trafficStore
	objects  registry.Objects // records and labels
	gateways leaseCache
	workers  leaseCache
	baking   atomic.Int64
}

// NewTraffic makes the activities.
func NewTraffic(s trafficStore, o registry.Objects) *Traffic {
	return &Traffic{store: s, objects: o, gateways: leaseCache{store: s, kind: registry.GatewayLease}, workers: leaseCache{store: s, kind: registry.WorkerLease}}
}

// leaseCache reads leases once for all activities that ask at about the same time.
type leaseCache struct {
	store trafficStore
	kind  registry.LeaseKind

	mu    sync.Mutex
	at    time.Time     // of the last read
	asked int           // since the last read
	fresh time.Duration // how long the last read serves: longer when it was slow and many ask
	known []registry.Lease
}

func (c *leaseCache) get(ctx context.Context) ([]registry.Lease, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	began := time.Now()
	c.asked++
	if began.Sub(c.at) < c.fresh {
		return c.known, nil
	}
	leases, err := c.store.Leases(ctx, c.kind, began)
	if err == nil {
		c.known, c.at = leases, time.Now()
		c.fresh = min(max(fleetFresh, time.Duration(c.asked)*c.at.Sub(began)/4), pollLast)
		c.asked = 0
	}
	return leases, err
}

// noteAfter is how long what ends by itself must last to be worth a note in the run.
const noteAfter = 50 * time.Millisecond

// noteRun changes a run beside what the caller does meanwhile, unless the caller is done before the time is over: it
// calls the function returned when it is, which waits for a change that has begun.
func (a *Traffic) noteRun(ctx context.Context, after time.Duration, u registry.RunUpdate) (done func() error) {
	stop, noted := make(chan struct{}), make(chan error, 1)
	go func() { // ends by stop, or with ctx
		if after > 0 {
			select {
			case <-stop:
				noted <- nil
				return
			case <-time.After(after):
			}
		}
		_, err := a.store.UpdateRun(ctx, u)
		noted <- err
	}()
	return func() error {
		close(stop)
		return <-noted
	}
}

// ShiftInput is one change of a model's route, and what to wait for before and after.
type ShiftInput struct {
	RunID    string         `json:"run_id"`
	Step     string         `json:"step"` // the change id is {run id}/{step}
	Phase    string         `json:"phase"`
	Progress float64        `json:"progress"`
	Model    string         `json:"model"`
	Expected int64          `json:"expected"`
	Arms     []registry.Arm `json:"arms"`
	Owned    bool           `json:"owned"`
	Salt     string         `json:"salt,omitempty"`
	Actor    string         `json:"actor"`
	Reason   string         `json:"reason"`
	Hold     *HoldInput     `json:"hold,omitempty"`  // a version that the change takes off the route, and that stays warm
	Gated    bool           `json:"gated,omitempty"` // leave the route as it is when the model's policy does not let traffic move now
	Ready    []int          `json:"ready,omitempty"` // wait until these versions are warm on every worker that should hold them
}

// ShiftResult is the route that was made.
type ShiftResult struct {
	Revision int64     `json:"revision"`
	At       time.Time `json:"at"`
	Gate     Gate      `json:"gate,omitzero"` // when it is closed nothing was done
}

// ShiftTraffic sets the route and returns once every leased gateway has applied it and, when asked, a version is warm.
// It ends in Conflict when the route is no longer the expected one.
func (a *Traffic) ShiftTraffic(ctx context.Context, in ShiftInput) (ShiftResult, error) {
	after := time.Duration(0)
	if !in.Owned { // a promotion: the run's end follows at once
		after = noteAfter
	}
	noted := a.noteRun(ctx, after, registry.RunUpdate{ID: in.RunID, State: registry.RunRunning, Phase: &in.Phase, Progress: &in.Progress})
	out, err := a.shift(ctx, in)
	return out, Fault(errors.Join(err, noted()))
}

func (a *Traffic) shift(ctx context.Context, in ShiftInput) (ShiftResult, error) {
	change := registry.RouteChange{
		ChangeID: in.RunID + "/" + in.Step, Model: in.Model, Expected: in.Expected, Arms: in.Arms, Salt: in.Salt, By: in.RunID,
		Actor: in.Actor, Reason: in.Reason, Gated: in.Gated,
	}
	if in.Owned {
		change.Owner = in.RunID
	}
	if in.Hold != nil {
		hold := in.Hold.hold(time.Now())
		change.Hold = &hold
	}
	route, err := a.store.SetRoute(ctx, change)
	if closed, ok := errors.AsType[*registry.GateClosed](err); ok {
		return ShiftResult{Gate: Gate{closed.Opens, closed.Why}}, nil
	}
	if err != nil {
		return ShiftResult{}, err
	}
	if err := a.awaitWarm(ctx, in.Model, in.Ready); err != nil { // first, for it gives gateways the time that they need
		return ShiftResult{}, err
	}
	if err := a.awaitApplied(ctx, route.Event, in.RunID, in.Phase); err != nil {
		return ShiftResult{}, err
	}
	return ShiftResult{Revision: route.Revision, At: route.At}, nil
}

// tellAfter is how long a route may be on its way to the gateways before the run says for which it waits.
const tellAfter = 2 * time.Second

// awaitApplied returns once every gateway with a lease has applied the event. When that takes long the run, which is in
// the phase, says for which it waits.
func (a *Traffic) awaitApplied(ctx context.Context, event int64, run, phase string) error {
	began, told := time.Now(), phase
	return poll(ctx, func() (bool, error) {
		leases, err := a.gateways.get(ctx)
		if err != nil {
			return false, err
		}
		late, says := registry.Behind(leases, event), phase
		if len(late) > 0 && time.Since(began) > tellAfter {
			says += ", waiting for gateway " + nodes(late)
		}
		if says != told {
			if _, err := a.store.UpdateRun(ctx, registry.RunUpdate{ID: run, Phase: &says}); err == nil {
				told = says
			}
		}
		return len(late) == 0, nil
	})
}

// nodes names where leases are held, a few of them.
func nodes(leases []registry.Lease) string {
	const few = 3
	var names []string
	for _, l := range leases[:min(few, len(leases))] {
		names = append(names, l.Node)
	}
	if more := len(leases) - few; more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// awaitWarm returns once the versions are warm.
func (a *Traffic) awaitWarm(ctx context.Context, name string, versions []int) error {
	if len(versions) == 0 {
		return nil
	}
	model, err := a.store.Model(ctx, name)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if err := poll(ctx, func() (bool, error) { return a.isWarm(ctx, model, v) }); err != nil {
			return err
		}
	}
	return nil
}

// isWarm says whether a version is loaded on as many workers as the model's serving config asks for, of those that have
// its labels. It ends in Precondition when a worker says that it cannot load it.
func (a *Traffic) isWarm(ctx context.Context, m registry.Model, version int) (bool, error) {
	leases, err := a.workers.get(ctx)
	if err != nil {
		return false, err
	}
	able, warm := 0, 0
	for _, l := range leases {
		if !l.Worker.Has(m.Config.WorkerLabels) {
			continue
		}
		able++
		i := slices.IndexFunc(l.Worker.Loaded, func(v registry.LoadedVersion) bool { return v.Model == m.Name && v.Version == version })
		if i < 0 {
			continue
		}
		if loaded := l.Worker.Loaded[i]; loaded.State == registry.Loaded {
			warm++
		} else if loaded.Error != "" {
			return false, registry.Errorf(registry.Precondition, "worker %s cannot load version %d: %s", l.Node, version, loaded.Error)
		}
	}
	need := able
	if m.Config.Replicas > 0 {
		need = min(need, m.Config.Replicas)
	}
	return warm >= need && need > 0, nil
}

// poll calls ok until it says true, the first time after a moment. It heartbeats when that takes longer than usual, for a
// heartbeat is a write that the activity's result waits for.
func poll(ctx context.Context, ok func() (bool, error)) error {
	for began := time.Now(); ; {
		waited := time.Since(began)
		if waited > time.Second {
			activity.RecordHeartbeat(ctx)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(max(waited/4, pollFirst), pollLast)):
		}
		if done, err := ok(); err != nil || done {
			return err
		}
	}
}

// RestoreInput undoes a run's last own change of the route.
type RestoreInput struct {
	RunID    string         `json:"run_id"`
	Step     string         `json:"step"`
	Model    string         `json:"model"`
	Arms     []registry.Arm `json:"arms"`
	Actor    string         `json:"actor"`
	Reason   string         `json:"reason"`
	Revision int64          `json:"revision"` // our last
	Phase    string         `json:"phase"`    // of the run meanwhile
}

// RestoreRoute puts the arms back if the route is still the one the run made; otherwise it ends in Conflict and
// touches nothing. A change whose acknowledgement was lost is found by its id.
func (a *Traffic) RestoreRoute(ctx context.Context, in RestoreInput) (ShiftResult, error) {
	noted := a.noteRun(ctx, noteAfter, registry.RunUpdate{ID: in.RunID, State: registry.RunRunning, Phase: &in.Phase})
	out, err := a.restore(ctx, in)
	return out, Fault(errors.Join(err, noted()))
}

func (a *Traffic) restore(ctx context.Context, in RestoreInput) (ShiftResult, error) {
	current, err := a.store.Route(ctx, in.Model)
	if err != nil {
		return ShiftResult{}, err
	}
	change := in.RunID + "/" + in.Step
	if current.Revision != in.Revision && !strings.HasPrefix(current.ChangeID, in.RunID+"/") {
		return ShiftResult{}, registry.Errorf(registry.Conflict, "the route of %s was changed by %s: %s", in.Model, current.Actor, current.Reason)
	}
	route, err := a.store.SetRoute(ctx, registry.RouteChange{
		ChangeID: change, Model: in.Model, Expected: current.Revision, Arms: in.Arms, By: in.RunID, Actor: in.Actor, Reason: in.Reason,
	})
	if err != nil {
		return ShiftResult{}, err
	}
	return ShiftResult{Revision: route.Revision, At: route.At}, a.awaitApplied(ctx, route.Event, in.RunID, in.Phase)
}

// HoldInput holds a version for a run, or lets it go.
type HoldInput struct {
	RunID   string        `json:"run_id"`
	Model   string        `json:"model"`
	Version int           `json:"version"`
	For     time.Duration `json:"for"` // 0 lets go
}

// HoldVersion keeps a version loaded and out of Retention's reach.
func (a *Traffic) HoldVersion(ctx context.Context, in HoldInput) error {
	return Fault(a.store.SetHold(ctx, in.hold(time.Now()), "run/"+in.RunID))
}

func (in HoldInput) hold(now time.Time) registry.Hold {
	h := registry.Hold{Model: in.Model, Version: in.Version, Holder: in.RunID}
	if in.For > 0 {
		h.Until = now.Add(in.For)
	}
	return h
}

// BakeInput says what to watch and for how long.
type BakeInput struct {
	RunID         string              `json:"run_id"`
	Model         string              `json:"model"`
	Versions      []int               `json:"versions"`       // that are judged
	Reference     int                 `json:"reference"`      // version they are compared with; 0 = guardrails only
	FirstRevision int64               `json:"first_revision"` // of the roll-out: evidence counts from here
	Revision      int64               `json:"revision"`       // of this step
	Began         time.Time           `json:"began"`          // of the roll-out: crashes count from here
	Since         time.Time           `json:"since"`          // when this step's time began
	Seconds       int64               `json:"seconds"`        // least time
	Requests      int64               `json:"requests"`       // least requests of the versions in this step
	MaxSeconds    int64               `json:"max_seconds"`    // then it is inconclusive
	Slice         int64               `json:"slice"`          // report back after this many seconds; 0 = a quarter of an hour
	Last          bool                `json:"last"`           // the step before promotion: only a pass ends it well
	Experiment    *Experiment         `json:"experiment,omitempty"`
	Judge         monitor.JudgeConfig `json:"judge"`
}

// Moved is the verdict of a bake whose route was changed by somebody else.
const Moved monitor.Verdict = "moved"

// BakeResult is what a bake saw.
type BakeResult struct {
	Judgement monitor.Judgement `json:"judgement"`
}

// Bake judges the versions until there is a verdict: pass, rollback, inconclusive when the time is up, moved when the
// route is no longer the run's, or continue after a while so that the workflow hears of it.
func (a *Traffic) Bake(ctx context.Context, in BakeInput) (BakeResult, error) {
	c, err := a.readComparison(ctx, in.RunID)
	if err != nil {
		return BakeResult{}, Fault(err)
	}
	a.baking.Add(1)
	defer a.baking.Add(-1)
	if in.Judge.MaxLossGain > 0 { // records and labels of a long bake take a while to read
		defer keepAlive(ctx)()
	}
	slice := bakeSlice
	if in.Slice > 0 {
		slice = time.Duration(in.Slice) * time.Second
	}
	began, noted, labels := time.Now(), time.Time{}, newLabelled(a.objects)
	for {
		now := time.Now()
		j, err := a.judge(ctx, in, c, labels, now)
		if err != nil && final[registry.CodeOf(err)] {
			return BakeResult{}, Fault(err)
		}
		over := err == nil && (j.Verdict != monitor.Continue || now.Sub(began) > slice)
		if err == nil && (over || now.Sub(noted) >= noteEvery(now.Sub(in.Began))) {
			if err = a.note(ctx, in, c, j); err == nil {
				noted = now
			}
		}
		if err == nil && over {
			return BakeResult{Judgement: j}, nil
		} // a registry that is away for a moment is no verdict: look again
		activity.RecordHeartbeat(ctx, j.Reason)
		select {
		case <-ctx.Done():
			return BakeResult{}, ctx.Err()
		case <-time.After(pollBake(a.baking.Load())):
		}
	}
}

// pollBake is how often one of n bakes looks: together they read the registry at most a few hundred times a second.
func pollBake(n int64) time.Duration {
	return min(max(fastestBake, time.Duration(n)*bakeSpacing), slowestBake)
}

// noteEvery is how often evidence is stored: densely at first, so that a day's bake is a few thousand rows.
func noteEvery(age time.Duration) time.Duration {
	if age < denseNotes {
		return denseEvery
	}
	return sparseEvery
}

// note stores where the judge stands and then the evidence. What is folded after the last note is folded anew by
// whoever goes on.
func (a *Traffic) note(ctx context.Context, in BakeInput, c *comparison, j monitor.Judgement) error {
	if j.Verdict == Moved { // no judgement: the run's end says who moved it
		return nil
	}
	if err := a.writeComparison(ctx, in.RunID, c); err != nil {
		return err
	}
	now := time.Now()
	return a.store.AddEvidence(ctx, registry.Evidence{
		Run: in.RunID, Seq: int(now.UnixMilli()), At: now, Verdict: string(j.Verdict), Body: marshal(j),
	})
}
