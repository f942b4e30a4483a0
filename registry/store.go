package registry

import (
	"context"
	"io"
	"iter"
	"time"
)

// Catalog keeps models and versions.
type Catalog interface {
	// CreateModel ends in Invalid for a bad name and Exists when the name is taken.
	CreateModel(ctx context.Context, m Model) (Model, error)
	// Model ends in NotFound, naming the closest existing name.
	Model(ctx context.Context, name string) (Model, error)
	// Models lists all models by name.
	Models(ctx context.Context) ([]Model, error)
	// ConfigureModel replaces the serving config and the retrain policy when the config revision is still expected.
	// It ends in Invalid, NotFound or Conflict.
	ConfigureModel(ctx context.Context, m Model, expected int64, actor string) (Model, error)
}

// Versions keeps versions.
type Versions interface {
	// CreateVersion gives the next number. The run that registers it is inserted in the same transaction.
	CreateVersion(ctx context.Context, v Version, run Run) (Version, error)
	// Version ends in NotFound.
	Version(ctx context.Context, model string, number int) (Version, error)
	// PickVersions returns versions of a model by number. It ends in NotFound when one is missing.
	PickVersions(ctx context.Context, model string, numbers ...int) (map[int]Version, error)
	// ListVersions lists the versions of a model, newest first. It ends in NotFound for an unknown model.
	ListVersions(ctx context.Context, model string) ([]Version, error)
	// FinishVersion makes a PENDING version READY (reason "") or FAILED; repeating the same outcome is no error.
	FinishVersion(ctx context.Context, model string, number int, d Derived, reason string) (Version, error)
	// ArchiveVersion moves READY or FAILED to ARCHIVED unless something needs it (Conflict).
	ArchiveVersion(ctx context.Context, model string, number int, actor string) error
}

// Routes keeps routes, aliases and their histories.
type Routes interface {
	// SetRoute is one transaction: compare-and-set on the revision, route, aliases, history, event. A repeated change
	// id returns the revision it already made. It ends in NotFound, Invalid, Conflict or, when an arm's version is not
	// READY, Precondition, which wraps GateClosed when it is that.
	SetRoute(ctx context.Context, c RouteChange) (Route, error)
	// Route ends in NotFound for an unknown model.
	Route(ctx context.Context, model string) (Route, error)
	// OwnedRoutes lists the present routes that a run owns, by model.
	OwnedRoutes(ctx context.Context) ([]Route, error)
	// RouteHistory lists routes newest first, at most limit.
	RouteHistory(ctx context.Context, model string, limit int) ([]Route, error)
	// Aliases lists a model's aliases by name.
	Aliases(ctx context.Context, model string) ([]Alias, error)
	// SetAlias moves an alias to a READY version, or removes it (version 0). It ends in Invalid for Champion, which only
	// SetRoute moves, NotFound or Precondition.
	SetAlias(ctx context.Context, c AliasChange) error
	// AliasHistory lists the moves of one alias, or of all when name is "", newest first.
	AliasHistory(ctx context.Context, model, name string) ([]AliasMove, error)
}

// Feed is the change feed.
type Feed interface {
	// Snapshot reads the state and its position in one transaction.
	Snapshot(ctx context.Context) (Snapshot, error)
	// Events lists up to limit events with numbers above after, in order.
	Events(ctx context.Context, after int64, limit int) ([]Event, error)
	// Await returns once an event above after exists; the doorbell may also ring for nothing.
	Await(ctx context.Context, after int64) error
	// AwaitServed is Await for gateways: events that change nothing they serve may take a second to end it.
	AwaitServed(ctx context.Context, after int64) error
}

// Fleet keeps leases and holds.
type Fleet interface {
	// PutLease inserts or renews a lease. Applied and Sealed never go back.
	PutLease(ctx context.Context, l Lease) error
	// DropLease ends a lease at once.
	DropLease(ctx context.Context, id string) error
	// Leases lists leases of a kind that expire after the given time; the zero time lists all.
	Leases(ctx context.Context, kind LeaseKind, after time.Time) ([]Lease, error)
	// SetHold places or, with Until not after now, lifts a hold.
	SetHold(ctx context.Context, h Hold, actor string) error
	// Holds lists holds that have not expired at the given time.
	Holds(ctx context.Context, at time.Time) ([]Hold, error)
}

