package store

import (
	"context"
	"database/sql"
	"errors"

	"gorm.io/gorm"

	"github.com/orrery-ml/orrery/registry"
)

// Snapshot implements registry.Feed.
func (s *Store) Snapshot(ctx context.Context) (registry.Snapshot, error) {
	var snap registry.Snapshot
	err := s.read.WithContext(ctx).Transaction(func(db *gorm.DB) error {
		if err := db.Raw("SELECT value FROM counters WHERE name = 'event'").Scan(&snap.Position).Error; err != nil {
			return err
		}
		var err error
		if snap.Models, err = readModels(db); err != nil {
			return err
		}
		return readServed(db, &snap)
	}, &sql.TxOptions{Isolation: s.snapshotIsolation(), ReadOnly: true})
	return snap, fault("read a snapshot", err)
}

// snapshotIsolation is repeatable read on PostgreSQL; a SQLite transaction in WAL mode is a snapshot as it is.
func (s *Store) snapshotIsolation() sql.IsolationLevel {
	if s.read.Name() == "postgres" {
		return sql.LevelRepeatableRead
	}
	return sql.LevelDefault
}

func readServed(db *gorm.DB, snap *registry.Snapshot) error {
	var routes []routeRow
	var aliases []aliasRow
	var versions []versionRow
	var holds []holdRow
	err := errors.Join(
		presentRoutes(db).Find(&routes).Error,
		db.Order("model, name").Find(&aliases).Error,
		db.Where("status = ?", string(registry.Ready)).Order("model, number").Find(&versions).Error,
		db.Order("model, version, holder").Find(&holds).Error,
	)
	if err != nil {
		return err
	}
	if snap.Routes, err = convert(routes, routeRow.route); err != nil {
		return err
	}
	if snap.Versions, err = convert(versions, versionRow.version); err != nil {
		return err
	}
	for _, a := range aliases {
		snap.Aliases = append(snap.Aliases, a.alias())
	}
	for _, h := range holds {
		snap.Holds = append(snap.Holds, h.hold())
	}
	return nil
}

// Events implements registry.Feed.
func (s *Store) Events(ctx context.Context, after int64, limit int) ([]registry.Event, error) {
	var rows []eventRow
	if err := s.read.WithContext(ctx).Where("number > ?", after).Order("number").Limit(limit).Find(&rows).Error; err != nil {
		return nil, fault("read events", err)
	}
	return convert(rows, func(r eventRow) (registry.Event, error) { return r.event(), nil })
}
