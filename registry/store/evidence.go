package store

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"gorm.io/gorm/clause"

	"github.com/orrery-ml/orrery/registry"
)

// FlushStrata implements registry.EvidenceLog.
func (s *Store) FlushStrata(ctx context.Context, gateway string, strata []registry.Stratum, sealed time.Time) error {
	return s.change(ctx, "flush strata", func(t *tx) error {
		if len(strata) > 0 {
			rows := make([]stratumRow, len(strata))
			for i, st := range strata {
				rows[i] = newStratumRow(st)
			}
			if err := t.Clauses(clause.OnConflict{DoNothing: true}).CreateInBatches(&rows, 200).Error; err != nil {
				return err
			}
		}
		at := micros(sealed)
		return t.Model(&leaseRow{}).Where("id = ? AND sealed < ?", gateway, at).Update("sealed", at).Error
	})
}

// Strata implements registry.EvidenceLog.
func (s *Store) Strata(ctx context.Context, f registry.StrataFilter) ([]registry.Stratum, error) {
	query := s.read.WithContext(ctx).Where("model = ? AND revision >= ? AND start >= ?", f.Model, f.MinRevision, micros(f.Since))
	if f.MaxRevision > 0 {
		query = query.Where("revision <= ?", f.MaxRevision)
	}
	if known := slices.Sorted(maps.Keys(f.From)); len(known) > 0 {
		from := s.read.Where("gateway NOT IN ?", known)
		for _, g := range known {
			from = from.Or("gateway = ? AND start >= ?", g, micros(f.From[g]))
		}
		query = query.Where(from)
	}
	var rows []stratumRow
	if err := query.Order("start, gateway, version, revision").Find(&rows).Error; err != nil {
		return nil, fault("read strata", err)
	}
	return convert(rows, stratumRow.stratum)
}

// DeleteStrata removes strata that began before the given time, with the tallies of runs that had ended and the
// deliveries of then, and returns how many strata.
func (s *Store) DeleteStrata(ctx context.Context, before time.Time) (int64, error) {
	db := s.db.WithContext(ctx)
	err := errors.Join(
		db.Where("run IN (SELECT id FROM runs WHERE ended_at > 0 AND ended_at < ?)", micros(before)).Delete(&tallyRow{}).Error,
		db.Where("at < ?", micros(before)).Delete(&deliveryRow{}).Error,
	)
	if err != nil {
		return 0, fault("delete tallies and deliveries", err)
	}
	done := db.Where("start < ?", micros(before)).Delete(&stratumRow{})
	return done.RowsAffected, fault("delete strata", done.Error)
}

// PutTally implements registry.EvidenceLog.
func (s *Store) PutTally(ctx context.Context, t registry.Tally) error {
	row := tallyRow{Run: t.Run, Body: string(t.Body)}
	return fault("put tally", s.db.WithContext(ctx).Clauses(clause.OnConflict{UpdateAll: true}).Create(&row).Error)
}

// Tally implements registry.EvidenceLog.
func (s *Store) Tally(ctx context.Context, run string) (registry.Tally, error) {
	var row tallyRow
	err := s.read.WithContext(ctx).Where("run = ?", run).Limit(1).Find(&row).Error
	return registry.Tally{Run: run, Body: []byte(row.Body)}, fault("read tally", err)
}

// AddEvidence implements registry.EvidenceLog.
func (s *Store) AddEvidence(ctx context.Context, e registry.Evidence) error {
	row := evidenceRow{Run: e.Run, Seq: e.Seq, At: micros(e.At), Verdict: e.Verdict, Body: string(e.Body)}
	return fault("add evidence", s.db.WithContext(ctx).Clauses(clause.OnConflict{DoNothing: true}).Create(&row).Error)
}

// ListEvidence implements registry.EvidenceLog.
func (s *Store) ListEvidence(ctx context.Context, run string) ([]registry.Evidence, error) {
	var rows []evidenceRow
	if err := s.read.WithContext(ctx).Where("run = ?", run).Order("seq").Find(&rows).Error; err != nil {
		return nil, fault("read evidence", err)
	}
	return convert(rows, func(r evidenceRow) (registry.Evidence, error) {
		return registry.Evidence{Run: r.Run, Seq: r.Seq, At: fromMicros(r.At), Verdict: r.Verdict, Body: []byte(r.Body)}, nil
	})
}
