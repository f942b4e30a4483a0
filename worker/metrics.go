package worker

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// metrics are the worker's Prometheus metrics: histograms that are observed as requests end, and, collected when
// somebody looks, what the engine counts anyway, under Triton's names, so that its dashboards work.
type metrics struct {
	requests *prometheus.HistogramVec
	queue    *prometheus.HistogramVec
	runs     *prometheus.HistogramVec
	batch    *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

var versionLabels = []string{"model", "version"}

func newMetrics(r prometheus.Registerer) *metrics {
	times := func(name, help string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(0.0001, 2, 18), NativeHistogramBucketFactor: 1.1,
		}, versionLabels)
	}
	m := &metrics{
		requests: times("orrery_worker_request_seconds", "Requests that were answered, from arrival to answer."),
		queue:    times("orrery_worker_queue_seconds", "Time that answered requests waited for their batch."),
		runs:     times("orrery_worker_run_seconds", "Runs of the model."),
		batch: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "orrery_worker_batch_rows", Help: "Rows of each run of the model.", Buckets: prometheus.ExponentialBuckets(1, 2, 11),
		}, versionLabels),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orrery_worker_failures_total", Help: "Requests that failed, by the error's code.",
		}, append(versionLabels, "code")),
	}
	r.MustRegister(m.requests, m.queue, m.runs, m.batch, m.failures)
	return m
}

// observer are one version's metrics. A nil one observes nothing.
type observer struct {
	requests, queue, runs, batch prometheus.Observer
	failures                     *prometheus.CounterVec
}

// observer returns a version's metrics; nil when m is.
func (m *metrics) observer(k key) *observer {
	if m == nil {
		return nil
	}
	l := []string{k.model, strconv.Itoa(k.version)}
	return &observer{
		requests: m.requests.WithLabelValues(l...), queue: m.queue.WithLabelValues(l...), runs: m.runs.WithLabelValues(l...),
		batch: m.batch.WithLabelValues(l...), failures: m.failures.MustCurryWith(prometheus.Labels{"model": l[0], "version": l[1]}),
	}
}

func (o *observer) ended(t engine.Timing, took time.Duration, err error) {
	switch {
	case o == nil:
	case err != nil:
		o.failures.WithLabelValues(string(registry.CodeOf(err))).Inc()
	default:
		o.requests.Observe(took.Seconds())
		if !t.CacheHit {
			o.queue.Observe(t.Queue.Seconds())
		}
	}
}

// ran is told of every run, which is cheaper than of every request in it.
func (o *observer) ran(rows int64, took time.Duration) {
	o.runs.Observe(took.Seconds())
	o.batch.Observe(float64(rows))
}

// collector reads what the engine counts when somebody looks.
type collector struct {
	cache   *cache
	devices func() []registry.Device
}

func described(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// perVersion are the metrics of a version with Triton's names.
var perVersion = []struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(engine.Stats) float64
}{
	{described("nv_inference_request_success", "Requests answered.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return float64(s.Success.Count) }},
	{described("nv_inference_request_failure", "Requests failed.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return float64(s.Fail.Count) }},
	{described("nv_inference_count", "Rows inferred.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return float64(s.Rows) }},
	{described("nv_inference_exec_count", "Runs.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return float64(s.Executions) }},
	{described("nv_inference_pending_request_count", "Rows that wait.", versionLabels...), prometheus.GaugeValue, func(s engine.Stats) float64 { return float64(s.Queued) }},
	{described("nv_inference_request_duration_us", "Time of requests, arrival to answer.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return micros(s.Success) }},
	{described("nv_inference_queue_duration_us", "Time requests waited.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return micros(s.Queue) }},
	{described("nv_inference_compute_input_duration_us", "Time of joining batches.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return micros(s.Input) }},
	{described("nv_inference_compute_infer_duration_us", "Time of runs.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return micros(s.Infer) }},
	{described("nv_inference_compute_output_duration_us", "Time of taking batches apart.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return micros(s.Output) }},
	{described("nv_cache_num_hits_per_model", "Answers from the cache.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return float64(s.CacheHit.Count) }},
	{described("nv_cache_num_misses_per_model", "Requests the cache did not know.", versionLabels...), prometheus.CounterValue, func(s engine.Stats) float64 { return float64(s.CacheMiss.Count) }},
	{described("orrery_worker_version_memory_bytes", "Memory that loading the version took.", versionLabels...), prometheus.GaugeValue, func(s engine.Stats) float64 { return float64(s.Memory) }},
}

func micros(s engine.Sum) float64 { return float64(s.Time.Microseconds()) }

var (
	reasonsDesc = described("orrery_worker_decisions_total", "Batches dispatched and requests shed, by reason.", append(versionLabels, "reason")...)
	gpuDescs    = map[string]*prometheus.Desc{
		"memory_total": described("nv_gpu_memory_total_bytes", "Memory of the GPU.", "gpu_uuid"),
		"memory_used":  described("nv_gpu_memory_used_bytes", "Memory of the GPU in use.", "gpu_uuid"),
		"utilisation":  described("nv_gpu_utilization", "Share of time the GPU worked, 0 to 1.", "gpu_uuid"),
		"power":        described("nv_gpu_power_usage", "Power of the GPU, watts.", "gpu_uuid"),
		"power_limit":  described("nv_gpu_power_limit", "Limit of the GPU's power, watts.", "gpu_uuid"),
		"energy":       described("nv_energy_consumption", "Energy of the GPU since the driver was loaded, joules.", "gpu_uuid"),
		"temperature":  described("orrery_gpu_temperature_celsius", "Temperature of the GPU.", "gpu_uuid"),
		"own":          described("orrery_gpu_process_memory_bytes", "Memory of the GPU that this worker takes.", "gpu_uuid"),
	}
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range perVersion {
		out <- m.desc
	}
	out <- reasonsDesc
	for _, d := range gpuDescs {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	for _, v := range c.cache.ready() {
		number := strconv.Itoa(v.version)
		for _, m := range perVersion {
			out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(v.stats), v.model, number)
		}
		for reason, n := range v.stats.Reasons {
			out <- prometheus.MustNewConstMetric(reasonsDesc, prometheus.CounterValue, float64(n), v.model, number, reason)
		}
	}
	for _, d := range c.devices() {
		for name, value := range map[string]float64{
			"memory_total": float64(d.MemoryBytes), "memory_used": float64(d.UsedBytes), "utilisation": d.Utilisation, "power": d.PowerWatts,
			"power_limit": d.PowerLimitWatts, "temperature": d.Celsius, "own": float64(d.OwnBytes),
		} {
			out <- prometheus.MustNewConstMetric(gpuDescs[name], prometheus.GaugeValue, value, d.UUID)
		}
		out <- prometheus.MustNewConstMetric(gpuDescs["energy"], prometheus.CounterValue, d.EnergyJoules, d.UUID)
	}
}
