package store

import (
	"context"
	"errors"
	"time"

	"gorm.io/gorm"

	"github.com/orrery-ml/orrery/registry"
)

// CreateWebhook implements registry.Webhooks.
func (s *Store) CreateWebhook(ctx context.Context, w registry.Webhook) (registry.Webhook, error) {
	if err := w.Validate(); err != nil {
		return w, err
	}
	err := s.change(ctx, "create webhook", func(t *tx) error {
		if err := t.Raw("SELECT value FROM counters WHERE name = 'event'").Scan(&w.Position).Error; err != nil {
			return err
		}
		w.CreatedAt = t.now
		row := webhookRow{
			ID: w.ID, URL: w.URL, Secret: w.Secret, Format: string(w.Format), Types: encode(w.Types), Models: encode(w.Models),
			Position: w.Position, CreatedAt: micros(t.now), CreatedBy: w.CreatedBy,
		}
		if err := t.Create(&row).Error; err != nil {
			return err
		}
		_, err := t.emit(registry.Event{Type: registry.WebhookChanged, Actor: w.CreatedBy}, map[string]string{"id": w.ID, "url": w.URL})
		return err
	})
	return w, err
}

// ListWebhooks implements registry.Webhooks.
func (s *Store) ListWebhooks(ctx context.Context) ([]registry.Webhook, error) {
	var rows []webhookRow
	if err := s.read.WithContext(ctx).Order("created_at, id").Find(&rows).Error; err != nil {
		return nil, fault("list webhooks", err)
	}
	return convert(rows, webhookRow.webhook)
}

// DeleteWebhook implements registry.Webhooks.
func (s *Store) DeleteWebhook(ctx context.Context, id, actor string) error {
	return s.change(ctx, "delete webhook", func(t *tx) error {
		done := t.Where("id = ?", id).Delete(&webhookRow{})
		if done.Error != nil {
			return done.Error
		}
		if done.RowsAffected == 0 {
			return registry.Errorf(registry.NotFound, "no webhook %q", id)
		}
		if err := t.Where("webhook = ?", id).Delete(&deliveryRow{}).Error; err != nil {
			return err
		}
		_, err := t.emit(registry.Event{Type: registry.WebhookChanged, Actor: actor}, map[string]string{"id": id})
		return err
	})
}

// ClaimWebhook implements registry.Webhooks.
func (s *Store) ClaimWebhook(ctx context.Context, id, owner string, lasts time.Duration) (registry.Webhook, bool, error) {
	var row webhookRow
	mine := false
	err := s.change(ctx, "claim webhook", func(t *tx) error {
		done := t.Model(&webhookRow{}).Where("id = ? AND (owner = ? OR owned_till < ?)", id, owner, micros(t.now)).
			Updates(map[string]any{"owner": owner, "owned_till": micros(t.now.Add(lasts))})
		if mine = done.RowsAffected > 0; !mine {
			return done.Error
		}
		return t.Where("id = ?", id).Take(&row).Error
	})
	if err != nil || !mine {
		return registry.Webhook{}, false, err
	}
	w, err := row.webhook()
	return w, err == nil, err
}

// AdvanceWebhook implements registry.Webhooks.
func (s *Store) AdvanceWebhook(ctx context.Context, id, owner string, from, to int64) error {
	return fault("advance webhook", s.db.WithContext(ctx).Model(&webhookRow{}).
		Where("id = ? AND owner = ? AND position = ?", id, owner, from).Update("position", to).Error)
}

// RewindWebhook implements registry.Webhooks.
func (s *Store) RewindWebhook(ctx context.Context, id string, position int64) error {
	done := s.db.WithContext(ctx).Model(&webhookRow{}).Where("id = ?", id).Update("position", position)
	if done.Error == nil && done.RowsAffected == 0 {
		return registry.Errorf(registry.NotFound, "no webhook %q", id)
	}
	return fault("rewind webhook", done.Error)
}

// AddDelivery implements registry.Webhooks.
func (s *Store) AddDelivery(ctx context.Context, d registry.Delivery) error {
	row := deliveryRow{
		Webhook: d.Webhook, Event: d.Event, Attempt: d.Attempt, At: micros(d.At), Millis: d.Millis, Status: d.Status, Error: d.Error,
		GivenUp: d.GivenUp,
	}
	return fault("add delivery", s.db.WithContext(ctx).Create(&row).Error)
}

// Deliveries implements registry.Webhooks.
func (s *Store) Deliveries(ctx context.Context, id string, limit int) ([]registry.Delivery, error) {
	db := s.read.WithContext(ctx)
	if err := db.Where("id = ?", id).Take(&webhookRow{}).Error; errors.Is(err, gorm.ErrRecordNotFound) {
		return nil, registry.Errorf(registry.NotFound, "no webhook %q", id)
	}
	var rows []deliveryRow
	if err := db.Where("webhook = ?", id).Order("at DESC, event DESC").Limit(limit).Find(&rows).Error; err != nil {
		return nil, fault("list deliveries", err)
	}
	return convert(rows, func(r deliveryRow) (registry.Delivery, error) { return r.delivery(), nil })
}
