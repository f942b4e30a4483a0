package store

import (
	"context"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
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

// news is an event and what it says.
type news struct {
	registry.Event

	data any
}

// emit takes the next event number, writes the event and returns the number. The counter's row stays locked until the
// transaction ends, so f should do little after its first emit.
func (t *tx) emit(e registry.Event, data any) (int64, error) {
	return t.emitAll(news{e, data})
}

// emitAll is emit for several events at once; it returns the number of the first.
func (t *tx) emitAll(list ...news) (first int64, err error) {
	rows := make([]eventRow, len(list))
	for i, e := range list {
		rows[i] = eventRow{
			At: micros(t.now), Type: string(e.Type), Model: e.Model, Version: e.Version, Run: e.Run, Actor: e.Actor, Data: encode(e.data),
		}
	}
	served := slices.ContainsFunc(list, func(n news) bool { return n.Type.Served() })
	if t.Name() == "postgres" {
		first, err = t.announce(rows, served)
	} else {
		first, err = t.number(rows)
	}
	t.emitted, t.served = true, t.served || served
	return first, err
}

// number gives events their numbers and writes them.
func (t *tx) number(rows []eventRow) (first int64, err error) {
	var last int64
	take := t.Raw("UPDATE counters SET value = value + ? WHERE name = 'event' RETURNING value", len(rows))
	if err := take.Row().Scan(&last); err != nil {
		return 0, err
	}
	first = last - int64(len(rows)) + 1
	for i := range rows {
		rows[i].Number = first + int64(i)
	}
	return first, t.Create(&rows).Error
}

// announce is number in one statement, which also rings at the commit: once for all events of a transaction.
func (t *tx) announce(rows []eventRow, served bool) (first int64, err error) {
	args, values := []any{len(rows), len(rows)}, make([]string, len(rows))
	for i, r := range rows {
		values[i] = "(?::bigint, ?::bigint, ?, ?, ?::bigint, ?, ?, ?)"
		args = append(args, i+1, r.At, r.Type, r.Model, r.Version, r.Run, r.Actor, r.Data)
	}
	ring := "''"
	if !t.emitted || served && !t.served {
		say := unserved
		if served {
			say = ""
		}
		ring = "pg_notify('" + channel + "', '" + say + "')::text"
	}
	err = t.Raw(`WITH taken AS (UPDATE counters SET value = value + ? WHERE name = 'event' RETURNING value - ? AS before),
		written AS (INSERT INTO events (number, at, type, model, version, run, actor, data)
			SELECT before + nth, e.at, e.type, e.model, e.version, e.run, e.actor, e.data
			FROM taken, (VALUES `+strings.Join(values, ", ")+`) AS e (nth, at, type, model, version, run, actor, data))
		SELECT before + 1, `+ring+` FROM taken`, args...).Row().Scan(&first, new(string))
	return first, err
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
