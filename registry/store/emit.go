package store

import (
	"context"
	"database/sql"
	"errors"
	"regexp"
	"strconv"
	"strings"
	"time"

	"gorm.io/gorm"

	"github.com/orrery-ml/orrery/registry"
)

// news is an event and what it says.
type news struct {
	registry.Event

	data any
}

// statement changes rows. Beside emitAll it may write the numbers of the events that say so: number returns the nth
// one's, as SQL where it is not known yet.
type statement func(db *gorm.DB, number func(nth int) any) *gorm.DB

// emit takes the next event number, writes the event and returns the number. The counter's row stays locked until the
// transaction ends, so little should follow the first emit.
func (t *tx) emit(e registry.Event, data any) (int64, error) {
	return t.emitAll([]news{{e, data}})
}

// emitAll is emit for several events, and statements, at once; it returns the number of the first event. On PostgreSQL
// it is one turn, which also rings at the commit.
func (t *tx) emitAll(list []news, also ...statement) (first int64, err error) {
	rows, served := rowsOf(list, t.now)
	if t.Name() == "postgres" {
		var p parts
		p.announce(rows, served, "")
		for _, s := range also {
			p.add("also"+strconv.Itoa(len(p.text)), s(t.Session(&gorm.Session{DryRun: true}), numberLater))
		}
		first, err = p.run(t.DB)
	} else {
		first, err = t.number(rows)
		for i := 0; i < len(also) && err == nil; i++ {
			err = also[i](t.DB, func(nth int) any { return first + int64(nth) }).Error
		}
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

// once makes a change that is one statement, with the events that say so, and rings. Nothing is said, and it returns
// false, when the statement changes no row. On PostgreSQL it is one turn instead of a transaction's five.
func (s *Store) once(ctx context.Context, op string, now time.Time, change statement, list ...news) (bool, error) {
	db, done := s.db.WithContext(ctx), false
	switch {
	case len(list) == 0:
		made := change(db, nil)
		return made.RowsAffected > 0, fault(op, made.Error)
	case db.Name() != "postgres":
		err := s.change(ctx, op, func(t *tx) error {
			made := change(t.DB, nil)
			if done = made.RowsAffected > 0; made.Error != nil || !done {
				return made.Error
			}
			t.now = now
			_, err := t.emitAll(list)
			return err
		})
		return done && err == nil, err
	}
	rows, served := rowsOf(list, now)
	var p parts
	p.add("done", change(db.Session(&gorm.Session{DryRun: true}), nil))
	p.announce(rows, served, " AND EXISTS (SELECT FROM done)")
	_, err := p.run(db)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	if err == nil {
		s.ring(served)
	}
	return err == nil, fault(op, err)
}

// rowsOf are the rows of events without their numbers, and whether one of them changes what gateways serve.
func rowsOf(list []news, now time.Time) (rows []eventRow, served bool) {
	for _, e := range list {
		rows = append(rows, eventRow{
			At: micros(now), Type: string(e.Type), Model: e.Model, Version: e.Version, Run: e.Run, Actor: e.Actor, Data: encode(e.data),
		})
		served = served || e.Type.Served()
	}
	return rows, served
}

// parts are the parts of one statement for PostgreSQL, which make a change, number the events that say so, write them
// and ring.
type parts struct {
	text []string
	args []any
	ring string
	err  error
}

// numberLater is the number of the nth event, in parts of the statement that numbers them.
func numberLater(nth int) any { return gorm.Expr("(SELECT before + ? FROM taken)", nth+1) }

var place = regexp.MustCompile(`\$[0-9]+`)

// add adds a statement that was not executed.
func (p *parts) add(name string, made *gorm.DB) {
	before := len(p.args)
	p.err = errors.Join(p.err, made.Error)
	p.args = append(p.args, made.Statement.Vars...)
	p.text = append(p.text, name+" AS ("+place.ReplaceAllStringFunc(made.Statement.SQL.String(), func(s string) string {
		n, _ := strconv.Atoi(s[1:]) // digits
		return "$" + strconv.Itoa(before+n)
	})+" RETURNING 1)")
}

func (p *parts) arg(v any, kind string) string {
	p.args = append(p.args, v)
	return "$" + strconv.Itoa(len(p.args)) + "::" + kind
}

// announce numbers and writes events, if the condition holds.
func (p *parts) announce(rows []eventRow, served bool, condition string) {
	values := make([]string, len(rows))
	for i, r := range rows {
		values[i] = "(" + strings.Join([]string{
			p.arg(i+1, "bigint"), p.arg(r.At, "bigint"), p.arg(r.Type, "text"), p.arg(r.Model, "text"), p.arg(r.Version, "bigint"),
			p.arg(r.Run, "text"), p.arg(r.Actor, "text"), p.arg(r.Data, "text"),
		}, ", ") + ")"
	}
	n := p.arg(len(rows), "bigint")
	p.text = append(p.text,
		"taken AS (UPDATE counters SET value = value + "+n+" WHERE name = 'event'"+condition+" RETURNING value - "+n+" AS before)",
		`written AS (INSERT INTO events (number, at, type, model, version, run, actor, data)
			SELECT before + nth, e.at, e.type, e.model, e.version, e.run, e.actor, e.data
			FROM taken, (VALUES `+strings.Join(values, ", ")+`) AS e (nth, at, type, model, version, run, actor, data))`)
	p.ring = "pg_notify('" + eventChannel + "', '')::text"
	if served {
		p.ring += " || pg_notify('" + servedChannel + "', '')::text"
	}
}

// run executes the statement and returns the number of the first event. It ends in sql.ErrNoRows when the condition does
// not hold.
func (p *parts) run(db *gorm.DB) (first int64, err error) {
	if p.err != nil {
		return 0, p.err
	}
	text := "WITH " + strings.Join(p.text, ",\n") + "\nSELECT before + 1, " + p.ring + " FROM taken"
	err = db.Statement.ConnPool.QueryRowContext(db.Statement.Context, text, p.args...).Scan(&first, new(string))
	return first, err
}
