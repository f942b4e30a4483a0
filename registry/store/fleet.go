package store

import (
	"context"
	"time"

	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/orrery-ml/orrery/registry"
)

// PutLease implements registry.Fleet.
func (s *Store) PutLease(ctx context.Context, l registry.Lease) error {
	row := leaseRow{
		ID: l.ID, Kind: string(l.Kind), Node: l.Node, Address: l.Address, Applied: l.Applied, Sealed: micros(l.Sealed),
		StartedAt: micros(l.StartedAt), Expires: micros(l.Expires), Worker: encode(l.Worker),
	}
	forward := clause.Assignments(map[string]any{
		"address": row.Address, "expires": row.Expires, "worker": row.Worker,
		"applied": gorm.Expr("CASE WHEN leases.applied > ? THEN leases.applied ELSE ? END", row.Applied, row.Applied),
		"sealed":  gorm.Expr("CASE WHEN leases.sealed > ? THEN leases.sealed ELSE ? END", row.Sealed, row.Sealed),
	})
	err := s.db.WithContext(ctx).Clauses(clause.OnConflict{Columns: []clause.Column{{Name: "id"}}, DoUpdates: forward}).Create(&row).Error
	return fault("renew lease "+l.ID, err)
}

// DropLease implements registry.Fleet.
func (s *Store) DropLease(ctx context.Context, id string) error {
	return fault("drop lease "+id, s.db.WithContext(ctx).Where("id = ?", id).Delete(&leaseRow{}).Error)
}

// Leases implements registry.Fleet.
func (s *Store) Leases(ctx context.Context, kind registry.LeaseKind, after time.Time) ([]registry.Lease, error) {
	var rows []leaseRow
	if err := s.read.WithContext(ctx).Where("kind = ? AND expires > ?", string(kind), micros(after)).Order("node, id").Find(&rows).Error; err != nil {
		return nil, fault("list leases", err)
	}
	return convert(rows, func(r leaseRow) (registry.Lease, error) { return r.lease(&s.states) })
}

// SetHold implements registry.Fleet.
func (s *Store) SetHold(ctx context.Context, h registry.Hold, actor string) error {
	return s.change(ctx, "set hold", func(t *tx) error { return t.setHold(h, actor) })
}

func (t *tx) setHold(h registry.Hold, actor string) error {
	if _, err := readVersion(t.DB, h.Model, h.Version); err != nil {
		return err
	}
	row := holdRow{Model: h.Model, Version: h.Version, Holder: h.Holder, Until: micros(h.Until)}
	var err error
	if h.Until.After(t.now) {
		err = t.Save(&row).Error
	} else {
		err = t.Delete(&row).Error
	}
	if err != nil {
		return err
	}
	_, err = t.emit(registry.Event{Type: registry.HoldChanged, Model: h.Model, Version: h.Version, Actor: actor}, h)
	return err
}

// Holds implements registry.Fleet.
func (s *Store) Holds(ctx context.Context, at time.Time) ([]registry.Hold, error) {
	var rows []holdRow
	if err := s.read.WithContext(ctx).Where("until > ?", micros(at)).Order("model, version, holder").Find(&rows).Error; err != nil {
		return nil, fault("list holds", err)
	}
	return convert(rows, func(r holdRow) (registry.Hold, error) { return r.hold(), nil })
}
