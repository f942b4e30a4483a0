package store

import (
	"encoding/json"
	"errors"
	"sync"

	"github.com/orrery-ml/orrery/registry"
)

type modelRow struct {
	Name           string `gorm:"primaryKey"`
	Description    string
	Config         string
	ConfigRevision int64
	Retrain        string
	Rollout        string
	LastVersion    int
	RouteRevision  int64
	CreatedAt      int64 `gorm:"autoCreateTime:false"`
	CreatedBy      string
}

func (modelRow) TableName() string { return "models" }

func (r modelRow) model() (registry.Model, error) {
	m := registry.Model{
		Name: r.Name, Description: r.Description, Config: registry.DefaultServingConfig(), ConfigRevision: r.ConfigRevision,
		Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy(), CreatedAt: fromMicros(r.CreatedAt), CreatedBy: r.CreatedBy,
	}
	return m, errors.Join(decode(r.Config, &m.Config), decode(r.Retrain, &m.Retrain), decode(r.Rollout, &m.Rollout))
}

type versionRow struct {
	Model       string `gorm:"primaryKey"`
	Number      int    `gorm:"primaryKey;autoIncrement:false"`
	Status      string
	Reason      string
	Digest      string
	Manifest    string
	Derived     string
	Description string
	RunID       string
	CreatedAt   int64 `gorm:"autoCreateTime:false"`
	CreatedBy   string
	ReadyAt     int64
}

func (versionRow) TableName() string { return "versions" }

func (r versionRow) version() (registry.Version, error) {
	v := registry.Version{
		Model: r.Model, Number: r.Number, Status: registry.Status(r.Status), Reason: r.Reason, Digest: r.Digest,
		Description: r.Description, RunID: r.RunID, CreatedAt: fromMicros(r.CreatedAt), CreatedBy: r.CreatedBy,
		ReadyAt: fromMicros(r.ReadyAt),
	}
	var d registry.Derived
	err := errors.Join(decode(r.Manifest, &v.Manifest), decode(r.Derived, &d))
	v.Signature, v.Latency, v.Documents = d.Signature, d.Latency, d.Documents
	return v, err
}

type aliasRow struct {
	Model     string `gorm:"primaryKey"`
	Name      string `gorm:"primaryKey"`
	Version   int
	UpdatedAt int64 `gorm:"autoUpdateTime:false"`
	Actor     string
}

func (aliasRow) TableName() string { return "aliases" }

func (r aliasRow) alias() registry.Alias {
	return registry.Alias{Model: r.Model, Name: r.Name, Version: r.Version, UpdatedAt: fromMicros(r.UpdatedAt), Actor: r.Actor}
}

type aliasMoveRow struct {
	Event       int64  `gorm:"primaryKey;autoIncrement:false"`
	Model       string //
	Name        string `gorm:"primaryKey"`
	FromVersion int
	ToVersion   int
	At          int64
	Actor       string
	Reason      string
}

func (aliasMoveRow) TableName() string { return "alias_moves" }

type routeRow struct {
	Model    string `gorm:"primaryKey"`
	Revision int64  `gorm:"primaryKey;autoIncrement:false"`
	Arms     string
	Owner    string
	Salt     string
	Event    int64
	ChangeID string
	Actor    string
	Reason   string
	At       int64
}

func (routeRow) TableName() string { return "routes" }

// routeColumns are the columns of a new route; its event's number may be SQL.
func routeColumns(r registry.Route, event any) map[string]any {
	return map[string]any{
		"model": r.Model, "revision": r.Revision, "arms": encode(r.Arms), "owner": r.Owner, "salt": r.Salt, "event": event,
		"change_id": r.ChangeID, "actor": r.Actor, "reason": r.Reason, "at": micros(r.At),
	}
}

func (r routeRow) route() (registry.Route, error) {
	out := registry.Route{
		Model: r.Model, Revision: r.Revision, Owner: r.Owner, Salt: r.Salt, Event: r.Event, ChangeID: r.ChangeID,
		Actor: r.Actor, Reason: r.Reason, At: fromMicros(r.At),
	}
	return out, decode(r.Arms, &out.Arms)
}

type eventRow struct {
	Number  int64 `gorm:"primaryKey;autoIncrement:false"`
	At      int64
	Type    string
	Model   string
	Version int
	Run     string
	Actor   string
	Data    string
}

func (eventRow) TableName() string { return "events" }

