package store

import (
	"context"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"gorm.io/gorm"
	"gorm.io/gorm/clause"

	"github.com/orrery-ml/orrery/registry"
)

// tx is one transaction with one clock.
type tx struct {
	*gorm.DB

	now     time.Time
	emitted bool // an event
	served  bool // an event that changes what gateways serve
}

// change runs f in a transaction and rings for the events that it emitted.
func (s *Store) change(ctx context.Context, op string, f func(*tx) error) error {
	t := &tx{}
	err := s.db.WithContext(ctx).Transaction(func(db *gorm.DB) error {
		*t = tx{DB: db, now: time.Now().UTC().Truncate(time.Microsecond)}
		return f(t)
	})
	if err != nil {
		return fault(op, err)
	}
	if t.emitted {
		s.ring(t.served)
	}
	return nil
}

// lockModel reads a model's row and keeps others from changing it until the transaction ends.
func (t *tx) lockModel(name string) (modelRow, error) {
	var row modelRow
	err := t.Clauses(clause.Locking{Strength: "UPDATE"}).Where("name = ?", name).Take(&row).Error
	if errors.Is(err, gorm.ErrRecordNotFound) {
		return row, unknownModel(t.DB, name)
	}
	return row, err
}

func unknownModel(db *gorm.DB, name string) error {
	var names []string
	if err := db.Model(&modelRow{}).Pluck("name", &names).Error; err != nil {
		return err
	}
	if near := registry.Closest(name, names); near != "" {
		return registry.Errorf(registry.NotFound, "no model %q; did you mean %q?", name, near)
	}
	return registry.Errorf(registry.NotFound, "no model %q", name)
}

// fault gives a database error its code. Errors that have one keep it.
func fault(op string, err error) error {
	var coded *registry.Error
	var network net.Error
	var connect *pgconn.ConnectError
	var server *pgconn.PgError
	switch {
	case err == nil, errors.As(err, &coded), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &connect), errors.As(err, &network), errors.Is(err, driver.ErrBadConn), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return &registry.Error{Code: registry.Unavailable, Op: op, Err: fmt.Errorf("registry database: %w", err)}
	case errors.As(err, &server):
		return &registry.Error{Code: serverCode(server.Code), Op: op, Err: err}
	case strings.Contains(err.Error(), "disk is full"): // the driver has no typed error for SQLITE_FULL
		return &registry.Error{Code: registry.StorageFull, Op: op, Err: err}
	}
	return &registry.Error{Code: registry.Internal, Op: op, Err: err}
}

// serverCode maps SQLSTATE classes: 08 connection, 57P shutdown, 53100 disk full, 40 serialisation.
func serverCode(state string) registry.Code {
	switch {
	case strings.HasPrefix(state, "08"), strings.HasPrefix(state, "57P"), strings.HasPrefix(state, "40"):
		return registry.Unavailable
	case state == "53100":
		return registry.StorageFull
	}
	return registry.Internal
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicros(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// encode writes a value as JSON; the values stored here (plain structs, numbers, strings) always marshal, and nil
// becomes "".
func encode(v any) string {
	if v == nil {
		return ""
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	return string(raw)
}

func decode(s string, into any) error {
	if s == "" {
		return nil
	}
	return json.Unmarshal([]byte(s), into)
}
