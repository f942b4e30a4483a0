package oip

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// grpcCodes maps Orrery's error codes (registry.Code) to gRPC's.
var grpcCodes = map[string]codes.Code{
	"invalid": codes.InvalidArgument, "unauthenticated": codes.Unauthenticated, "denied": codes.PermissionDenied,
	"not_found": codes.NotFound, "already_exists": codes.AlreadyExists, "conflict": codes.Aborted,
	"not_ready": codes.FailedPrecondition, "too_large": codes.ResourceExhausted, "overloaded": codes.ResourceExhausted,
	"unavailable": codes.Unavailable, "storage_full": codes.ResourceExhausted, "unsupported": codes.Unimplemented,
}

// Status makes a gRPC status of an error and its code (registry.CodeOf). retryAfter, when positive, travels as
// google.rpc.RetryInfo and becomes Retry-After over REST.
func Status(code string, err error, retryAfter time.Duration) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, context.Canceled):
		return status.FromContextError(context.Canceled).Err()
	case errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(context.DeadlineExceeded).Err()
	}
	c, ok := grpcCodes[code]
	if !ok {
		c = codes.Internal
	}
	s := status.New(c, err.Error())
	if retryAfter > 0 {
		if with, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)}); err == nil {
			s = with
		}
	}
	return s.Err()
}

// httpStatuses maps gRPC codes to HTTP as the protocol's servers do; Unavailable and exhausted answers differ from an
// error of the request, so clients can tell what to retry.
var httpStatuses = map[codes.Code]int{
	codes.OK: http.StatusOK, codes.InvalidArgument: http.StatusBadRequest, codes.NotFound: http.StatusNotFound,
	codes.Unauthenticated: http.StatusUnauthorized, codes.PermissionDenied: http.StatusForbidden,
	codes.AlreadyExists: http.StatusConflict, codes.Aborted: http.StatusConflict, codes.FailedPrecondition: http.StatusConflict,
	codes.ResourceExhausted: http.StatusTooManyRequests, codes.Unavailable: http.StatusServiceUnavailable,
	codes.Unimplemented: http.StatusNotImplemented, codes.DeadlineExceeded: http.StatusGatewayTimeout,
	codes.Canceled: 499,
}

// HTTPStatus returns the HTTP status of a gRPC error and the seconds of Retry-After, "" for none.
func HTTPStatus(err error) (code int, retryAfter string) {
	s := status.Convert(err)
	code, ok := httpStatuses[s.Code()]
	if !ok {
		code = http.StatusInternalServerError
	}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			seconds := max(1, int(info.GetRetryDelay().AsDuration().Round(time.Second)/time.Second))
			return code, strconv.Itoa(seconds)
		}
	}
	return code, ""
}