func (r eventRow) event() registry.Event {
	return registry.Event{
		Number: r.Number, At: fromMicros(r.At), Type: registry.EventType(r.Type), Model: r.Model, Version: r.Version,
		Run: r.Run, Actor: r.Actor, Data: json.RawMessage(r.Data),
	}
}

type runRow struct {
	ID         string `gorm:"primaryKey"`
	Kind       string
	Model      string
	Version    int
	WorkflowID string
	Parent     string
	Lock       *string
	State      string
	Outcome    string
	Phase      string
	Message    string
	Progress   float64
	Input      string
	Result     string
	Actor      string
	CreatedAt  int64 `gorm:"autoCreateTime:false"`
	StartedAt  int64
	EndedAt    int64
}

func (runRow) TableName() string { return "runs" }

func (r runRow) run() registry.Run {
	out := registry.Run{
		ID: r.ID, Kind: registry.RunKind(r.Kind), Model: r.Model, Version: r.Version, WorkflowID: r.WorkflowID, Parent: r.Parent,
		State: registry.RunState(r.State), Outcome: registry.Outcome(r.Outcome), Phase: r.Phase, Message: r.Message,
		Progress: r.Progress, Input: document(r.Input), Result: document(r.Result), Actor: r.Actor,
		CreatedAt: fromMicros(r.CreatedAt), StartedAt: fromMicros(r.StartedAt), EndedAt: fromMicros(r.EndedAt),
	}
	if r.Lock != nil {
		out.Lock = *r.Lock
	}
	return out
}

// document returns stored JSON; none is nil, because an empty json.RawMessage does not marshal.
func document(s string) json.RawMessage {
	if s == "" {
		return nil
	}
	return json.RawMessage(s)
}

type leaseRow struct {
	ID        string `gorm:"primaryKey"`
	Kind      string
	Node      string
	Address   string
	Applied   int64
	Sealed    int64
	StartedAt int64
	Expires   int64
	Worker    string
}

func (leaseRow) TableName() string { return "leases" }

func (r leaseRow) lease(known *workerStates) (registry.Lease, error) {
	l := registry.Lease{
		ID: r.ID, Kind: registry.LeaseKind(r.Kind), Node: r.Node, Address: r.Address, Applied: r.Applied,
		Sealed: fromMicros(r.Sealed), StartedAt: fromMicros(r.StartedAt), Expires: fromMicros(r.Expires),
	}
	var err error
	l.Worker, err = known.decode(r.Worker)
	return l, err
}

// workerStates keeps the states of workers as they were read last: those of workers with many models are long, are
// read often and seldom change. Nobody changes a state that was read.
type workerStates struct {
	mu    sync.Mutex
	known map[string]registry.WorkerState // by their JSON
}

// maxStates bounds the workers' states that are kept.
const maxStates = 64

func (w *workerStates) decode(raw string) (registry.WorkerState, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	state, ok := w.known[raw]
	if ok {
		return state, nil
	}
	if err := decode(raw, &state); err != nil {
		return state, err
	}
	if w.known == nil || len(w.known) >= maxStates {
		w.known = map[string]registry.WorkerState{}
	}
	w.known[raw] = state
	return state, nil
}

type holdRow struct {
	Model   string `gorm:"primaryKey"`
	Version int    `gorm:"primaryKey;autoIncrement:false"`
	Holder  string `gorm:"primaryKey"`
	Until   int64
}

func (holdRow) TableName() string { return "holds" }

func (r holdRow) hold() registry.Hold {
	return registry.Hold{Model: r.Model, Version: r.Version, Holder: r.Holder, Until: fromMicros(r.Until)}
}

type stratumRow struct {
	Gateway   string `gorm:"primaryKey"`
	Model     string `gorm:"primaryKey"`
	Revision  int64  `gorm:"primaryKey;autoIncrement:false"`
	Version   int    `gorm:"primaryKey;autoIncrement:false"`
	Start     int64  `gorm:"primaryKey;autoIncrement:false"`
	Role      string
	Requests  int64
	Errors    int64
	Votes     int64
	VoteFails int64
	Sheds     int64
	Cancelled int64
	NotFinite int64
	Latency   string
	Detail    string
}

func (stratumRow) TableName() string { return "strata" }

