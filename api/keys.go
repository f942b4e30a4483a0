package api

import (
	"context"

	"github.com/orrery-ml/orrery/registry"
)

func keyDTO(k registry.APIKey) Key {
	models := k.Models
	if models == nil {
		models = []string{}
	}
	return Key{
		Id: k.ID, Name: k.Name, Role: string(k.Role), Models: models, CreatedAt: k.CreatedAt, CreatedBy: k.CreatedBy,
		RevokedAt: optional(k.RevokedAt),
	}
}

// ListKeys implements the API.
func (s *Server) ListKeys(ctx context.Context, _ ListKeysRequestObject) (ListKeysResponseObject, error) {
	list, err := s.store.ListKeys(ctx)
	if err != nil {
		return nil, err
	}
	out := ListKeys200JSONResponse{}
	for _, k := range list {
		out = append(out, keyDTO(k))
	}
	return out, nil
}

// CreateKey implements the API.
func (s *Server) CreateKey(ctx context.Context, r CreateKeyRequestObject) (CreateKeyResponseObject, error) {
	secret := NewSecret()
	k, err := s.store.CreateKey(ctx, registry.APIKey{
		ID: newRunID(), Name: r.Body.Name, Hash: HashSecret(secret), Role: registry.KeyRole(r.Body.Role), Models: value(r.Body.Models),
		CreatedBy: actor(ctx),
	})
	if err != nil {
		return nil, err
	}
	out := keyDTO(k)
	out.Secret = &secret
	return CreateKey201JSONResponse(out), nil
}

// RevokeKey implements the API.
func (s *Server) RevokeKey(ctx context.Context, r RevokeKeyRequestObject) (RevokeKeyResponseObject, error) {
	if err := s.store.RevokeKey(ctx, r.Id, actor(ctx)); err != nil {
		return nil, err
	}
	return RevokeKey204Response{}, nil
}
