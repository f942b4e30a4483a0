package store

import (
	"context"
	"errors"

	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/orrery-ml/orrery/registry"
)

// CreateKey implements registry.Keys.
func (s *Store) CreateKey(ctx context.Context, k registry.APIKey) (registry.APIKey, error) {
	if k.Name == "" || !k.Role.Valid() {
		return k, registry.Errorf(registry.Invalid, "a key needs a name and one of the roles viewer, predictor, developer, deployer, admin, approver")
	}
	err := s.change(ctx, "create key", func(t *tx) error {
		var same int64
		if err := t.Model(&keyRow{}).Where("name = ? AND revoked_at = 0", k.Name).Count(&same).Error; err != nil {
			return err
		}
		if same > 0 {
			return registry.Errorf(registry.Exists, "a key named %q exists already", k.Name)
		}
		k.CreatedAt = t.now
		row := keyRow{
			ID: k.ID, Name: k.Name, Hash: k.Hash, Role: string(k.Role), Models: encode(k.Models), CreatedAt: micros(t.now),
			CreatedBy: k.CreatedBy,
		}
		if err := t.Create(&row).Error; errors.Is(err, gorm.ErrDuplicatedKey) {
			return registry.Errorf(registry.Exists, "key %q was created at the same moment", k.Name)
		} else if err != nil {
			return err
		}
		_, err := t.emit(registry.Event{Type: registry.KeyChanged, Actor: k.CreatedBy}, map[string]string{"id": k.ID, "name": k.Name, "role": string(k.Role)})
		return err
	})
	return k, err
}

// KeyByHash implements registry.Keys.
func (s *Store) KeyByHash(ctx context.Context, hash string) (registry.APIKey, error) {
	var row keyRow
	err := s.read.WithContext(ctx).Where("hash = ? AND revoked_at = 0", hash).Take(&row).Error
	if errors.Is(err, gorm.ErrRecordNotFound) {
		return registry.APIKey{}, registry.Errorf(registry.Unauthenticated, "the API key is not known or was revoked")
	}
	if err != nil {
		return registry.APIKey{}, fault("look up a key", err)
	}
	return row.key()
}

// ListKeys implements registry.Keys.
func (s *Store) ListKeys(ctx context.Context) ([]registry.APIKey, error) {
	var rows []keyRow
	if err := s.read.WithContext(ctx).Order("created_at, id").Find(&rows).Error; err != nil {
		return nil, fault("list keys", err)
	}
	return convert(rows, keyRow.key)
}

// RevokeKey implements registry.Keys.
func (s *Store) RevokeKey(ctx context.Context, id, actor string) error {
	return s.change(ctx, "revoke key", func(t *tx) error {
		done := t.Model(&keyRow{}).Where("id = ? AND revoked_at = 0", id).Update("revoked_at", micros(t.now))
		if done.Error != nil {
			return done.Error
		}
		if done.RowsAffected == 0 {
			return registry.Errorf(registry.NotFound, "no key %q that is not revoked", id)
		}
		_, err := t.emit(registry.Event{Type: registry.KeyChanged, Actor: actor}, map[string]string{"id": id, "revoked_by": actor})
		return err
	})
}

// Reserve implements registry.Answers.
func (s *Store) Reserve(ctx context.Context, a registry.Idempotent) (registry.Idempotent, bool, error) {
	found, fresh := a, false
	err := s.change(ctx, "reserve an idempotency key", func(t *tx) error {
		if err := t.Where("expires < ?", micros(t.now)).Delete(&answerRow{}).Error; err != nil {
			return err
		}
		row := answerRow{Actor: a.Actor, Path: a.Path, Key: a.Key, BodyHash: a.BodyHash, Expires: micros(a.Expires)}
		done := t.Clauses(clause.OnConflict{DoNothing: true}).Create(&row)
		if done.Error != nil || done.RowsAffected == 1 {
			fresh = done.RowsAffected == 1
			return done.Error
		}
		if err := t.Where("actor = ? AND path = ? AND key = ?", a.Actor, a.Path, a.Key).Take(&row).Error; err != nil {
			return err
		}
		switch {
		case row.BodyHash != a.BodyHash:
			return registry.Errorf(registry.Conflict, "Idempotency-Key %q came with another body before", a.Key)
		case row.Status == 0:
			return registry.Errorf(registry.Conflict, "the first request with Idempotency-Key %q is still under way", a.Key)
		}
		found.Status, found.Location, found.Body = row.Status, row.Location, []byte(row.Body)
		return nil
	})
	return found, fresh, err
}

// Remember implements registry.Answers.
func (s *Store) Remember(ctx context.Context, a registry.Idempotent) error {
	query := s.db.WithContext(ctx).Where("actor = ? AND path = ? AND key = ?", a.Actor, a.Path, a.Key)
	if a.Status == 0 {
		return fault("free an idempotency key", query.Delete(&answerRow{}).Error)
	}
	err := query.Model(&answerRow{}).Updates(map[string]any{
		"status": a.Status, "location": a.Location, "body": string(a.Body), "expires": micros(a.Expires),
	}).Error
	return fault("remember an answer", err)
}
