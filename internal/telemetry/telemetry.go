// Package telemetry sends OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT says, and carries the W3C trace context
// over gRPC metadata. Without that variable it costs nothing. It decides what a span of Orrery looks like; it refuses to
// decide what is worth one.
package telemetry

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"
)

// Endpoint is the environment variable that turns tracing on; the exporter reads it and its companions by itself.
const Endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT"

// enabled says that spans go somewhere.
var enabled atomic.Bool

// Start sends the spans of this process to the collector that the environment names, if it names one. The returned
// function sends what is left and stops.
func Start(ctx context.Context, service string, getenv func(string) string) (stop func(context.Context) error, err error) {
	if getenv(Endpoint) == "" {
		return func(context.Context) error { return nil }, nil
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", Endpoint, err)
	}
	return StartWith(exporter, service), nil
}

// StartWith sends the spans of this process to an exporter.
func StartWith(exporter sdktrace.SpanExporter, service string) (stop func(context.Context) error) {
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", service))))
	otel.SetTracerProvider(provider)
	enabled.Store(true)
	return func(ctx context.Context) error {
		enabled.Store(false)
		return provider.Shutdown(ctx)
	}
}

// Tracer makes spans.
type Tracer struct{ name string }

// NewTracer names the part of Orrery that spans come from.
func NewTracer(name string) Tracer { return Tracer{name} }

// Span is one piece of work. Its zero value records nothing.
type Span struct {
	span   trace.Span
	tracer trace.Tracer
	ctx    context.Context //nolint:containedctx // of children that are told afterwards
}

// Start begins a span about a model. Its parent is the span in ctx or, when there is none, the one that came in the
// metadata of the call.
func (t Tracer) Start(ctx context.Context, name, model string) (context.Context, Span) {
	if !enabled.Load() {
		return ctx, Span{}
	}
	if !trace.SpanContextFromContext(ctx).IsValid() {
		if md, ok := metadata.FromIncomingContext(ctx); ok {
			ctx = propagation.TraceContext{}.Extract(ctx, carrier(md))
		}
	}
	tracer := otel.Tracer(t.name)
	ctx, span := tracer.Start(ctx, name, trace.WithAttributes(attribute.String("orrery.model", model)))
	return ctx, Span{span, tracer, ctx}
}

// Set adds a number to the span.
func (s Span) Set(name string, value int64) {
	if s.span != nil {
		s.span.SetAttributes(attribute.Int64("orrery."+name, value))
	}
}

// Timing adds the wait in the queue and the run as children, from the times that were measured.
func (s Span) Timing(began time.Time, queue, run time.Duration, rows int64) {
	if s.span == nil {
		return
	}
	for _, part := range []struct {
		name     string
		from, to time.Time
	}{{"queue", began, began.Add(queue)}, {"run", began.Add(queue), began.Add(queue + run)}} {
		_, child := s.tracer.Start(s.ctx, part.name, trace.WithTimestamp(part.from), trace.WithAttributes(attribute.Int64("orrery.batch_rows", rows)))
		child.End(trace.WithTimestamp(part.to))
	}
}

// End ends the span.
func (s Span) End(err error) {
	if s.span == nil {
		return
	}
	if err != nil {
		s.span.SetStatus(codes.Error, err.Error())
	}
	s.span.End()
}

// Inject puts the trace context into the metadata of an outgoing call.
func Inject(ctx context.Context, md metadata.MD) {
	if enabled.Load() {
		propagation.TraceContext{}.Inject(ctx, carrier(md))
	}
}

// carrier reads and writes trace context in metadata.
type carrier metadata.MD

// Get implements propagation.TextMapCarrier.
func (c carrier) Get(key string) string {
	if v := metadata.MD(c).Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// Set implements propagation.TextMapCarrier.
func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }

// Keys implements propagation.TextMapCarrier.
func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, k)
	}
	return keys
}
