package api

import (
	"context"
	"encoding/json"
	"time"

	"github.com/orrery-ml/orrery/api/webhook"
	"github.com/orrery-ml/orrery/registry"
)

func webhookDTO(w registry.Webhook) Webhook {
	return Webhook{
		Id: w.ID, Url: w.URL, Format: WebhookFormat(w.Format), Types: orEmpty(w.Types), Models: orEmpty(w.Models), Position: w.Position,
		CreatedAt: w.CreatedAt, CreatedBy: w.CreatedBy,
	}
}

func orEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// ListWebhooks implements the API.
func (s *Server) ListWebhooks(ctx context.Context, _ ListWebhooksRequestObject) (ListWebhooksResponseObject, error) {
	list, err := s.store.ListWebhooks(ctx)
	if err != nil {
		return nil, err
	}
	out := ListWebhooks200JSONResponse{}
	for _, w := range list {
		out = append(out, webhookDTO(w))
	}
	return out, nil
}

// CreateWebhook implements the API.
func (s *Server) CreateWebhook(ctx context.Context, r CreateWebhookRequestObject) (CreateWebhookResponseObject, error) {
	w := registry.Webhook{
		ID: newRunID(), URL: r.Body.Url, Secret: webhook.NewSecret(), Format: registry.CloudEvents, Types: value(r.Body.Types),
		Models: value(r.Body.Models), CreatedBy: actor(ctx),
	}
	if r.Body.Format != nil {
		w.Format = registry.WebhookFormat(*r.Body.Format)
	}
	made, err := s.store.CreateWebhook(ctx, w)
	if err != nil {
		return nil, err
	}
	out := webhookDTO(made)
	out.Secret = &made.Secret
	return CreateWebhook201JSONResponse(out), nil
}

// DeleteWebhook implements the API.
func (s *Server) DeleteWebhook(ctx context.Context, r DeleteWebhookRequestObject) (DeleteWebhookResponseObject, error) {
	if err := s.store.DeleteWebhook(ctx, r.Id, actor(ctx)); err != nil {
		return nil, err
	}
	return DeleteWebhook204Response{}, nil
}

// ListDeliveries implements the API.
func (s *Server) ListDeliveries(ctx context.Context, r ListDeliveriesRequestObject) (ListDeliveriesResponseObject, error) {
	limit := value(r.Params.Limit)
	if limit <= 0 || limit > 1000 {
		limit = 100
	}
	list, err := s.store.Deliveries(ctx, r.Id, limit)
	if err != nil {
		return nil, err
	}
	return ListDeliveries200JSONResponse(list), nil
}

// ReplayWebhook implements the API.
func (s *Server) ReplayWebhook(ctx context.Context, r ReplayWebhookRequestObject) (ReplayWebhookResponseObject, error) {
	if r.Body.From < 1 {
		return nil, registry.Errorf(registry.Invalid, "from %d: want the number of an event", r.Body.From)
	}
	if err := s.store.RewindWebhook(ctx, r.Id, r.Body.From-1); err != nil {
		return nil, err
	}
	return ReplayWebhook204Response{}, nil
}

// TestWebhook implements the API: one attempt, at once, with an event that is in no log.
func (s *Server) TestWebhook(ctx context.Context, r TestWebhookRequestObject) (TestWebhookResponseObject, error) {
	list, err := s.store.ListWebhooks(ctx)
	if err != nil {
		return nil, err
	}
	for _, w := range list {
		if w.ID != r.Id {
			continue
		}
		e := registry.Event{Type: "webhook.test", At: time.Now().UTC(), Actor: actor(ctx), Data: json.RawMessage(`{}`)}
		body, ok := webhook.Message(w.Format, e)
		if !ok {
			body = []byte(`{"text":"a test of Orrery's webhook"}`)
		}
		return TestWebhook200JSONResponse(s.sender.Send(ctx, w, 0, body)), nil
	}
	return nil, registry.Errorf(registry.NotFound, "no webhook %q", r.Id)
}
