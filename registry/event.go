package registry

import (
	"encoding/json"
	"time"
)

// EventType names what happened. Types are append-only; webhooks and gateways match on them.
type EventType string

// The events.
const (
	ModelCreated    EventType = "model.created"
	ModelConfigured EventType = "model.configured"
	VersionCreated  EventType = "version.created"
	VersionReady    EventType = "version.ready"
	VersionFailed   EventType = "version.failed"
	VersionArchived EventType = "version.archived"
	VersionDeleted  EventType = "version.deleted"
	RouteChanged    EventType = "route.changed"
	AliasMoved      EventType = "alias.moved"
	HoldChanged     EventType = "hold.changed"
	RunChanged      EventType = "run.changed"
	KeyChanged      EventType = "key.changed"
	WebhookChanged  EventType = "webhook.changed"
)

// Served says whether an event of this type changes what gateways serve; those of runs, keys and webhooks do not, nor do
// types that this build does not know.
func (t EventType) Served() bool {
	switch t {
	case ModelCreated, ModelConfigured, VersionReady, VersionArchived, VersionDeleted, RouteChanged, AliasMoved, HoldChanged:
		return true
	case VersionCreated, VersionFailed, RunChanged, KeyChanged, WebhookChanged:
	}
	return false
}

// Event is one row of the append-only log that is audit trail, change feed and source of webhooks at once. Numbers
// have no gaps a reader could skip: they are given out in the order transactions commit.
type Event struct {
	Number  int64           `json:"number"`
	At      time.Time       `json:"at"`
	Type    EventType       `json:"type"`
	Model   string          `json:"model,omitempty"`
	Version int             `json:"version,omitempty"`
	Run     string          `json:"run,omitempty"`
	Actor   string          `json:"actor"`
	Data    json.RawMessage `json:"data,omitempty"` // RouteChanged: the Route; ModelConfigured: the config; …
}

// Snapshot is everything a gateway needs, and the event number up to which it is true. Both are read in one
// transaction.
type Snapshot struct {
	Position int64
	Models   []Model
	Routes   []Route
	Aliases  []Alias
	Versions []Version // READY ones
	Holds    []Hold
}
