package store

import (
	"context"
	"errors"
	"maps"
	"slices"

	"gorm.io/gorm"

	"github.com/orrery-ml/orrery/registry"
)

// SetRoute implements registry.Routes.
func (s *Store) SetRoute(ctx context.Context, c registry.RouteChange) (registry.Route, error) {
	var made registry.Route
	err := s.change(ctx, "set route of "+c.Model, func(t *tx) error {
		owner, err := t.lockModel(c.Model)
		if err != nil {
			return err
		}
		if done, err := t.routeOfChange(c); err != nil || done.Revision > 0 {
			made = done
			return err
		}
		current, err := currentRoute(t.DB, owner)
		if err != nil {
			return err
		}
		next, err := c.Next(current, t.now)
		if err != nil {
			return err
		}
		if err := t.checkArms(next, current, c.Aliases); err != nil {
			return err
		}
		made, err = t.writeRoute(owner, current, next, c)
		return err
	})
	return made, err
}

// routeOfChange returns the route a change id already made, or the zero route.
func (t *tx) routeOfChange(c registry.RouteChange) (registry.Route, error) {
	var row routeRow
	err := t.Where("change_id = ?", c.ChangeID).Take(&row).Error
	if errors.Is(err, gorm.ErrRecordNotFound) {
		return registry.Route{}, nil
	}
	if err == nil && row.Model != c.Model {
		err = registry.Errorf(registry.Conflict, "change %s was made to model %s", c.ChangeID, row.Model)
	}
	if err != nil {
		return registry.Route{}, err
	}
	return row.route()
}

// checkArms ends in NotFound or Precondition unless every version that is new in the route, or gets an alias, is READY.
func (t *tx) checkArms(next, current registry.Route, aliases map[string]int) error {
	var wanted []int
	for _, a := range next.Arms {
		if _, had := current.Arm(a.Version); !had {
			wanted = append(wanted, a.Version)
		}
	}
	for _, v := range aliases {
		if v != 0 {
			wanted = append(wanted, v)
		}
	}
	for _, number := range slices.Compact(slices.Sorted(slices.Values(wanted))) {
		row, err := readVersion(t.DB, next.Model, number)
		if err != nil {
			return err
		}
		if row.Status != string(registry.Ready) {
			return registry.Errorf(registry.Precondition, "version %d of %s is %s, not %s", number, next.Model, row.Status, registry.Ready)
		}
	}
	return nil
}

func (t *tx) writeRoute(owner modelRow, current, next registry.Route, c registry.RouteChange) (registry.Route, error) {
	moves := maps.Clone(c.Aliases)
	if moves == nil {
		moves = map[string]int{}
	}
	if next.StableVersion() != current.StableVersion() {
		moves[registry.Champion] = next.StableVersion()
	}
	_, err := t.emit(registry.Event{
		Type: registry.RouteChanged, Model: c.Model, Version: next.StableVersion(), Run: c.By, Actor: c.Actor,
	}, &next)
	if err != nil {
		return next, err
	}
	row := newRouteRow(next)
	if err := errors.Join(t.Create(&row).Error, t.Model(&owner).Update("route_revision", next.Revision).Error); err != nil {
		return next, err
	}
	for _, name := range slices.Sorted(maps.Keys(moves)) {
		if err := t.moveAlias(name, moves[name], c); err != nil {
			return next, err
		}
	}
	return next, nil
}

func (t *tx) moveAlias(name string, to int, c registry.RouteChange) error {
	var old aliasRow
	if err := t.Where("model = ? AND name = ?", c.Model, name).Limit(1).Find(&old).Error; err != nil {
		return err
	}
	if old.Version == to {
		return nil
	}
	move := registry.AliasMove{Model: c.Model, Name: name, From: old.Version, To: to, At: t.now, Actor: c.Actor, Reason: c.Reason}
	write := func() error {
		return t.Save(&aliasRow{Model: c.Model, Name: name, Version: to, UpdatedAt: micros(t.now), Actor: c.Actor}).Error
	}
	if to == 0 {
		write = func() error { return t.Delete(&old).Error }
	}
	if err := write(); err != nil {
		return err
	}
	event, err := t.emit(registry.Event{Type: registry.AliasMoved, Model: c.Model, Version: to, Run: c.By, Actor: c.Actor}, move)
	if err != nil {
		return err
	}
	return t.Create(&aliasMoveRow{
		Event: event, Model: c.Model, Name: name, FromVersion: old.Version, ToVersion: to, At: micros(t.now), Actor: c.Actor, Reason: c.Reason,
	}).Error
}

