package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orrery-ml/orrery/internal/build"
	"github.com/orrery-ml/orrery/registry"
)

const (
	answerLife  = 24 * time.Hour // of a remembered answer
	reserveLife = time.Minute    // of a claim whose request never ended: a crash gives the key free after this
)

// idempotent answers a POST that repeats an Idempotency-Key with what the first one was answered. Only answers that
// did something are remembered: after an error the key is free again.
func (s *Server) idempotent(c *gin.Context) {
	key := c.GetHeader("Idempotency-Key")
	if key == "" || c.Request.Method != http.MethodPost {
		return
	}
	body, err := io.ReadAll(c.Request.Body)
	if err != nil {
		s.badRequest(c, err)
		return
	}
	c.Request.Body = io.NopCloser(bytes.NewReader(body))
	sum := sha256.Sum256(body)
	claim := registry.Idempotent{
		Actor: actor(c.Request.Context()), Path: c.Request.URL.Path, Key: key, BodyHash: hex.EncodeToString(sum[:]),
		Expires: time.Now().Add(reserveLife),
	}
	known, fresh, err := s.store.Reserve(c.Request.Context(), claim)
	switch {
	case err != nil:
		s.fail(c, err)
	case !fresh:
		c.Header("Location", known.Location)
		c.Header("Idempotent-Replay", "true")
		c.Data(known.Status, "application/json", known.Body)
		c.Abort()
	default:
		s.answerOnce(c, claim)
	}
}

func (s *Server) answerOnce(c *gin.Context, claim registry.Idempotent) {
	w := &copyWriter{ResponseWriter: c.Writer}
	c.Writer = w
	c.Next()
	if code := w.Status(); code < http.StatusBadRequest {
		claim.Status, claim.Location, claim.Body, claim.Expires = code, w.Header().Get("Location"), w.copy.Bytes(), time.Now().Add(answerLife)
	}
	if err := s.store.Remember(c.Request.Context(), claim); err != nil {
		s.log.Warn("remember an answer", "path", claim.Path, "error", err)
	}
}

// copyWriter keeps a copy of the answer.
type copyWriter struct {
	gin.ResponseWriter

	copy bytes.Buffer
}

func (w *copyWriter) Write(p []byte) (int, error) {
	w.copy.Write(p)
	return w.ResponseWriter.Write(p)
}

func (w *copyWriter) WriteString(p string) (int, error) {
	w.copy.WriteString(p)
	return w.ResponseWriter.WriteString(p)
}

func strictJSON(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

func version() string { return build.Version() }
