package oip

import (
	"compress/zlib"
	"context"
	"io"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // so that calls compressed with it are understood
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// deflate is gRPC's "deflate", a zlib stream, which tritonclient offers and grpc-go does not bring.
type deflate struct{}

func (deflate) Name() string { return "deflate" }

func (deflate) Compress(w io.Writer) (io.WriteCloser, error) { return zlib.NewWriter(w), nil }

func (deflate) Decompress(r io.Reader) (io.Reader, error) { return zlib.NewReader(r) }

var registerOnce sync.Once

// RegisterCompressors teaches gRPC the compressions of the protocol's clients. It is called before the first server or
// client is made.
func RegisterCompressors() {
	registerOnce.Do(func() { encoding.RegisterCompressor(deflate{}) })
}

// Health is gRPC's own health service over the protocol's readiness.
type Health struct {
	healthpb.UnimplementedHealthServer

	Ready func(context.Context) bool
}

// Check implements the service for the server as a whole.
func (h Health) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if s := r.GetService(); s != "" && s != "inference.GRPCInferenceService" {
		return nil, status.Errorf(codes.NotFound, "no service %q", s)
	}
	if h.Ready(ctx) {
		return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_NOT_SERVING}, nil
}
