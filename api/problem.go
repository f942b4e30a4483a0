package api

import (
	"errors"
	"log/slog"
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/orrery-ml/orrery/registry"
)

// statuses maps codes to HTTP.
var statuses = map[registry.Code]int{
	registry.Invalid: http.StatusBadRequest, registry.Unauthenticated: http.StatusUnauthorized, registry.Denied: http.StatusForbidden,
	registry.NotFound: http.StatusNotFound, registry.Exists: http.StatusConflict, registry.Conflict: http.StatusConflict,
	registry.Precondition: http.StatusConflict, registry.TooLarge: http.StatusRequestEntityTooLarge,
	registry.Exhausted: http.StatusTooManyRequests, registry.Unavailable: http.StatusServiceUnavailable,
	registry.StorageFull: http.StatusInsufficientStorage, registry.Corrupt: http.StatusUnprocessableEntity,
	registry.Unsupported: http.StatusNotImplemented,
}

// fail answers with problem+json. Only internal faults are logged, and their text is hidden.
func (s *Server) fail(c *gin.Context, err error) {
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		err = registry.Errorf(registry.TooLarge, "the body is over %d bytes", tooLarge.Limit)
	}
	code := registry.CodeOf(err)
	status, known := statuses[code]
	p := Problem{Type: "about:blank", Code: string(code), Detail: err.Error(), Status: status}
	if !known {
		s.log.Error("request failed", "method", c.Request.Method, "path", c.FullPath(), "error", err)
		p.Status, p.Code, p.Detail = http.StatusInternalServerError, string(registry.Internal), "a fault of the server; its log says more"
	}
	p.Title = http.StatusText(p.Status)
	if p.Status == http.StatusServiceUnavailable || p.Status == http.StatusTooManyRequests {
		c.Header("Retry-After", "1")
	}
	c.Header("Content-Type", "application/problem+json")
	c.AbortWithStatusJSON(p.Status, p)
}

// badRequest gives faults of decoding their code.
func (s *Server) badRequest(c *gin.Context, err error) {
	var coded *registry.Error
	var tooLarge *http.MaxBytesError
	if !errors.As(err, &coded) && !errors.As(err, &tooLarge) {
		err = registry.Errorf(registry.Invalid, "%w", err)
	}
	s.fail(c, err)
}

// recovered turns a panic into a 500 that says nothing, and logs it.
func recovered(log *slog.Logger) gin.RecoveryFunc {
	return func(c *gin.Context, v any) {
		log.Error("a handler panicked", "path", c.FullPath(), "panic", v)
		c.AbortWithStatus(http.StatusInternalServerError)
	}
}
