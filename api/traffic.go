package api

import (
	"context"
	"time"

	"github.com/google/uuid"

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
			s.tell(ctx, model, workflows.RouteMovedSignal, workflows.Decision{Actor: c.Actor, Reason: c.Reason})
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

// tell signals a model's roll-out, if there is one. It looks by itself too, so this is best effort.
func (s *Server) tell(ctx context.Context, model, signal string, what any) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	s.told.Go(func() {
		defer cancel()
		if err := s.temporal.SignalWorkflow(ctx, workflows.RolloutID(model), "", signal, what); err != nil {
			s.log.Debug("no roll-out was told", "signal", signal, "model", model, "error", err)
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
