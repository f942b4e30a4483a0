package registry

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Model is a name under which versions live, and the unit of traffic.
type Model struct {
	Name           string
	Description    string
	Config         ServingConfig
	ConfigRevision int64
	Retrain        RetrainPolicy
	Rollout        RolloutPolicy
	CreatedAt      time.Time
	CreatedBy      string
}

// Recording says what a gateway keeps of a model's traffic.
type Recording string

// The ways of recording. RecordRows keeps profiles too.
const (
	RecordOff     Recording = "off"
	RecordProfile Recording = "profile" // mergeable profiles only; no raw value leaves memory
	RecordRows    Recording = "rows"    // inference records, one per row, besides profiles
)

// Batching names a policy of forming batches.
type Batching string

// The policies. BatchStatic is Triton's dynamic batcher: a fixed delay, no regard to deadlines.
const (
	BatchDeadline Batching = "deadline"
	BatchStatic   Batching = "static"
)

// ServingConfig says how workers and gateways serve a model, apart from which version.
type ServingConfig struct {
	Batching        Batching          `json:"batching"`         // when batches run: deadline or static; "" = deadline
	MaxBatch        int               `json:"max_batch"`        // rows per run of the session; 1 turns batching off
	BatchSizes      []int             `json:"batch_sizes"`      // sizes a batch is padded up to, ascending; none: it runs as it is
	MaxDelayMicros  int64             `json:"max_delay_us"`     // longest a request waits for company while the device is idle
	QueueRows       int               `json:"queue_rows"`       // rows that may wait; more are shed
	QueueBytes      int64             `json:"queue_bytes"`      // bytes of inputs that may wait; 0 = 256 MiB
	Runners         int               `json:"runners"`          // concurrent runs on the one session
	Threads         int               `json:"threads"`          // intra-op threads of a run, out of the worker's budget
	Weight          float64           `json:"weight"`           // share of the worker when other models want it too; 0 = 1
	Provider        string            `json:"provider"`         // execution provider: cpu, cuda, tensorrt, …
	ProviderOptions map[string]string `json:"provider_options"` // passed through to Provider
	Fallback        string            `json:"fallback"`         // provider used when Provider is not there; "" = fail
	CacheBytes      int64             `json:"cache_bytes"`      // answers kept by their inputs, in every worker; 0 = none
	Replicas        int               `json:"replicas"`         // workers that hold the model; 0 = all
	WorkerLabels    map[string]string `json:"worker_labels"`    // labels a worker must have to hold the model
	KeepAliveSecs   int64             `json:"keep_alive_s"`     // idle time before an unleased version is unloaded
	P99Millis       float64           `json:"p99_objective_ms"` // absolute latency guardrail; 0 = none
	ErrorRateLimit  float64           `json:"error_rate_limit"` // absolute error guardrail in [0,1]; 0 = none
	Recording       Recording         `json:"recording"`        // off, profile or rows
	SampleRate      float64           `json:"sample_rate"`      // share of rows recorded, in (0,1]
	StickyHeader    string            `json:"sticky_header"`    // header whose value keeps a caller on one arm
	TimeoutMillis   int64             `json:"timeout_ms"`       // deadline of a request that brings none
	MaxRequestRows  int               `json:"max_request_rows"` // rows one request may carry
	RecordKeepDays  int               `json:"record_keep_days"` // age at which Retention deletes records and profiles
}

// DefaultServingConfig is what a new model gets.
func DefaultServingConfig() ServingConfig {
	return ServingConfig{
		Batching: BatchDeadline, MaxBatch: 32, MaxDelayMicros: 0, QueueRows: 4096, Runners: 1, Threads: 1, Provider: "cpu",
		KeepAliveSecs: 600, Recording: RecordProfile, SampleRate: 1, StickyHeader: "X-Orrery-Key",
		TimeoutMillis: 10_000, MaxRequestRows: 1024, RecordKeepDays: 30,
	}
}

