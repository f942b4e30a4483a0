-- What the judge counts beside errors and latency, where it stands, when a model may be promoted, and who is told.
-- +goose Up
ALTER TABLE strata ADD COLUMN detail TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN rollout TEXT NOT NULL DEFAULT '';
CREATE TABLE tallies (run TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE webhooks (
  id TEXT PRIMARY KEY, url TEXT NOT NULL, secret TEXT NOT NULL, format TEXT NOT NULL, types TEXT NOT NULL, models TEXT NOT NULL,
  position BIGINT NOT NULL, owner TEXT NOT NULL, owned_till BIGINT NOT NULL, created_at BIGINT NOT NULL, created_by TEXT NOT NULL);
CREATE TABLE deliveries (
  webhook TEXT NOT NULL, at BIGINT NOT NULL, event BIGINT NOT NULL, attempt BIGINT NOT NULL, millis BIGINT NOT NULL,
  status BIGINT NOT NULL, error TEXT NOT NULL, given_up BOOLEAN NOT NULL, PRIMARY KEY (webhook, at, event));
CREATE INDEX strata_by_start ON strata (start);

-- +goose Down
DROP INDEX strata_by_start;
DROP TABLE tallies; DROP TABLE webhooks; DROP TABLE deliveries;
ALTER TABLE models DROP COLUMN rollout;
ALTER TABLE strata DROP COLUMN detail;
