-- Times are microseconds since 1970 UTC, 0 for none. Structured columns are JSON text. The same file serves SQLite and
-- PostgreSQL.
-- +goose Up
CREATE TABLE counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
INSERT INTO counters (name, value) VALUES ('event', 0);

CREATE TABLE models (
  name TEXT PRIMARY KEY, description TEXT NOT NULL, config TEXT NOT NULL, config_revision BIGINT NOT NULL,
  retrain TEXT NOT NULL, last_version BIGINT NOT NULL, route_revision BIGINT NOT NULL,
  created_at BIGINT NOT NULL, created_by TEXT NOT NULL);

CREATE TABLE versions (
  model TEXT NOT NULL REFERENCES models(name), number BIGINT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
  digest TEXT NOT NULL, manifest TEXT NOT NULL, derived TEXT NOT NULL, description TEXT NOT NULL, run_id TEXT NOT NULL,
  created_at BIGINT NOT NULL, created_by TEXT NOT NULL, ready_at BIGINT NOT NULL, PRIMARY KEY (model, number));

CREATE TABLE aliases (
  model TEXT NOT NULL REFERENCES models(name), name TEXT NOT NULL, version BIGINT NOT NULL, updated_at BIGINT NOT NULL,
  actor TEXT NOT NULL, PRIMARY KEY (model, name));

CREATE TABLE alias_moves (
  event BIGINT NOT NULL, model TEXT NOT NULL, name TEXT NOT NULL, from_version BIGINT NOT NULL, to_version BIGINT NOT NULL,
  at BIGINT NOT NULL, actor TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (event, name));
CREATE INDEX alias_moves_of ON alias_moves (model, name, event);

CREATE TABLE routes (
  model TEXT NOT NULL REFERENCES models(name), revision BIGINT NOT NULL, arms TEXT NOT NULL, owner TEXT NOT NULL,
  salt TEXT NOT NULL, event BIGINT NOT NULL, change_id TEXT NOT NULL UNIQUE, actor TEXT NOT NULL, reason TEXT NOT NULL,
  at BIGINT NOT NULL, PRIMARY KEY (model, revision));

CREATE TABLE events (
  number BIGINT PRIMARY KEY, at BIGINT NOT NULL, type TEXT NOT NULL, model TEXT NOT NULL, version BIGINT NOT NULL,
  run TEXT NOT NULL, actor TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX events_of_model ON events (model, number);

CREATE TABLE runs (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, version BIGINT NOT NULL, workflow_id TEXT NOT NULL,
  lock TEXT UNIQUE, state TEXT NOT NULL, outcome TEXT NOT NULL, phase TEXT NOT NULL, message TEXT NOT NULL,
  progress DOUBLE PRECISION NOT NULL, input TEXT NOT NULL, result TEXT NOT NULL, actor TEXT NOT NULL,
  created_at BIGINT NOT NULL, started_at BIGINT NOT NULL, ended_at BIGINT NOT NULL);
CREATE INDEX runs_of_model ON runs (model, id);
CREATE INDEX runs_by_state ON runs (state, id);

CREATE TABLE leases (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, node TEXT NOT NULL, address TEXT NOT NULL, applied BIGINT NOT NULL,
  sealed BIGINT NOT NULL, started_at BIGINT NOT NULL, expires BIGINT NOT NULL, worker TEXT NOT NULL);

CREATE TABLE holds (
  model TEXT NOT NULL, version BIGINT NOT NULL, holder TEXT NOT NULL, until BIGINT NOT NULL,
  PRIMARY KEY (model, version, holder));

CREATE TABLE strata (
  gateway TEXT NOT NULL, model TEXT NOT NULL, revision BIGINT NOT NULL, version BIGINT NOT NULL, start BIGINT NOT NULL,
  role TEXT NOT NULL, requests BIGINT NOT NULL, errors BIGINT NOT NULL, votes BIGINT NOT NULL, vote_fails BIGINT NOT NULL,
  sheds BIGINT NOT NULL, cancelled BIGINT NOT NULL, not_finite BIGINT NOT NULL, latency TEXT NOT NULL,
  PRIMARY KEY (model, revision, gateway, version, start));

CREATE TABLE evidence (
  run TEXT NOT NULL, seq BIGINT NOT NULL, at BIGINT NOT NULL, verdict TEXT NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (run, seq));

CREATE TABLE api_keys (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, role TEXT NOT NULL, models TEXT NOT NULL,
  created_at BIGINT NOT NULL, created_by TEXT NOT NULL, revoked_at BIGINT NOT NULL);

CREATE TABLE answers (
  actor TEXT NOT NULL, path TEXT NOT NULL, key TEXT NOT NULL, body_hash TEXT NOT NULL, status BIGINT NOT NULL,
  location TEXT NOT NULL, body TEXT NOT NULL, expires BIGINT NOT NULL, PRIMARY KEY (actor, path, key));

-- +goose Down
DROP TABLE answers; DROP TABLE api_keys; DROP TABLE evidence; DROP TABLE strata; DROP TABLE holds; DROP TABLE leases;
DROP TABLE runs; DROP TABLE events; DROP TABLE routes; DROP TABLE alias_moves; DROP TABLE aliases; DROP TABLE versions;
DROP TABLE models; DROP TABLE counters;
