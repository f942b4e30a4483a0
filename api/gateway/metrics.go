package gateway

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are a gateway's Prometheus metrics.
type Metrics struct{ inner *metrics }

type metrics struct {
	requests *prometheus.HistogramVec
	failures *prometheus.CounterVec
	retries  prometheus.Counter
	mirrors  *prometheus.CounterVec
}

// NewMetrics registers the metrics.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "orrery_gateway_request_seconds", Help: "Duration of attempts by model, version and role.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 18), NativeHistogramBucketFactor: 1.1,
		}, []string{"model", "version", "role"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orrery_gateway_failures_total", Help: "Attempts that failed, by gRPC code.",
		}, []string{"model", "version", "role", "code"}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "orrery_gateway_retries_total", Help: "Requests tried again on another worker.",
		}),
		mirrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orrery_gateway_mirrored_total", Help: "Requests mirrored to a shadow, and those dropped because too many were under way.",
		}, []string{"model", "result"}),
	}
	r.MustRegister(m.requests, m.failures, m.retries, m.mirrors)
	return &Metrics{inner: m}
}

func (m *metrics) observe(model, version, role, code string, took time.Duration, ok bool) {
	m.requests.WithLabelValues(model, version, role).Observe(took.Seconds())
	if !ok {
		m.failures.WithLabelValues(model, version, role, code).Inc()
	}
}