func newStratumRow(s registry.Stratum) stratumRow {
	return stratumRow{
		Gateway: s.Gateway, Model: s.Model, Revision: s.Revision, Version: s.Version, Start: micros(s.Start),
		Role: string(s.Role), Requests: s.Requests, Errors: s.Errors, Votes: s.Votes, VoteFails: s.VoteFails,
		Sheds: s.Sheds, Cancelled: s.Cancelled, NotFinite: s.NotFinite, Latency: encode(s.Latency),
		Detail: encode(s.Detail),
	}
}

func (r stratumRow) stratum() (registry.Stratum, error) {
	s := registry.Stratum{
		Gateway: r.Gateway, Model: r.Model, Revision: r.Revision, Version: r.Version, Start: fromMicros(r.Start),
		Role: registry.Role(r.Role), Requests: r.Requests, Errors: r.Errors, Votes: r.Votes, VoteFails: r.VoteFails,
		Sheds: r.Sheds, Cancelled: r.Cancelled, NotFinite: r.NotFinite,
	}
	return s, errors.Join(decode(r.Latency, &s.Latency), decode(r.Detail, &s.Detail))
}

type evidenceRow struct {
	Run     string `gorm:"primaryKey"`
	Seq     int    `gorm:"primaryKey;autoIncrement:false"`
	At      int64
	Verdict string
	Body    string
}

func (evidenceRow) TableName() string { return "evidence" }

type tallyRow struct {
	Run  string `gorm:"primaryKey"`
	Body string
}

func (tallyRow) TableName() string { return "tallies" }

type keyRow struct {
	ID        string `gorm:"primaryKey"`
	Name      string
	Hash      string
	Role      string
	Models    string
	CreatedAt int64 `gorm:"autoCreateTime:false"`
	CreatedBy string
	RevokedAt int64
}

func (keyRow) TableName() string { return "api_keys" }

func (r keyRow) key() (registry.APIKey, error) {
	k := registry.APIKey{
		ID: r.ID, Name: r.Name, Hash: r.Hash, Role: registry.KeyRole(r.Role), CreatedAt: fromMicros(r.CreatedAt),
		CreatedBy: r.CreatedBy, RevokedAt: fromMicros(r.RevokedAt),
	}
	return k, decode(r.Models, &k.Models)
}

type webhookRow struct {
	ID        string `gorm:"primaryKey"`
	URL       string
	Secret    string
	Format    string
	Types     string
	Models    string
	Position  int64
	Owner     string
	OwnedTill int64
	CreatedAt int64 `gorm:"autoCreateTime:false"`
	CreatedBy string
}

func (webhookRow) TableName() string { return "webhooks" }

func (r webhookRow) webhook() (registry.Webhook, error) {
	w := registry.Webhook{
		ID: r.ID, URL: r.URL, Secret: r.Secret, Format: registry.WebhookFormat(r.Format), Position: r.Position,
		CreatedAt: fromMicros(r.CreatedAt), CreatedBy: r.CreatedBy,
	}
	return w, errors.Join(decode(r.Types, &w.Types), decode(r.Models, &w.Models))
}

type deliveryRow struct {
	Webhook string `gorm:"primaryKey"`
	At      int64  `gorm:"primaryKey;autoIncrement:false"`
	Event   int64  `gorm:"primaryKey;autoIncrement:false"`
	Attempt int
	Millis  int64
	Status  int
	Error   string
	GivenUp bool
}

func (deliveryRow) TableName() string { return "deliveries" }

func (r deliveryRow) delivery() registry.Delivery {
	return registry.Delivery{
		Webhook: r.Webhook, Event: r.Event, Attempt: r.Attempt, At: fromMicros(r.At), Millis: r.Millis, Status: r.Status,
		Error: r.Error, GivenUp: r.GivenUp,
	}
}

type answerRow struct {
	Actor    string `gorm:"primaryKey"`
	Path     string `gorm:"primaryKey"`
	Key      string `gorm:"primaryKey"`
	BodyHash string
	Status   int
	Location string
	Body     string
	Expires  int64
}

func (answerRow) TableName() string { return "answers" }

// convert maps rows to domain values and stops at the first row that does not decode.
func convert[R, D any](rows []R, f func(R) (D, error)) ([]D, error) {
	out := make([]D, 0, len(rows))
	for _, r := range rows {
		d, err := f(r)
		if err != nil {
			return nil, fault("decode a stored row", err)
		}
		out = append(out, d)
	}
	return out, nil
}
