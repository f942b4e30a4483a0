package store

import (
	"context"
	"errors"
	"slices"

	"gorm.io/gorm"

	"github.com/orrery-ml/orrery/registry"
)

// CreateVersion implements registry.Versions.
func (s *Store) CreateVersion(ctx context.Context, v registry.Version, run registry.Run) (registry.Version, error) {
	if _, err := registry.NewManifest(v.Manifest.Files); err != nil {
		return registry.Version{}, err
	}
	var made registry.Version
	err := s.change(ctx, "create a version of "+v.Model, func(t *tx) error {
		owner, err := t.lockModel(v.Model)
		if err != nil {
			return err
		}
		owner.LastVersion++
		row := versionRow{
			Model: v.Model, Number: owner.LastVersion, Status: string(registry.Pending), Digest: v.Manifest.Digest(),
			Manifest: encode(v.Manifest), Derived: encode(registry.Derived{Documents: v.Documents}), Description: v.Description,
			RunID: run.ID, CreatedAt: micros(t.now), CreatedBy: v.CreatedBy,
		}
		if err := errors.Join(t.Model(&owner).Update("last_version", owner.LastVersion).Error, t.Create(&row).Error); err != nil {
			return err
		}
		if run.ID != "" {
			run.Version = row.Number
			if _, err := t.insertRun(run); err != nil {
				return err
			}
		}
		if made, err = row.version(); err != nil {
			return err
		}
		_, err = t.emit(registry.Event{Type: registry.VersionCreated, Model: v.Model, Version: row.Number, Run: run.ID, Actor: v.CreatedBy}, nil)
		return err
	})
	return made, err
}

// Version implements registry.Versions.
func (s *Store) Version(ctx context.Context, model string, number int) (registry.Version, error) {
	row, err := readVersion(s.read.WithContext(ctx), model, number)
	if err != nil {
		return registry.Version{}, fault("read version", err)
	}
	return row.version()
}

// PickVersions implements registry.Versions.
func (s *Store) PickVersions(ctx context.Context, model string, numbers ...int) (map[int]registry.Version, error) {
	db := s.read.WithContext(ctx)
	var rows []versionRow
	if err := db.Where("model = ? AND number IN ?", model, numbers).Find(&rows).Error; err != nil {
		return nil, fault("read versions", err)
	}
	list, err := convert(rows, versionRow.version)
	if err != nil {
		return nil, err
	}
	found := map[int]registry.Version{}
	for _, v := range list {
		found[v.Number] = v
	}
	for _, n := range numbers {
		if _, ok := found[n]; !ok {
			_, err := readVersion(db, model, n)
			return nil, fault("read version", err)
		}
	}
	return found, nil
}

func readVersion(db *gorm.DB, model string, number int) (versionRow, error) {
	var row versionRow
	err := db.Where("model = ? AND number = ?", model, number).Take(&row).Error
	if !errors.Is(err, gorm.ErrRecordNotFound) {
		return row, err
	}
	var owner modelRow
	if err := db.Where("name = ?", model).Take(&owner).Error; errors.Is(err, gorm.ErrRecordNotFound) {
		return row, unknownModel(db, model)
	} else if err != nil {
		return row, err
	}
	return row, registry.Errorf(registry.NotFound, "model %q has no version %d; its newest is %d", model, number, owner.LastVersion)
}

// ListVersions implements registry.Versions.
func (s *Store) ListVersions(ctx context.Context, model string) ([]registry.Version, error) {
	if _, err := s.Model(ctx, model); err != nil {
		return nil, err
	}
	var rows []versionRow
	if err := s.read.WithContext(ctx).Where("model = ?", model).Order("number DESC").Find(&rows).Error; err != nil {
		return nil, fault("list versions", err)
	}
	return convert(rows, versionRow.version)
}

// FinishVersion implements registry.Versions.
func (s *Store) FinishVersion(ctx context.Context, model string, number int, d registry.Derived, reason string) (registry.Version, error) {
	status, event := registry.Ready, registry.VersionReady
	if reason != "" {
		status, event = registry.Failed, registry.VersionFailed
	}
	var made registry.Version
	err := s.change(ctx, "finish version", func(t *tx) error {
		if _, err := t.lockModel(model); err != nil {
			return err
		}
		row, err := readVersion(t.DB, model, number)
		if err != nil {
			return err
		}
		if made, err = row.version(); err != nil || made.Status == status {
			return err
		}
		if made.Status != registry.Pending {
			return registry.Errorf(registry.Precondition, "version %d of %s is %s, not %s", number, model, made.Status, registry.Pending)
		}
		row.Status, row.Reason = string(status), reason
		if status == registry.Ready {
			row.Derived, row.ReadyAt = encode(d), micros(t.now)
		}
		if err := t.Save(&row).Error; err != nil {
			return err
		}
		if made, err = row.version(); err != nil {
			return err
		}
		_, err = t.emit(registry.Event{Type: event, Model: model, Version: number, Run: row.RunID, Actor: "run/" + row.RunID}, made)
		return err
	})
	return made, err
}

// ArchiveVersion implements registry.Versions.
func (s *Store) ArchiveVersion(ctx context.Context, model string, number int, actor string) error {
	return s.change(ctx, "archive version", func(t *tx) error {
		owner, err := t.lockModel(model)
		if err != nil {
			return err
		}
		row, err := readVersion(t.DB, model, number)
		if err != nil || row.Status == string(registry.Archived) {
			return err
		}
		if row.Status == string(registry.Pending) {
			return registry.Errorf(registry.Precondition, "version %d of %s is still being registered", number, model)
		}
		if why, err := t.needs(owner, number); err != nil || why != "" {
			return errors.Join(err, conflictUnlessEmpty(model, number, why))
		}
		if err := t.Model(&row).Update("status", string(registry.Archived)).Error; err != nil {
			return err
		}
		_, err = t.emit(registry.Event{Type: registry.VersionArchived, Model: model, Version: number, Actor: actor}, nil)
		return err
	})
}

func conflictUnlessEmpty(model string, number int, why string) error {
	if why == "" {
		return nil
	}
	return registry.Errorf(registry.Conflict, "version %d of %s is needed by %s", number, model, why)
}

// needs says what keeps a version from being archived, "" for nothing.
func (t *tx) needs(owner modelRow, number int) (string, error) {
	route, err := currentRoute(t.DB, owner)
	if err != nil {
		return "", err
	}
	if slices.ContainsFunc(route.Arms, func(a registry.Arm) bool { return a.Version == number }) {
		return "the route", nil
	}
	var alias aliasRow
	if err := t.Where("model = ? AND version = ?", owner.Name, number).Limit(1).Find(&alias).Error; err != nil {
		return "", err
	}
	if alias.Name != "" {
		return "alias " + alias.Name, nil
	}
	var hold holdRow
	if err := t.Where("model = ? AND version = ? AND until > ?", owner.Name, number, micros(t.now)).Limit(1).Find(&hold).Error; err != nil {
		return "", err
	}
	if hold.Holder != "" {
		return "a hold of " + hold.Holder, nil
	}
	var run runRow
	open := []string{string(registry.RunPending), string(registry.RunRunning), string(registry.RunWaiting), string(registry.RunNeedsOperator)}
	if err := t.Where("model = ? AND version = ? AND state IN ?", owner.Name, number, open).Limit(1).Find(&run).Error; err != nil {
		return "", err
	}
	if run.ID != "" {
		return "run " + run.ID, nil
	}
	return "", nil
}
