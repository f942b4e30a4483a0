package store

import (
	"context"
	"errors"
	"time"

	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/orrery-ml/orrery/registry"
)

// InsertRun implements registry.Runs.
func (s *Store) InsertRun(ctx context.Context, r registry.Run) (registry.Run, error) {
	for {
		now := time.Now().UTC().Truncate(time.Microsecond)
		row := newRunRow(r, now)
		done, err := s.once(ctx, "insert run", now, row.insert, row.news())
		if done || err != nil {
			return row.run(), err
		}
		present, err := presentRun(s.read.WithContext(ctx), r)
		if err != nil || present.ID != "" {
			return present, fault("insert run", err)
		}
	}
}

func newRunRow(r registry.Run, now time.Time) runRow {
	row := runRow{
		ID: r.ID, Kind: string(r.Kind), Model: r.Model, Version: r.Version, WorkflowID: r.WorkflowID, Parent: r.Parent,
		State: string(registry.RunPending), Phase: r.Phase, Input: string(r.Input), Actor: r.Actor, CreatedAt: micros(now),
	}
	if r.Lock != "" {
		row.Lock = &r.Lock
	}
	return row
}

// insert does nothing when the run, or another one with its lock, is there.
func (r runRow) insert(db *gorm.DB, _ func(int) any) *gorm.DB {
	return db.Clauses(clause.OnConflict{DoNothing: true}).Create(&r)
}

// news says how the run is now.
func (r runRow) news() news {
	return news{registry.Event{Type: registry.RunChanged, Model: r.Model, Version: r.Version, Run: r.ID, Actor: r.Actor}, r.run()}
}

// insertRun is InsertRun as a part of a transaction.
func (t *tx) insertRun(r registry.Run) (registry.Run, error) {
	for {
		row := newRunRow(r, t.now)
		create := row.insert(t.DB, nil)
		if create.Error != nil {
			return r, create.Error
		}
		if create.RowsAffected > 0 {
			_, err := t.emitAll([]news{row.news()})
			return row.run(), err
		}
		if present, err := presentRun(t.DB, r); err != nil || present.ID != "" {
			return present, err
		}
	}
}

// presentRun says why a run could not be inserted: it is there already, or another one holds its lock, a Conflict. It
// returns the zero run when the holder ended at this moment.
func presentRun(db *gorm.DB, r registry.Run) (registry.Run, error) {
	var row runRow
	if err := db.Where("id = ?", r.ID).Limit(1).Find(&row).Error; err != nil || row.ID != "" {
		return row.run(), err
	}
	if err := db.Where("lock = ?", r.Lock).Limit(1).Find(&row).Error; err != nil || row.ID == "" {
		return registry.Run{}, err
	}
	return row.run(), registry.Errorf(registry.Conflict, "%s of %s is under way already: run %s", r.Kind, r.Model, row.ID)
}

// Run implements registry.Runs.
func (s *Store) Run(ctx context.Context, id string) (registry.Run, error) {
	var row runRow
	err := s.read.WithContext(ctx).Where("id = ?", id).Take(&row).Error
	if errors.Is(err, gorm.ErrRecordNotFound) {
		return registry.Run{}, registry.Errorf(registry.NotFound, "no run %q", id)
	}
	return row.run(), fault("read run", err)
}

// ListRuns implements registry.Runs.
func (s *Store) ListRuns(ctx context.Context, f registry.RunFilter) ([]registry.Run, error) {
	query := s.read.WithContext(ctx).Model(&runRow{})
	for column, value := range map[string]string{"kind": string(f.Kind), "model": f.Model, "state": string(f.State)} {
		if value != "" {
			query = query.Where(clause.Eq{Column: column, Value: value})
		}
	}
	if f.Open {
		query = query.Where("ended_at = 0")
	}
	if f.After != "" {
		query = query.Where("(created_at, id) < (SELECT created_at, id FROM runs WHERE id = ?)", f.After)
	}
	limit := f.Limit
	if limit <= 0 {
		limit = 100
	}
	var rows []runRow
	if err := query.Order("created_at DESC, id DESC").Limit(min(limit, 1000)).Find(&rows).Error; err != nil {
		return nil, fault("list runs", err)
	}
	return convert(rows, func(r runRow) (registry.Run, error) { return r.run(), nil })
}

// UpdateRun implements registry.Runs. What it read may have changed when it writes; then it reads again.
func (s *Store) UpdateRun(ctx context.Context, u registry.RunUpdate) (registry.Run, error) {
	for {
		var before runRow
		err := s.read.WithContext(ctx).Where("id = ?", u.ID).Take(&before).Error
		if errors.Is(err, gorm.ErrRecordNotFound) {
			return registry.Run{}, registry.Errorf(registry.NotFound, "no run %q", u.ID)
		}
		if err != nil || before.EndedAt != 0 {
			return before.run(), fault("read run", err)
		}
		now := time.Now().UTC().Truncate(time.Microsecond)
		row := before
		applyUpdate(&row, u, micros(now))
		if row == before {
			return row.run(), nil
		}
		var said []news
		if row.State != before.State || row.Phase != before.Phase {
			said = append(said, row.news())
		}
		done, err := s.once(ctx, "update run "+u.ID, now, func(db *gorm.DB, _ func(int) any) *gorm.DB {
			return db.Model(&runRow{}).Where("id = ?", u.ID).Where(before.mutable()).Updates(row.mutable())
		}, said...)
		if done || err != nil {
			return row.run(), err
		}
	}
}

// mutable are the columns that change while a run lives.
func (r runRow) mutable() map[string]any {
	return map[string]any{
		"state": r.State, "outcome": r.Outcome, "phase": r.Phase, "message": r.Message, "progress": r.Progress, "result": r.Result,
		"lock": r.Lock, "started_at": r.StartedAt, "ended_at": r.EndedAt,
	}
}

func applyUpdate(row *runRow, u registry.RunUpdate, now int64) {
	if u.State != "" {
		row.State = string(u.State)
	}
	if u.Outcome != "" {
		row.Outcome = string(u.Outcome)
	}
	if u.Phase != nil {
		row.Phase = *u.Phase
	}
	if u.Message != nil {
		row.Message = *u.Message
	}
	if u.Progress != nil {
		row.Progress = *u.Progress
	}
	if u.Result != nil {
		row.Result = string(u.Result)
	}
	if row.StartedAt == 0 && row.State != string(registry.RunPending) {
		row.StartedAt = now
	}
	if registry.RunState(row.State).Ended() {
		row.EndedAt, row.Lock = now, nil
	}
}