// Route implements registry.Routes.
func (s *Store) Route(ctx context.Context, model string) (registry.Route, error) {
	history, err := s.RouteHistory(ctx, model, 1)
	if err != nil {
		return registry.Route{}, err
	}
	if len(history) == 0 {
		return registry.Route{Model: model}, nil
	}
	return history[0], nil
}

// RouteHistory implements registry.Routes.
func (s *Store) RouteHistory(ctx context.Context, model string, limit int) ([]registry.Route, error) {
	var rows []routeRow
	if err := s.read.WithContext(ctx).Where("model = ?", model).Order("revision DESC").Limit(limit).Find(&rows).Error; err != nil {
		return nil, fault("read routes", err)
	}
	if len(rows) == 0 {
		if _, err := s.Model(ctx, model); err != nil {
			return nil, err
		}
	}
	return convert(rows, routeRow.route)
}

func currentRoute(db *gorm.DB, owner modelRow) (registry.Route, error) {
	if owner.RouteRevision == 0 {
		return registry.Route{Model: owner.Name}, nil
	}
	var row routeRow
	if err := db.Where("model = ? AND revision = ?", owner.Name, owner.RouteRevision).Take(&row).Error; err != nil {
		return registry.Route{}, err
	}
	return row.route()
}

// Aliases implements registry.Routes.
func (s *Store) Aliases(ctx context.Context, model string) ([]registry.Alias, error) {
	if _, err := s.Model(ctx, model); err != nil {
		return nil, err
	}
	var rows []aliasRow
	if err := s.read.WithContext(ctx).Where("model = ?", model).Order("name").Find(&rows).Error; err != nil {
		return nil, fault("list aliases", err)
	}
	return convert(rows, func(r aliasRow) (registry.Alias, error) { return r.alias(), nil })
}

// SetAlias implements registry.Routes.
func (s *Store) SetAlias(ctx context.Context, c registry.AliasChange) error {
	if c.Name == registry.Champion {
		return registry.Errorf(registry.Invalid, "alias %s follows the stable arm; change the route", registry.Champion)
	}
	if err := registry.CheckAliasName(c.Name); err != nil {
		return err
	}
	return s.change(ctx, "set alias", func(t *tx) error {
		if _, err := t.lockModel(c.Model); err != nil {
			return err
		}
		if err := t.checkArms(registry.Route{Model: c.Model}, registry.Route{}, map[string]int{c.Name: c.Version}); err != nil {
			return err
		}
		return t.moveAlias(c.Name, c.Version, registry.RouteChange{Model: c.Model, Actor: c.Actor, Reason: c.Reason})
	})
}

// AliasHistory implements registry.Routes.
func (s *Store) AliasHistory(ctx context.Context, model, name string) ([]registry.AliasMove, error) {
	if _, err := s.Model(ctx, model); err != nil {
		return nil, err
	}
	query := s.read.WithContext(ctx).Where("model = ?", model)
	if name != "" {
		query = query.Where("name = ?", name)
	}
	var rows []aliasMoveRow
	if err := query.Order("event DESC, name").Limit(1000).Find(&rows).Error; err != nil {
		return nil, fault("read alias history", err)
	}
	return convert(rows, func(r aliasMoveRow) (registry.AliasMove, error) {
		return registry.AliasMove{
			Model: r.Model, Name: r.Name, From: r.FromVersion, To: r.ToVersion, At: fromMicros(r.At), Actor: r.Actor,
			Reason: r.Reason, Event: r.Event,
		}, nil
	})
}
