package registry

import (
	"encoding/json"
	"slices"
	"time"
)

// LeaseKind says what kind of process holds a lease.
type LeaseKind string

// The kinds of processes that hold leases.
const (
	GatewayLease LeaseKind = "gateway"
	WorkerLease  LeaseKind = "worker"
)

// Lease says that a process lives. Its ID is the process's incarnation: a restart gets a new one.
type Lease struct {
	ID        string
	Kind      LeaseKind
	Node      string    // a name people know it by; two incarnations may share it
	Address   string    // where its gRPC server listens
	Applied   int64     // gateways: every event up to this number is applied
	Sealed    time.Time // gateways: every stratum that began before this is flushed
	StartedAt time.Time
	Expires   time.Time
	Worker    WorkerState
}

// Behind returns the leases that have not applied an event yet.
func Behind(leases []Lease, event int64) []Lease {
	return slices.DeleteFunc(slices.Clone(leases), func(l Lease) bool { return l.Applied >= event })
}

// WorkerState is what a worker reports of itself.
type WorkerState struct {
	Labels      map[string]string `json:"labels,omitempty"`
	Devices     []Device          `json:"devices,omitempty"`
	Providers   []string          `json:"providers,omitempty"` // execution providers that are there
	MemoryBytes int64             `json:"memory_bytes"`
	BudgetBytes int64             `json:"budget_bytes,omitempty"` // of memory; 0 = none
	Waiting     int64             `json:"waiting"`                // rows in queues
	Loaded      []LoadedVersion   `json:"loaded,omitempty"`
	Crashes     []Crash           `json:"crashes,omitempty"` // of the last hour, of the workers before this one in its place
}

// Has says whether a worker has all the labels asked for.
func (s WorkerState) Has(labels map[string]string) bool {
	for k, v := range labels {
		if s.Labels[k] != v {
			return false
		}
	}
	return true
}

// Crash says that a worker's process died while it ran or loaded a version.
type Crash struct {
	Model   string    `json:"model"`
	Version int       `json:"version"`
	At      time.Time `json:"at"`
	Node    string    `json:"node"`
}

// Device is something a worker can run models on.
type Device struct {
	Kind            string  `json:"kind"` // gpu, or mig for an instance of one
	Name            string  `json:"name"`
	UUID            string  `json:"uuid,omitempty"`
	MemoryBytes     int64   `json:"memory_bytes"`
	UsedBytes       int64   `json:"used_bytes"`
	OwnBytes        int64   `json:"own_bytes"`   // that the worker takes
	Utilisation     float64 `json:"utilisation"` // 0 to 1
	PowerWatts      float64 `json:"power_watts"`
	PowerLimitWatts float64 `json:"power_limit_watts"`
	EnergyJoules    float64 `json:"energy_joules"` // since the driver was loaded
	Celsius         float64 `json:"celsius"`
}

// LoadState is where a version is in a worker.
type LoadState string

// COLD -> FETCHING -> LOADING -> WARMING -> READY -> DRAINING -> COLD; a fault on the way goes back to COLD with the
// error kept.
const (
	Cold     LoadState = "COLD"
	Fetching LoadState = "FETCHING"
	Loading  LoadState = "LOADING"
	Warming  LoadState = "WARMING"
	Loaded   LoadState = "READY"
	Draining LoadState = "DRAINING"
)

// LoadedVersion is one version in a worker.
type LoadedVersion struct {
	Model       string    `json:"model"`
	Version     int       `json:"version"`
	State       LoadState `json:"state"`
	Error       string    `json:"error,omitempty"`
	MemoryBytes int64     `json:"memory_bytes"`
	Provider    string    `json:"provider,omitempty"`
	Evicted     bool      `json:"evicted,omitempty"` // unloaded to make room; comes back when it is asked for
}

// Hold keeps a version in the workers and out of Retention's reach until it expires.
type Hold struct {
	Model   string    `json:"model"`
	Version int       `json:"version"`
	Holder  string    `json:"holder"` // a run id, or "api:{actor}"
	Until   time.Time `json:"until"`
}

// LatencyCounts counts durations by bucket of monitor.LatencyBucket; sparse.
type LatencyCounts map[int]int64

// Stratum is what one gateway incarnation counted of one arm in one window of time under one route revision.
type Stratum struct {
	Gateway   string        `json:"gateway"`
	Model     string        `json:"model"`
	Revision  int64         `json:"revision"`
	Version   int           `json:"version"`
	Role      Role          `json:"role"`
	Start     time.Time     `json:"start"`
	Requests  int64         `json:"requests"` // attempts that counted: not sheds, not the client's own cancellations
	Errors    int64         `json:"errors"`
	Votes     int64         `json:"votes"` // a sticky key votes once in a vote epoch, and not after its first failure under a revision
	VoteFails int64         `json:"vote_fails"`
	Sheds     int64         `json:"sheds"`
	Cancelled int64         `json:"cancelled"`
	NotFinite int64         `json:"not_finite"` // answers with NaN or Inf in them
	Latency   LatencyCounts `json:"latency"`
	Detail    StratumDetail `json:"detail"`
}

// StratumDetail is what is counted only while a model has more than one arm, or feedback comes.
type StratumDetail struct {
	Callers         int64         `json:"callers,omitempty"`          // seen for the first time in this roll-out
	VoteLatency     LatencyCounts `json:"vote_latency,omitempty"`     // of votes that did not fail; none when every request was a vote
	Outputs         map[int]int64 `json:"outputs,omitempty"`          // of votes: values by monitor.OutputKey
	Gaps            map[int]int64 `json:"gaps,omitempty"`             // shadow: pairs by how far apart the answers are, by monitor.GapBucket
	Pairs           int64         `json:"pairs,omitempty"`            // shadow: requests that both arms were asked
	OnlyFailed      int64         `json:"only_failed,omitempty"`      // shadow: pairs in which the shadow alone failed
	OnlyAnswered    int64         `json:"only_answered,omitempty"`    // shadow: pairs in which the shadow alone answered
	Feedback        int64         `json:"feedback,omitempty"`         // callers that gave a value, each once in a roll-out
	FeedbackSum     float64       `json:"feedback_sum,omitempty"`     //
	FeedbackSquares float64       `json:"feedback_squares,omitempty"` //
}

// StrataFilter selects strata of one model.
type StrataFilter struct {
	Model       string
	MinRevision int64
	MaxRevision int64 // 0 = no upper bound
	// Since leaves out what began earlier; From does so for single gateways, with a time of their own.
	Since time.Time
	From  map[string]time.Time
}

// Tally is where the judge of a run stands: what it has counted, and up to where. Its body is the judge's own.
type Tally struct {
	Run  string
	Body json.RawMessage
}
