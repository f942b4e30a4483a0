package store

import (
	"context"
	"errors"

	"gorm.io/gorm"

	"github.com/orrery-ml/orrery/registry"
)

// CreateModel implements registry.Catalog.
func (s *Store) CreateModel(ctx context.Context, m registry.Model) (registry.Model, error) {
	if err := errors.Join(registry.CheckModelName(m.Name), m.Config.Validate(), m.Retrain.Validate(), m.Rollout.Validate()); err != nil {
		return registry.Model{}, registry.Errorf(registry.Invalid, "%w", err)
	}
	var made registry.Model
	err := s.change(ctx, "create model "+m.Name, func(t *tx) error {
		row := modelRow{
			Name: m.Name, Description: m.Description, Config: encode(m.Config), ConfigRevision: 1, Retrain: encode(m.Retrain),
			Rollout:   encode(m.Rollout),
			CreatedAt: micros(t.now), CreatedBy: m.CreatedBy,
		}
		if err := t.Create(&row).Error; errors.Is(err, gorm.ErrDuplicatedKey) {
			return registry.Errorf(registry.Exists, "model %q exists already", m.Name)
		} else if err != nil {
			return err
		}
		var err error
		if made, err = row.model(); err != nil {
			return err
		}
		_, err = t.emit(registry.Event{Type: registry.ModelCreated, Model: m.Name, Actor: m.CreatedBy}, made)
		return err
	})
	return made, err
}

// Model implements registry.Catalog.
func (s *Store) Model(ctx context.Context, name string) (registry.Model, error) {
	db := s.read.WithContext(ctx)
	var row modelRow
	if err := db.Where("name = ?", name).Take(&row).Error; errors.Is(err, gorm.ErrRecordNotFound) {
		return registry.Model{}, fault("read model", unknownModel(db, name))
	} else if err != nil {
		return registry.Model{}, fault("read model "+name, err)
	}
	return row.model()
}

// Models implements registry.Catalog.
func (s *Store) Models(ctx context.Context) ([]registry.Model, error) {
	return readModels(s.read.WithContext(ctx))
}

func readModels(db *gorm.DB) ([]registry.Model, error) {
	var rows []modelRow
	if err := db.Order("name").Find(&rows).Error; err != nil {
		return nil, fault("list models", err)
	}
	return convert(rows, modelRow.model)
}

// ConfigureModel implements registry.Catalog.
func (s *Store) ConfigureModel(ctx context.Context, m registry.Model, expected int64, actor string) (registry.Model, error) {
	if err := errors.Join(m.Config.Validate(), m.Retrain.Validate(), m.Rollout.Validate()); err != nil {
		return registry.Model{}, registry.Errorf(registry.Invalid, "%w", err)
	}
	var made registry.Model
	err := s.change(ctx, "configure model "+m.Name, func(t *tx) error {
		row, err := t.lockModel(m.Name)
		if err != nil {
			return err
		}
		if row.ConfigRevision != expected {
			return registry.Errorf(registry.Conflict, "serving config of %s is at revision %d, not %d: look again", m.Name, row.ConfigRevision, expected)
		}
		row.Description, row.Config, row.Retrain, row.Rollout = m.Description, encode(m.Config), encode(m.Retrain), encode(m.Rollout)
		row.ConfigRevision = expected + 1
		if err := t.Save(&row).Error; err != nil {
			return err
		}
		if made, err = row.model(); err != nil {
			return err
		}
		_, err = t.emit(registry.Event{Type: registry.ModelConfigured, Model: m.Name, Actor: actor}, made)
		return err
	})
	return made, err
}
