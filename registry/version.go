package registry

import "time"

// Status is where a version is in its life.
type Status string

// PENDING becomes READY or FAILED, once. READY may become ARCHIVED and ARCHIVED READY again.
const (
	Pending  Status = "PENDING"
	Ready    Status = "READY"
	Failed   Status = "FAILED"
	Archived Status = "ARCHIVED"
)

// Version is an immutable artifact and what was derived from it.
type Version struct {
	Model       string
	Number      int
	Status      Status
	Reason      string // why it FAILED
	Digest      string // of the manifest
	Manifest    Manifest
	Signature   Signature
	Latency     []BatchLatency
	Documents   Documents
	Description string
	RunID       string // the run that registers it
	CreatedAt   time.Time
	CreatedBy   string
	ReadyAt     time.Time
}

// Documents are derived files of a version: sha256 of blobs in the object store, "" where there is none.
type Documents struct {
	TrainingData string `json:"training_data,omitempty"` // given at registration; the baseline is built from it
	Baseline     string `json:"baseline,omitempty"`      // monitor.Baseline as JSON
}

// BatchLatency is the measured duration of one run of the session with a batch of Rows rows.
type BatchLatency struct {
	Rows   int   `json:"rows"`
	P50    int64 `json:"p50_us"`
	P95    int64 `json:"p95_us"`
	Sample int   `json:"sample"`
}

// Derived is what RegisterVersion found out about a version.
type Derived struct {
	Signature Signature
	Latency   []BatchLatency
	Documents Documents
}

// Alias is a movable name for a version.
type Alias struct {
	Model     string
	Name      string
	Version   int
	UpdatedAt time.Time
	Actor     string
}

// AliasMove is one change in an alias's history. From or To is 0 when the alias did not exist.
type AliasMove struct {
	Model  string
	Name   string
	From   int
	To     int
	At     time.Time
	Actor  string
	Reason string
	Event  int64
}

// AliasChange moves an alias; version 0 removes it.
type AliasChange struct {
	Model   string
	Name    string
	Version int
	Actor   string
	Reason  string
}
