-- What the judge counts beside errors and latency, where it stands, and when a model may be promoted.
-- +goose Up
ALTER TABLE strata ADD COLUMN detail TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN rollout TEXT NOT NULL DEFAULT '';
CREATE TABLE tallies (run TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE INDEX strata_by_start ON strata (start);

-- +goose Down
DROP INDEX strata_by_start;
DROP TABLE tallies;
ALTER TABLE models DROP COLUMN rollout;
ALTER TABLE strata DROP COLUMN detail;
