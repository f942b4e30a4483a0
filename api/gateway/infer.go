package gateway

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/internal/telemetry"
	"github.com/orrery-ml/orrery/registry"
)

// stickyParameter is the request parameter that carries the sticky key where no header can.
const stickyParameter = "orrery_key"

// Traffic is one answered request, for the recorder.
type Traffic struct {
	Model    registry.Model
	Version  int
	Role     registry.Role
	Revision int64
	At       time.Time
	Took     time.Duration
	Request  *inference.ModelInferRequest
	Response *inference.ModelInferResponse
}

func withTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// ModelInfer implements the protocol: the route picks the version unless the request pins one.
func (s *Service) ModelInfer(ctx context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	g := s.g
	m, pinned, err := g.resolve(r.GetModelName(), r.GetModelVersion())
	if err != nil {
		return nil, fault(err)
	}
	if _, err := oip.RawInputs(r); err != nil { // malformed for every version, so no arm's error
		return nil, fault(registry.Errorf(registry.Invalid, "%w", err))
	}
	ctx, cancel, err := oip.WithDeadline(ctx, r, time.Duration(m.model.Config.TimeoutMillis)*time.Millisecond)
	if err != nil {
		return nil, fault(registry.Errorf(registry.Invalid, "%w", err))
	}
	defer cancel()
	arm := registry.Arm{Version: pinned}
	key := ""
	if pinned == 0 {
		key = stickyKey(ctx, r, m.model.Config.StickyHeader)
		var ok bool
		if arm, ok = pickArm(m.route, key); !ok {
			return nil, fault(registry.Errorf(registry.Unavailable, "model %q serves nothing yet: set a route", m.model.Name))
		}
	}
	began := time.Now()
	if pinned != 0 && !m.leased(pinned, began) {
		g.want(m.model.Name, pinned) // its keep-alive begins anew
	}
	ctx, span := g.trace.Start(ctx, "gateway.infer", m.model.Name)
	span.Set("version", int64(arm.Version))
	span.Set("revision", m.route.Revision)
	a, err := g.forward(ctx, m, arm, key, r)
	span.End(err)
	if pinned == 0 {
		g.mirror(ctx, m, key, r, a, err)
	}
	if err != nil {
		return nil, err
	}
	a.ModelName = r.GetModelName()
	if a.GetId() == "" { // labels are joined by it
		a.Id = uuid.NewString()
	}
	if pinned == 0 {
		if a.Parameters == nil {
			a.Parameters = map[string]*inference.InferParameter{}
		}
		a.Parameters[oip.RevisionParameter] = &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: m.route.Revision}}
		g.recorder.Record(Traffic{
			Model: m.model, Version: arm.Version, Role: arm.Role, Revision: m.route.Revision, At: began, Took: time.Since(began),
			Request: r, Response: a,
		})
	}
	return a, nil
}

func stickyKey(ctx context.Context, r *inference.ModelInferRequest, header string) string {
	if p, ok := r.GetParameters()[stickyParameter]; ok {
		return p.GetStringParam()
	}
	if v := metadata.ValueFromIncomingContext(ctx, header); header != "" && len(v) > 0 {
		return v[0]
	}
	return ""
}

// forward sends the request to a worker that has the version, and once more to another one when the first could not be
// reached. Every attempt is counted against its arm.
func (g *Gateway) forward(ctx context.Context, m served, arm registry.Arm, key string, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	out := &inference.ModelInferRequest{
		ModelName: m.model.Name, ModelVersion: strconv.Itoa(arm.Version), Id: r.GetId(), Parameters: r.GetParameters(),
		Inputs: r.GetInputs(), Outputs: r.GetOutputs(), RawInputContents: r.GetRawInputContents(),
	}
	w, err := g.awaitWorker(ctx, m.model.Name, arm.Version, nil)
	if err != nil {
		g.count(m, attempt{route: m.route, arm: arm, key: key}, err, nil)
		return nil, fault(err)
	}
	a, err := g.attempt(ctx, w, m, attempt{route: m.route, arm: arm, key: key}, out)
	if !retryable(ctx, err) {
		return a, err
	}
	w.failed(time.Now())
	other, _ := g.fleet.pick(m.model.Name, arm.Version, w)
	if other == nil {
		return nil, err
	}
	g.metrics.retries.Inc()
	return g.attempt(ctx, other, m, attempt{route: m.route, arm: arm, key: key, again: true}, out)
}

// retryable says that the worker could not be reached or went away, so that another may answer.
func retryable(ctx context.Context, err error) bool {
	return status.Code(err) == codes.Unavailable && ctx.Err() == nil
}

func (g *Gateway) attempt(ctx context.Context, w *attached, m served, t attempt, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	w.inflight.Add(1)
	defer w.inflight.Add(-1)
	began := time.Now()
	ctx, span := g.trace.Start(ctx, "gateway.attempt", m.model.Name)
	a, err := w.client.ModelInfer(outgoing(ctx), r)
	if status.Code(err) == codes.Canceled && ctx.Err() == nil { // not the caller: the connection was given up
		err = status.Errorf(codes.Unavailable, "worker %s went away: %s", w.node, status.Convert(err).Message())
	}
	span.End(err)
	if err == nil {
		w.answered()
	}
	t.took = time.Since(began)
	g.count(m, t, err, a)
	return a, err
}