// Validate returns one Invalid error that names every field out of range.
func (c ServingConfig) Validate() error {
	var faults []string
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	}
	check(c.MaxBatch >= 1 && c.MaxBatch <= 1<<16, "max_batch %d: want 1 to 65536", c.MaxBatch)
	check(c.Batching == "" || c.Batching == BatchDeadline || c.Batching == BatchStatic, "batching %q: want deadline or static", c.Batching)
	check(slices.IsSorted(c.BatchSizes) && (len(c.BatchSizes) == 0 || c.BatchSizes[0] >= 1 && slices.Max(c.BatchSizes) >= c.MaxBatch),
		"batch_sizes %v: want ascending sizes from 1, up to at least max_batch %d", c.BatchSizes, c.MaxBatch)
	check(c.QueueBytes >= 0, "queue_bytes %d: want 0 (256 MiB) or more", c.QueueBytes)
	check(c.Weight >= 0 && c.Weight <= 1000, "weight %v: want 0 (1) to 1000", c.Weight)
	check(c.CacheBytes >= 0, "cache_bytes %d: want 0 (none) or more", c.CacheBytes)
	check(c.MaxDelayMicros >= 0 && c.MaxDelayMicros <= 10_000_000, "max_delay_us %d: want 0 to 10000000", c.MaxDelayMicros)
	check(c.QueueRows >= 1, "queue_rows %d: want at least 1", c.QueueRows)
	check(c.Runners >= 1 && c.Runners <= 256, "runners %d: want 1 to 256", c.Runners)
	check(c.Threads >= 1 && c.Threads <= 256, "threads %d: want 1 to 256", c.Threads)
	check(c.Provider != "", "provider: missing")
	check(c.Replicas >= 0, "replicas %d: want 0 (all) or more", c.Replicas)
	check(c.KeepAliveSecs >= 0, "keep_alive_s %d: want 0 or more", c.KeepAliveSecs)
	check(c.P99Millis >= 0, "p99_objective_ms %v: want 0 (none) or more", c.P99Millis)
	check(c.ErrorRateLimit >= 0 && c.ErrorRateLimit <= 1, "error_rate_limit %v: want 0 to 1", c.ErrorRateLimit)
	check(c.Recording == RecordOff || c.Recording == RecordProfile || c.Recording == RecordRows,
		"recording %q: want off, profile or rows", c.Recording)
	check(c.SampleRate > 0 && c.SampleRate <= 1, "sample_rate %v: want more than 0 and at most 1", c.SampleRate)
	check(c.TimeoutMillis >= 1, "timeout_ms %d: want at least 1", c.TimeoutMillis)
	check(c.MaxRequestRows >= 1, "max_request_rows %d: want at least 1", c.MaxRequestRows)
	check(c.RecordKeepDays >= 1, "record_keep_days %d: want at least 1", c.RecordKeepDays)
	if len(faults) > 0 {
		return Errorf(Invalid, "serving config: %s", strings.Join(faults, "; "))
	}
	return nil
}

// RetrainPolicy says when and how a model is trained again, and what the challenger must show.
type RetrainPolicy struct {
	Trainer         string  `json:"trainer"`          // entry of the orchestrator's configuration; "" = never retrain
	CooldownSecs    int64   `json:"cooldown_s"`       // least time between two retrainings
	MaxPer30Days    int     `json:"max_per_30_days"`  // budget
	MinLabels       int     `json:"min_labels"`       // labelled rows needed
	LabelColumn     string  `json:"label_column"`     // name of the label column in the training data
	Metric          string  `json:"metric"`           // logloss or brier; lower is better
	MinGain         float64 `json:"min_gain"`         // relative improvement over the champion on the same rows
	RequireApproval bool    `json:"require_approval"` // a person approves the challenger's roll-out
	MinDriftShare   float64 `json:"min_drift_share"`  // share of drifted features a drift report must show
}

// DefaultRetrainPolicy is what a new model gets: no trainer, so no retraining.
func DefaultRetrainPolicy() RetrainPolicy {
	return RetrainPolicy{
		CooldownSecs: 24 * 3600, MaxPer30Days: 10, MinLabels: 500, LabelColumn: "label", Metric: "logloss",
		MinGain: 0.01, MinDriftShare: 0.3,
	}
}

// Validate returns one Invalid error that names every field out of range.
func (p RetrainPolicy) Validate() error {
	var faults []string
	if p.CooldownSecs < 0 {
		faults = append(faults, fmt.Sprintf("cooldown_s %d: want 0 or more", p.CooldownSecs))
	}
	if p.MaxPer30Days < 1 {
		faults = append(faults, fmt.Sprintf("max_per_30_days %d: want at least 1", p.MaxPer30Days))
	}
	if p.MinLabels < 2 {
		faults = append(faults, fmt.Sprintf("min_labels %d: want at least 2", p.MinLabels))
	}
	if p.LabelColumn == "" {
		faults = append(faults, "label_column: missing")
	}
	if p.Metric != "logloss" && p.Metric != "brier" {
		faults = append(faults, fmt.Sprintf("metric %q: want logloss or brier", p.Metric))
	}
	if p.MinDriftShare < 0 || p.MinDriftShare > 1 {
		faults = append(faults, fmt.Sprintf("min_drift_share %v: want 0 to 1", p.MinDriftShare))
	}
	if len(faults) > 0 {
		return Errorf(Invalid, "retrain policy: %s", strings.Join(faults, "; "))
	}
	return nil
}
