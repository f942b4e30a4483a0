-- A run with a parent is started by its parent's workflow, never by the reconciler.
-- +goose Up
ALTER TABLE runs ADD COLUMN parent TEXT NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE runs DROP COLUMN parent;
