package api

import (
	"context"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// GetRoute implements the API.
func (s *Server) GetRoute(ctx context.Context, r GetRouteRequestObject) (GetRouteResponseObject, error) {
	route, err := s.store.Route(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	return GetRoute200JSONResponse(route), nil
}

// ListRoutes implements the API.
func (s *Server) ListRoutes(ctx context.Context, r ListRoutesRequestObject) (ListRoutesResponseObject, error) {
	list, err := s.store.RouteHistory(ctx, r.Model, 200)
	if err != nil {
		return nil, err
	}
	return ListRoutes200JSONResponse(list), nil
}

// SetRoute implements the API.
func (s *Server) SetRoute(ctx context.Context, r SetRouteRequestObject) (SetRouteResponseObject, error) {
	route, err := s.moveAll(ctx, r.Model, func(history []registry.Route) (registry.RouteChange, error) {
		c := registry.RouteChange{Arms: registry.StableOnly(r.Body.Version), Take: value(r.Body.Take), Reason: r.Body.Reason}
		if len(history) > 0 {
			c.Expected = history[0].Revision
		}
		if v := value(r.Body.Revision); v != 0 {
			c.Expected = v
		}
		return c, nil
	})
	if err != nil {
		return nil, err
	}
	return SetRoute200JSONResponse(route), nil
}

// Rollback implements the API.
func (s *Server) Rollback(ctx context.Context, r RollbackRequestObject) (RollbackResponseObject, error) {
	route, err := s.moveAll(ctx, r.Model, func(history []registry.Route) (registry.RouteChange, error) {
		arms, err := registry.BackFrom(history)
		if err != nil {
			return registry.RouteChange{}, err
		}
		return registry.RouteChange{Expected: history[0].Revision, Arms: arms, Take: true, Reason: "rollback: " + value(r.Body.Reason)}, nil
	})
	if err != nil {
		return nil, err
	}
	return Rollback200JSONResponse(route), nil
}

// moveAll changes a route by hand, in this request, and tells the run that owned it. A race with another change is
// decided anew a few times.
func (s *Server) moveAll(ctx context.Context, model string, decide func([]registry.Route) (registry.RouteChange, error)) (registry.Route, error) {
	for attempt := 0; ; attempt++ {
		history, err := s.store.RouteHistory(ctx, model, 200)
		if err != nil {
			return registry.Route{}, err
		}
		c, err := decide(history)
		if err != nil {
			return registry.Route{}, err
		}
		c.Model, c.Actor, c.ChangeID = model, actor(ctx), "hand/"+uuid.NewString()
		made, err := s.store.SetRoute(ctx, c)
		if registry.CodeOf(err) == registry.Conflict && attempt < 5 && (c.Take || s.movedOn(ctx, history, c)) {
			continue
		}
		if err != nil {
			return made, err
		}
		if len(history) > 0 && history[0].Owner != "" {
			s.tell(ctx, model, workflows.Decision{Actor: c.Actor, Reason: c.Reason})
		}
		s.awaitApplied(ctx, made.Event)
		return made, nil
	}
}

// movedOn says whether a change by hand that named no revision of its own was overtaken by another one.
func (s *Server) movedOn(ctx context.Context, seen []registry.Route, c registry.RouteChange) bool {
	if len(seen) == 0 || c.Expected != seen[0].Revision {
		return false
	}
	now, err := s.store.Route(ctx, c.Model)
	return err == nil && now.Revision != c.Expected
}

// appliedLimit bounds how long an answer waits for gateways; one that does not come along is shown by its lease.
const appliedLimit = 3 * time.Second

// awaitApplied returns once every leased gateway has applied an event, so that who changed a route by hand sees the
// change in the next request, or when the limit is over.
func (s *Server) awaitApplied(ctx context.Context, event int64) {
	ctx, cancel := context.WithTimeout(ctx, appliedLimit)
	defer cancel()
	for {
		leases, err := s.store.Leases(ctx, registry.GatewayLease, time.Now())
		if err == nil && len(registry.Behind(leases, event)) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			s.log.Warn("a gateway has not applied a route yet", "event", event)
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// tell lets a roll-out know that its route was taken. It looks by itself too, so this is best effort.
func (s *Server) tell(ctx context.Context, model string, d workflows.Decision) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	s.told.Go(func() {
		defer cancel()
		if err := s.temporal.SignalWorkflow(ctx, workflows.RolloutID(model), "", workflows.RouteMovedSignal, d); err != nil {
			s.log.Info("the roll-out was not told that its route moved", "model", model, "error", err)
		}
	})
}

func aliasDTOs(list []registry.Alias) []Alias {
	out := []Alias{}
	for _, a := range list {
		out = append(out, Alias{Name: a.Name, Version: a.Version, UpdatedAt: a.UpdatedAt, Actor: a.Actor})
	}
	return out
}

// ListAliases implements the API.
func (s *Server) ListAliases(ctx context.Context, r ListAliasesRequestObject) (ListAliasesResponseObject, error) {
	list, err := s.store.Aliases(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	return ListAliases200JSONResponse(aliasDTOs(list)), nil
}

// SetAlias implements the API.
func (s *Server) SetAlias(ctx context.Context, r SetAliasRequestObject) (SetAliasResponseObject, error) {
	var err error
	if r.Alias == registry.Champion {
		_, err = s.moveAll(ctx, r.Model, func(history []registry.Route) (registry.RouteChange, error) {
			c := registry.RouteChange{Arms: registry.StableOnly(r.Body.Version), Reason: value(r.Body.Reason)}
			if len(history) > 0 {
				c.Expected = history[0].Revision
			}
			return c, nil
		})
	} else {
		err = s.store.SetAlias(ctx, registry.AliasChange{
			Model: r.Model, Name: r.Alias, Version: r.Body.Version, Actor: actor(ctx), Reason: value(r.Body.Reason),
		})
	}
	if err != nil {
		return nil, err
	}
	list, err := s.store.Aliases(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	return SetAlias200JSONResponse(aliasDTOs(list)), nil
}

// DeleteAlias implements the API.
func (s *Server) DeleteAlias(ctx context.Context, r DeleteAliasRequestObject) (DeleteAliasResponseObject, error) {
	if err := s.store.SetAlias(ctx, registry.AliasChange{Model: r.Model, Name: r.Alias, Actor: actor(ctx)}); err != nil {
		return nil, err
	}
	return DeleteAlias204Response{}, nil
}

// ListAliasMoves implements the API.
func (s *Server) ListAliasMoves(ctx context.Context, r ListAliasMovesRequestObject) (ListAliasMovesResponseObject, error) {
	list, err := s.store.AliasHistory(ctx, r.Model, r.Alias)
	if err != nil {
		return nil, err
	}
	out := ListAliasMoves200JSONResponse{}
	for _, m := range list {
		out = append(out, AliasMove{Name: m.Name, From: m.From, To: m.To, At: m.At, Actor: m.Actor, Reason: m.Reason})
	}
	return out, nil
}

// StartRollout implements the API.
func (s *Server) StartRollout(ctx context.Context, r StartRolloutRequestObject) (StartRolloutResponseObject, error) {
	steps, err := stepsOf(*r.Body)
	if err != nil {
		return nil, err
	}
	in := workflows.RolloutInput{
		RunID: newRunID(), Model: r.Model, Candidate: r.Body.Version, Steps: steps, BakeSeconds: value(r.Body.BakeSeconds),
		BakeRequests: value(r.Body.BakeRequests), MaxBakeSeconds: value(r.Body.MaxBakeSeconds), WatchSeconds: value(r.Body.WatchSeconds),
		RequireApproval: value(r.Body.RequireApproval), ApprovalSeconds: value(r.Body.ApprovalSeconds), Judge: monitor.DefaultJudge(),
		Actor: actor(ctx), Reason: value(r.Body.Reason),
	}
	if err := merge("judge", r.Body.Judge, &in.Judge); err != nil {
		return nil, err
	}
	if err := in.Judge.Validate(); err != nil {
		return nil, registry.Errorf(registry.Invalid, "judge: %w", err)
	}
	for name, n := range map[string]int64{
		"bake_seconds": in.BakeSeconds, "bake_requests": in.BakeRequests, "max_bake_seconds": in.MaxBakeSeconds,
		"watch_seconds": in.WatchSeconds, "approval_seconds": in.ApprovalSeconds,
	} {
		if n < 0 {
			return nil, registry.Errorf(registry.Invalid, "%s %d: want 0 or more", name, n)
		}
	}
	if _, err := s.store.Version(ctx, r.Model, in.Candidate); err != nil {
		return nil, err
	}
	run, err := s.insertAndStart(ctx, registry.Run{
		ID: in.RunID, Kind: registry.KindRollout, Model: r.Model, Version: in.Candidate, WorkflowID: workflows.RolloutID(r.Model),
		Lock: workflows.RolloutID(r.Model), Input: input(in), Actor: in.Actor,
	})
	if err != nil {
		return nil, err
	}
	return StartRollout202JSONResponse{accepted(s.runDTO(run))}, nil
}

// stepsOf turns a strategy into the candidate's weights in basis points.
func stepsOf(r NewRollout) ([]int, error) {
	percents := []float32{}
	strategy := NewRolloutStrategy("canary")
	if r.Strategy != nil {
		strategy = *r.Strategy
	}
	if r.Steps != nil {
		percents = *r.Steps
	}
	switch strategy {
	case "all_at_once":
		if len(percents) > 0 {
			return nil, registry.Errorf(registry.Invalid, "all_at_once has no steps")
		}
	case "canary":
		if len(percents) == 0 {
			percents = []float32{10}
		}
		if len(percents) > 1 {
			return nil, registry.Errorf(registry.Invalid, "canary has one step; use the strategy steps")
		}
	case "linear":
		size := value(r.StepPercent)
		if size <= 0 || size >= 100 {
			return nil, registry.Errorf(registry.Invalid, "step_percent %v: want between 0 and 100", size)
		}
		for p := size; p < 100; p += size {
			percents = append(percents, p)
		}
	case "steps":
		if len(percents) == 0 {
			return nil, registry.Errorf(registry.Invalid, "strategy steps needs steps, such as [1, 5, 25, 50]")
		}
	default:
		return nil, registry.Errorf(registry.Invalid, "strategy %q: want all_at_once, canary, linear or steps", strategy)
	}
	steps := make([]int, len(percents))
	for i, p := range percents {
		steps[i] = int(p*100 + 0.5)
		if steps[i] < 1 || steps[i] >= registry.FullWeight {
			return nil, registry.Errorf(registry.Invalid, "step %v %%: want at least 0.01 and less than 100", p)
		}
	}
	if !slices.IsSorted(steps) {
		return nil, registry.Errorf(registry.Invalid, "steps must ascend, got %v", percents)
	}
	return steps, nil
}