// outgoing passes on what a worker needs of the caller's metadata.
func outgoing(ctx context.Context) context.Context {
	md := metadata.MD{}
	if oip.WantsTiming(ctx) {
		md.Set(oip.TimingHeader, "1")
	}
	telemetry.Inject(ctx, md)
	if len(md) == 0 {
		return ctx
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// count puts an attempt into its stratum and into the metrics. Pinned requests belong to no arm: they are in the
// metrics only.
func (g *Gateway) count(m served, t attempt, err error, a *inference.ModelInferResponse) {
	t.code = status.Code(fault(err))
	if err == nil {
		t.code = codes.OK
	}
	g.metrics.observe(m.model.Name, strconv.Itoa(t.arm.Version), string(t.arm.Role), t.code.String(), t.took, err == nil)
	if t.arm.Role == "" {
		return
	}
	t.notFinite = !finite(a)
	if len(m.route.Arms) > 1 && t.arm.Role != registry.Shadow {
		t.outputs = outputKeys(a)
	}
	g.counter.count(t)
}

func finite(a *inference.ModelInferResponse) bool {
	for i, o := range a.GetOutputs() {
		if i < len(a.GetRawOutputContents()) && !oip.Finite(o.GetDatatype(), a.GetRawOutputContents()[i]) {
			return false
		}
	}
	return true
}

// awaitWorker returns a worker that has the version ready, waiting for one until ctx ends.
func (g *Gateway) awaitWorker(ctx context.Context, model string, version int, except *attached) (*attached, error) {
	for asked := false; ; asked = true {
		changed := g.fleet.watch()
		w, why := g.fleet.pick(model, version, except)
		if w != nil {
			return w, nil
		}
		if !asked && g.want(model, version) {
			g.fleet.ring(model)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, notReady(ctx, model, version, why, len(g.fleet.with("", 0)))
		}
	}
}

func notReady(ctx context.Context, model string, version int, why string, workers int) error {
	if context.Cause(ctx) == context.Canceled { //nolint:errorlint // the cause is the sentinel itself
		return ctx.Err()
	}
	reason := "it is still being loaded"
	switch {
	case workers == 0:
		reason = "no worker is attached"
	case why != "":
		reason = why
	}
	return registry.Errorf(registry.Unavailable, "version %d of %s is not ready on any worker: %s", version, model, reason)
}

// lowestPriority is that of mirrored requests: they never make a caller's wait.
const lowestPriority = math.MaxInt32

// mirror sends the request to the shadow arms without making anybody wait, and compares their answers with the one the
// caller got. What the caller cancelled, or was shed, is not mirrored.
func (g *Gateway) mirror(ctx context.Context, m served, key string, r *inference.ModelInferRequest, answer *inference.ModelInferResponse, failure error) {
	if code := status.Code(failure); code == codes.Canceled || code == codes.ResourceExhausted {
		return
	}
	for _, arm := range m.route.Arms {
		if arm.Role != registry.Shadow || rand.IntN(registry.FullWeight) >= arm.Weight { //nolint:gosec // sampling
			continue
		}
		select {
		case g.mirrors <- struct{}{}:
		default:
			g.metrics.mirrors.WithLabelValues(m.model.Name, "dropped").Inc()
			continue
		}
		outputs, raw := answer.GetOutputs(), answer.GetRawOutputContents()
		g.mirrored.Go(func() {
			defer func() { <-g.mirrors }()
			limit := time.Duration(m.model.Config.TimeoutMillis) * time.Millisecond
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
			defer cancel()
			result := "sent"
			copied := &inference.ModelInferRequest{
				Id: r.GetId(), Inputs: r.GetInputs(), Outputs: r.GetOutputs(), RawInputContents: r.GetRawInputContents(),
				Parameters: map[string]*inference.InferParameter{oip.PriorityParameter: {ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: lowestPriority}}},
			}
			a, err := g.forward(ctx, m, arm, "", copied)
			if err != nil {
				result = fmt.Sprintf("failed_%s", status.Code(err))
			}
			g.metrics.mirrors.WithLabelValues(m.model.Name, result).Inc()
			if code := status.Code(err); code == codes.Canceled || code == codes.ResourceExhausted {
				return
			}
			gap := 0.0
			if failure == nil && err == nil {
				gap = answerGap(&inference.ModelInferResponse{Outputs: outputs, RawOutputContents: raw}, a)
			}
			g.counter.pair(m.route, arm, key, failure != nil, err != nil, gap)
		})
	}
}

// Feedback counts callers' values of a model's business metric, each against the arm that the route gives its caller.
// It ends in NotFound or Invalid, and returns how many values counted: a caller's first in a roll-out does.
func (g *Gateway) Feedback(model string, values map[string]float64) (int, error) {
	m, _, err := g.table.Load().find(model)
	if err != nil {
		return 0, err
	}
	counted := 0
	for key, v := range values {
		if key == "" || math.IsNaN(v) || math.IsInf(v, 0) {
			return counted, registry.Errorf(registry.Invalid, "feedback needs a caller's key and a finite value")
		}
		if arm, ok := pickArm(m.route, key); ok && g.counter.feedback(m.route, arm, key, v) {
			counted++
		}
	}
	return counted, nil
}
