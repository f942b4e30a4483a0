package store

import (
	"context"
	"errors"

	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/orrery-ml/orrery/registry"
)

// InsertRun implements registry.Runs.
func (s *Store) InsertRun(ctx context.Context, r registry.Run) (registry.Run, error) {
	var made registry.Run
	err := s.change(ctx, "insert run", func(t *tx) error {
		var err error
		made, err = t.insertRun(r)
		return err
	})
	return made, err
}

func (t *tx) insertRun(r registry.Run) (registry.Run, error) {
	row := runRow{
		ID: r.ID, Kind: string(r.Kind), Model: r.Model, Version: r.Version, WorkflowID: r.WorkflowID, Parent: r.Parent,
		State: string(registry.RunPending), Phase: r.Phase, Input: string(r.Input), Actor: r.Actor, CreatedAt: micros(t.now),
	}
	if r.Lock != "" {
		row.Lock = &r.Lock
	}
	create := t.Clauses(clause.OnConflict{DoNothing: true}).Create(&row)
	if create.Error != nil {
		return r, create.Error
	}
	if create.RowsAffected == 0 {
		return t.presentRun(r)
	}
	made := row.run()
	_, err := t.emit(registry.Event{Type: registry.RunChanged, Model: r.Model, Version: r.Version, Run: r.ID, Actor: r.Actor}, made)
	return made, err
}

// presentRun says why a run could not be inserted: it is there already, or another one holds its lock.
func (t *tx) presentRun(r registry.Run) (registry.Run, error) {
	var row runRow
	if err := t.Where("id = ?", r.ID).Limit(1).Find(&row).Error; err != nil || row.ID != "" {
		return row.run(), err
	}
	if err := t.Where("lock = ?", r.Lock).Limit(1).Find(&row).Error; err != nil {
		return r, err
	}
	if row.ID == "" { // its holder ended at this moment
		return t.insertRun(r)
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

// UpdateRun implements registry.Runs.
func (s *Store) UpdateRun(ctx context.Context, u registry.RunUpdate) (registry.Run, error) {
	var made registry.Run
	err := s.change(ctx, "update run "+u.ID, func(t *tx) error {
		var row runRow
		err := t.Clauses(clause.Locking{Strength: "UPDATE"}).Where("id = ?", u.ID).Take(&row).Error
		if errors.Is(err, gorm.ErrRecordNotFound) {
			return registry.Errorf(registry.NotFound, "no run %q", u.ID)
		}
		if err != nil || row.EndedAt != 0 {
			made = row.run()
			return err
		}
		before := row
		applyUpdate(&row, u, micros(t.now))
		made = row.run()
		if row == before {
			return nil
		}
		if err := t.Save(&row).Error; err != nil {
			return err
		}
		if row.State == before.State && row.Phase == before.Phase {
			return nil
		}
		_, err = t.emit(registry.Event{Type: registry.RunChanged, Model: row.Model, Version: row.Version, Run: row.ID, Actor: row.Actor}, made)
		return err
	})
	return made, err
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