// EvidenceLog keeps strata and evidence.
type EvidenceLog interface {
	// FlushStrata adds strata and moves the gateway's watermark in one transaction; a stratum that is there stays.
	FlushStrata(ctx context.Context, gateway string, strata []Stratum, sealed time.Time) error
	// Strata lists strata in order of start, gateway, version.
	Strata(ctx context.Context, f StrataFilter) ([]Stratum, error)
	// PutTally replaces a run's tally.
	PutTally(ctx context.Context, t Tally) error
	// Tally returns a run's tally, with no body when there is none yet.
	Tally(ctx context.Context, run string) (Tally, error)
	// AddEvidence adds to a run's evidence; a repeated (run, seq) stays as it was.
	AddEvidence(ctx context.Context, e Evidence) error
	// ListEvidence lists a run's evidence in order.
	ListEvidence(ctx context.Context, run string) ([]Evidence, error)
}

// Runs keeps runs.
type Runs interface {
	// InsertRun ends in Conflict, naming the other run, when a run with the same lock has not ended. A repeated id
	// returns the run as it is.
	InsertRun(ctx context.Context, r Run) (Run, error)
	// Run ends in NotFound.
	Run(ctx context.Context, id string) (Run, error)
	// ListRuns lists runs, newest first.
	ListRuns(ctx context.Context, f RunFilter) ([]Run, error)
	// UpdateRun changes a run that has not ended; on one that has, it does nothing and returns it.
	UpdateRun(ctx context.Context, u RunUpdate) (Run, error)
}

// Keys keeps API keys and remembered answers.
type Keys interface {
	// CreateKey ends in Exists when the name is taken by a key that is not revoked.
	CreateKey(ctx context.Context, k APIKey) (APIKey, error)
	// KeyByHash ends in Unauthenticated when no key that is not revoked has the hash.
	KeyByHash(ctx context.Context, hash string) (APIKey, error)
	// ListKeys lists keys by creation.
	ListKeys(ctx context.Context) ([]APIKey, error)
	// RevokeKey ends in NotFound.
	RevokeKey(ctx context.Context, id, actor string) error
}

// Webhooks keeps webhooks and what was sent to them.
type Webhooks interface {
	// CreateWebhook ends in Invalid. The webhook begins after the last event there is.
	CreateWebhook(ctx context.Context, w Webhook) (Webhook, error)
	// ListWebhooks lists webhooks by creation.
	ListWebhooks(ctx context.Context) ([]Webhook, error)
	// DeleteWebhook ends in NotFound.
	DeleteWebhook(ctx context.Context, id, actor string) error
	// ClaimWebhook makes owner the only one to send to a webhook for a while, and says whether it is; it returns the
	// webhook as it is then. An owner claims again to keep it.
	ClaimWebhook(ctx context.Context, id, owner string, lasts time.Duration) (Webhook, bool, error)
	// AdvanceWebhook moves a webhook's position from one event to another, while owner has it and nobody moved it.
	AdvanceWebhook(ctx context.Context, id, owner string, from, to int64) error
	// RewindWebhook sets a webhook's position: events after it are sent, again or at last. It ends in NotFound.
	RewindWebhook(ctx context.Context, id string, position int64) error
	// AddDelivery keeps one attempt.
	AddDelivery(ctx context.Context, d Delivery) error
	// Deliveries lists a webhook's attempts, newest first, at most limit. It ends in NotFound.
	Deliveries(ctx context.Context, id string, limit int) ([]Delivery, error)
}

// Answers remembers answers to requests with an Idempotency-Key.
type Answers interface {
	// Reserve claims the key, or returns the remembered answer and false. It ends in Conflict when the same key came
	// with another body, or while the first request is still under way.
	Reserve(ctx context.Context, a Idempotent) (Idempotent, bool, error)
	// Remember stores the answer of a reserved key; Status 0 gives the key free again.
	Remember(ctx context.Context, a Idempotent) error
}

// Object is a stored object.
type Object struct {
	Key      string
	Size     int64
	Modified time.Time
}

// Objects is an object store: a directory or S3. An object is visible whole or not at all.
type Objects interface {
	// Put writes size bytes of r (-1 when not known). A reader that fails leaves nothing visible. It ends in
	// StorageFull when there is no space and Unavailable when the store cannot be reached.
	Put(ctx context.Context, key string, r io.Reader, size int64) error
	// Get opens an object. It ends in NotFound.
	Get(ctx context.Context, key string) (io.ReadCloser, error)
	// Stat ends in NotFound.
	Stat(ctx context.Context, key string) (Object, error)
	// List yields the objects under a prefix in order of key.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]
	// Delete removes an object; one that is not there is no error.
	Delete(ctx context.Context, key string) error
}
