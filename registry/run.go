package registry

import (
	"encoding/json"
	"time"
)

// RunKind says which workflow a run is of.
type RunKind string

// The kinds of runs.
const (
	KindRegister      RunKind = "register"
	KindRollout       RunKind = "rollout"
	KindWatch         RunKind = "watch"
	KindBatch         RunKind = "batch"
	KindDrift         RunKind = "drift"
	KindRetrainPolicy RunKind = "retrain-policy"
	KindRetrain       RunKind = "retrain"
	KindRetention     RunKind = "retention"
)

// RunState is where a run is. A run that ended never changes again.
type RunState string

// PENDING runs are inserted and not yet started; the reconciler starts them.
const (
	RunPending       RunState = "PENDING"
	RunRunning       RunState = "RUNNING"
	RunWaiting       RunState = "WAITING"        // for a person
	RunNeedsOperator RunState = "NEEDS_OPERATOR" // compensation could not go on by itself
	RunSucceeded     RunState = "SUCCEEDED"
	RunFailed        RunState = "FAILED"
	RunCancelled     RunState = "CANCELLED"
)

// Ended says whether s is final.
func (s RunState) Ended() bool { return s == RunSucceeded || s == RunFailed || s == RunCancelled }

// Outcome says how a run that ended came out, in the word of its kind.
type Outcome string

// The outcomes of a roll-out and of a watch.
const (
	Promoted     Outcome = "PROMOTED"
	Passed       Outcome = "PASSED" // a shadow or an experiment came out well and was not to promote
	RolledBack   Outcome = "ROLLED_BACK"
	Rejected     Outcome = "REJECTED"
	Aborted      Outcome = "ABORTED"
	Superseded   Outcome = "SUPERSEDED"
	Inconclusive Outcome = "INCONCLUSIVE"
	Terminated   Outcome = "TERMINATED"
)

// Run is one thing the platform does. It spans retries and continue-as-new and outlives Temporal's retention.
type Run struct {
	ID         string
	Kind       RunKind
	Model      string
	Version    int
	WorkflowID string
	Parent     string // run whose workflow starts this one's as a child; "" = a server starts it
	Lock       string // while the run has not ended, no second one with this lock can be inserted; "" for none
	State      RunState
	Outcome    Outcome
	Phase      string // what it does now, in a few words
	Message    string // why it ended as it did
	Progress   float64
	Input      json.RawMessage
	Result     json.RawMessage
	Actor      string
	CreatedAt  time.Time
	StartedAt  time.Time
	EndedAt    time.Time
}

// RunUpdate changes a run that has not ended; nil fields stay.
type RunUpdate struct {
	ID       string
	State    RunState // "" stays
	Outcome  Outcome
	Phase    *string
	Message  *string
	Progress *float64
	Result   json.RawMessage
}

// RunFilter narrows ListRuns; zero fields match everything. Results are newest first.
type RunFilter struct {
	Kind  RunKind
	Model string
	State RunState
	Open  bool   // only runs that have not ended
	After string // only runs older than this id
	Limit int    // 0 = 100, at most 1000
}

// Evidence is what one decision was made on.
type Evidence struct {
	Run     string          `json:"run"`
	Seq     int             `json:"seq"`
	At      time.Time       `json:"at"`
	Verdict string          `json:"verdict"`
	Body    json.RawMessage `json:"body"`
}
