package activities

import (
	"errors"

	"go.temporal.io/sdk/temporal"

	"github.com/orrery-ml/orrery/registry"
)

// final are the codes that no retry can help: the request itself is wrong, or the world moved on.
var final = map[registry.Code]bool{
	registry.Invalid: true, registry.NotFound: true, registry.Exists: true, registry.Conflict: true, registry.Denied: true,
	registry.Precondition: true, registry.TooLarge: true, registry.Corrupt: true, registry.Unsupported: true,
}

// Fault translates an error for Temporal: its type is the registry's code, and final codes are not retried. It is the
// only place where that is decided.
func Fault(err error) error {
	if err == nil {
		return nil
	}
	if already, ok := errors.AsType[*temporal.ApplicationError](err); ok {
		return already
	}
	if temporal.IsCanceledError(err) {
		return err
	}
	code := registry.CodeOf(err)
	return temporal.NewApplicationErrorWithOptions(err.Error(), string(code), temporal.ApplicationErrorOptions{NonRetryable: final[code], Cause: err})
}

// CodeOf returns the registry's code of an error that came through Temporal, Internal when it has none.
func CodeOf(err error) registry.Code {
	if app, ok := errors.AsType[*temporal.ApplicationError](err); ok {
		return registry.Code(app.Type())
	}
	return registry.CodeOf(err)
}

// Reason returns the innermost message of an error that came through Temporal: what a person wants to read.
func Reason(err error) string {
	if app, ok := errors.AsType[*temporal.ApplicationError](err); ok {
		return app.Message()
	}
	if timeout, ok := errors.AsType[*temporal.TimeoutError](err); ok {
		return "timed out: " + timeout.Message()
	}
	return err.Error()
}
