package registry

import (
	"errors"
	"fmt"
)

// Code classifies an error for machines: it is the `code` of a problem+json body and decides the HTTP and gRPC
// status and whether a workflow retries. Codes are append-only.
type Code string

// The codes an operation of Orrery can end in.
const (
	Invalid         Code = "invalid"          // the request can never succeed as it is
	Unauthenticated Code = "unauthenticated"  // no key, or one that is not known
	Denied          Code = "denied"           // the key may not do this
	NotFound        Code = "not_found"        // the named thing does not exist
	Exists          Code = "already_exists"   // the name is taken by something else
	Conflict        Code = "conflict"         // the state moved on, or somebody else owns it
	Precondition    Code = "not_ready"        // the thing exists but is in the wrong state for this
	TooLarge        Code = "too_large"        // over a stated limit
	Exhausted       Code = "overloaded"       // try again later, see retry-after
	Unavailable     Code = "unavailable"      // a component this needs is down
	StorageFull     Code = "storage_full"     // no space left where it must be written
	Corrupt         Code = "corrupt_artifact" // bytes do not match their digest
	Unsupported     Code = "unsupported"      // this build or server cannot do it
	Internal        Code = "internal"         // a fault of Orrery; the text stays in the log
)

// Error is an error with a code. Op says what was attempted, Err why it failed.
type Error struct {
	Code Code
	Op   string
	Err  error
}

// Error returns "op: cause", or the cause alone when no op was given.
func (e *Error) Error() string {
	if e.Op == "" {
		return e.Err.Error()
	}
	return e.Op + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error of the given code; the format may wrap with %w.
func Errorf(code Code, format string, args ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, args...)}
}

// CodeOf returns the code of the outermost Error in the chain, Internal for any other error and "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return Internal
}
