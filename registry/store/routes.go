package store

import (
	"context"
	"maps"
	"slices"
	"time"

	"gorm.io/gorm"
	"gorm.io/gorm/clause"

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
		current, done, ready, err := t.routesOf(owner, c)
		if err != nil || done.Revision > 0 {
			made = done
			return err
		}
		next, err := c.Next(current, t.now)
		if err != nil {
			return err
		}
		if !ready {
			if err := t.checkArms(next, current, c.Aliases); err != nil {
				return err
			}
		}
		if c.Gated {
			if err := owner.checkGate(t.now); err != nil {
				return err
			}
		}
		if c.Hold != nil {
			if err := t.setHold(*c.Hold, c.Actor); err != nil {
				return err
			}
		}
		made, err = t.writeRoute(owner, current, next, c)
		return err
	})
	return made, err
}

// checkGate ends in Precondition when the model's policy lets no traffic move now.
func (r modelRow) checkGate(now time.Time) error {
	m, err := r.model()
	if err != nil {
		return err
	}
	if opens, why := m.Rollout.Open(now); !opens.IsZero() {
		return &registry.Error{Code: registry.Precondition, Op: "set route of " + m.Name, Err: &registry.GateClosed{Opens: opens, Why: why}}
	}
	return nil
}

// routesOf returns a model's current route, and the one that the change id made already; a route that is not there is
// the zero route. When ready all versions that the change names are known to be READY.
func (t *tx) routesOf(owner modelRow, c registry.RouteChange) (current, done registry.Route, ready bool, err error) {
	named := slices.Collect(maps.Values(c.Aliases))
	for _, a := range c.Arms {
		named = append(named, a.Version)
	}
	named = slices.Compact(slices.Sorted(slices.Values(named)))
	var rows []struct {
		Route routeRow `gorm:"embedded"`
		Ready int
	}
	count := t.Model(&versionRow{}).Select("COUNT(*)").Where("model = ? AND number IN ? AND status = ?", owner.Name, named, string(registry.Ready))
	query := t.Model(&routeRow{}).Select("routes.*, (?) AS ready", count)
	if err := query.Where("change_id = ? OR (model = ? AND revision = ?)", c.ChangeID, owner.Name, owner.RouteRevision).Find(&rows).Error; err != nil {
		return current, done, false, err
	}
	current.Model = owner.Name
	for _, row := range rows {
		route, err := row.Route.route()
		if err != nil {
			return current, done, false, err
		}
		if route.ChangeID == c.ChangeID {
			done = route
		}
		if route.Model == owner.Name && route.Revision == owner.RouteRevision {
			current = route
		}
		ready = row.Ready == len(named)
	}
	if done.Revision > 0 && done.Model != c.Model {
		return current, done, ready, registry.Errorf(registry.Conflict, "change %s was made to model %s", c.ChangeID, done.Model)
	}
	return current, done, ready, nil
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
	moves, err := t.aliasMoves(c.Aliases, c)
	if err != nil {
		return next, err
	}
	if from, to := current.StableVersion(), next.StableVersion(); from != to {
		moves = append(moves, registry.AliasMove{Model: c.Model, Name: registry.Champion, From: from, To: to, At: t.now, Actor: c.Actor, Reason: c.Reason})
	}
	said := news{registry.Event{Type: registry.RouteChanged, Model: c.Model, Version: next.StableVersion(), Run: c.By, Actor: c.Actor}, next}
	insert := func(db *gorm.DB, number func(int) any) *gorm.DB {
		return db.Table(routeRow{}.TableName()).Create(routeColumns(next, number(0)))
	}
	count := func(db *gorm.DB, _ func(int) any) *gorm.DB {
		return db.Model(&owner).Update("route_revision", next.Revision)
	}
	next.Event, err = t.emitAll(append([]news{said}, newsOf(moves, c)...), append([]statement{insert, count}, writeMoves(moves, 1)...)...)
	return next, err
}

// aliasMoves returns the moves after which a model's aliases are where they are wanted, by name.
func (t *tx) aliasMoves(wanted map[string]int, c registry.RouteChange) ([]registry.AliasMove, error) {
	names := slices.Sorted(maps.Keys(wanted))
	var rows []aliasRow
	if len(names) > 0 {
		if err := t.Where("model = ? AND name IN ?", c.Model, names).Find(&rows).Error; err != nil {
			return nil, err
		}
	}
	present := map[string]int{}
	for _, r := range rows {
		present[r.Name] = r.Version
	}
	var moves []registry.AliasMove
	for _, name := range names {
		if from, to := present[name], wanted[name]; from != to {
			moves = append(moves, registry.AliasMove{Model: c.Model, Name: name, From: from, To: to, At: t.now, Actor: c.Actor, Reason: c.Reason})
		}
	}
	return moves, nil
}

func newsOf(moves []registry.AliasMove, c registry.RouteChange) []news {
	var out []news
	for _, m := range moves {
		out = append(out, news{registry.Event{Type: registry.AliasMoved, Model: m.Model, Version: m.To, Run: c.By, Actor: m.Actor}, m})
	}
	return out
}

// writeMoves makes the moves; the nth event is the first one's.
func writeMoves(moves []registry.AliasMove, nth int) (out []statement) {
	for i, m := range moves {
		alias := aliasRow{Model: m.Model, Name: m.Name, Version: m.To, UpdatedAt: micros(m.At), Actor: m.Actor}
		out = append(out, func(db *gorm.DB, _ func(int) any) *gorm.DB {
			if m.To == 0 {
				return db.Delete(&alias)
			}
			return db.Clauses(clause.OnConflict{UpdateAll: true}).Create(&alias)
		}, func(db *gorm.DB, number func(int) any) *gorm.DB {
			return db.Table(aliasMoveRow{}.TableName()).Create(map[string]any{
				"event": number(nth + i), "model": m.Model, "name": m.Name, "from_version": m.From, "to_version": m.To, "at": micros(m.At),
				"actor": m.Actor, "reason": m.Reason,
			})
		})
	}
	return out
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

// presentRoutes selects every model's route, by model.
func presentRoutes(db *gorm.DB) *gorm.DB {
	return db.Model(&routeRow{}).Joins("JOIN models ON models.name = routes.model AND models.route_revision = routes.revision").Order("model")
}

// OwnedRoutes implements registry.Routes.
func (s *Store) OwnedRoutes(ctx context.Context) ([]registry.Route, error) {
	var rows []routeRow
	if err := presentRoutes(s.read.WithContext(ctx)).Where("owner <> ''").Find(&rows).Error; err != nil {
		return nil, fault("list owned routes", err)
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
		change := registry.RouteChange{Model: c.Model, Actor: c.Actor, Reason: c.Reason}
		moves, err := t.aliasMoves(map[string]int{c.Name: c.Version}, change)
		if err != nil || len(moves) == 0 {
			return err
		}
		_, err = t.emitAll(newsOf(moves, change), writeMoves(moves, 0)...)
		return err
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
