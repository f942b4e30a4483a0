package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/glebarez/sqlite"
	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib" // the "pgx" driver
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
	"gorm.io/driver/postgres"
	"gorm.io/gorm"
	"gorm.io/gorm/logger"

	"github.com/orrery-ml/orrery/registry"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store keeps the registry in a database. It implements every store interface of package registry. It is safe for
// concurrent use by goroutines and, on both databases, by processes.
type Store struct {
	db     *gorm.DB // changes: BEGIN IMMEDIATE on SQLite
	read   *gorm.DB
	bell   *bell         // every event
	served *bell         // events that change what gateways serve
	poll   time.Duration // how long Await trusts the bell
	states workerStates
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// Open connects to dsn, "sqlite:PATH" or "postgres://…", and brings its schema up to date; processes that start at
// once wait for one another. It ends in Invalid for a dsn it cannot read and Unavailable when the database is down.
func Open(ctx context.Context, dsn string) (*Store, error) {
	switch {
	case strings.HasPrefix(dsn, "sqlite:"):
		return openSQLite(ctx, strings.TrimPrefix(strings.TrimPrefix(dsn, "sqlite:"), "//"))
	case strings.HasPrefix(dsn, "postgres://"), strings.HasPrefix(dsn, "postgresql://"):
		return openPostgres(ctx, dsn)
	}
	return nil, registry.Errorf(registry.Invalid, "registry address: want sqlite:PATH or postgres://…")
}

func openSQLite(ctx context.Context, path string) (*Store, error) {
	if path == "" {
		return nil, registry.Errorf(registry.Invalid, "registry address: sqlite: needs a path")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("registry directory: %w", err)
	}
	const pragmas = "_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(NORMAL)&_pragma=foreign_keys(1)"
	name := "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + pragmas
	writer, err := sql.Open(sqlite.DriverName, name+"&_txlock=immediate")
	if err != nil {
		return nil, err
	}
	writer.SetMaxOpenConns(1)
	unlock, err := lockFile(path + ".migrate")
	if err != nil {
		return nil, errors.Join(err, writer.Close())
	}
	defer unlock()
	if err := migrate(ctx, goose.DialectSQLite3, writer); err != nil {
		return nil, errors.Join(err, writer.Close())
	}
	reader, err := sql.Open(sqlite.DriverName, name)
	if err != nil {
		return nil, errors.Join(err, writer.Close())
	}
	db, err := gormOver(&sqlite.Dialector{Conn: writer})
	if err != nil {
		return nil, err
	}
	read, err := gormOver(&sqlite.Dialector{Conn: reader})
	if err != nil {
		return nil, err
	}
	deaf := func(*bell) {} // other processes are found by polling
	return &Store{db: db, read: read, bell: newBell(deaf), served: newBell(deaf), poll: 15 * time.Millisecond, cancel: func() {}}, nil
}

func openPostgres(ctx context.Context, dsn string) (*Store, error) {
	if _, err := pgx.ParseConfig(dsn); err != nil {
		return nil, registry.Errorf(registry.Invalid, "registry address: %w", errors.New("not a PostgreSQL URL"))
	}
	pool, err := openPool(dsn)
	if err != nil {
		return nil, err
	}
	locker, err := lock.NewPostgresSessionLocker()
	if err != nil {
		return nil, errors.Join(err, pool.Close())
	}
	if err := migrate(ctx, goose.DialectPostgres, pool, goose.WithSessionLocker(locker)); err != nil {
		return nil, errors.Join(fault("migrate the registry", err), pool.Close())
	}
	s, _, err := overPool(ctx, pool, dsn)
	return s, err
}

func openPool(dsn string) (*sql.DB, error) {
	pool, err := sql.Open("pgx", dsn)
	if err != nil {
		return nil, err
	}
	pool.SetMaxOpenConns(24)
	pool.SetMaxIdleConns(8)
	pool.SetConnMaxLifetime(time.Hour)
	return pool, nil
}

// overPool makes a store of a pool, which it closes on failure; what it starts ends with the context returned.
func overPool(ctx context.Context, pool *sql.DB, dsn string) (*Store, context.Context, error) {
	db, err := gormOver(postgres.New(postgres.Config{Conn: pool}))
	if err != nil {
		return nil, nil, errors.Join(err, pool.Close())
	}
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Store{db: db, read: db, poll: time.Second, cancel: cancel}
	on := func(channel string) *bell {
		return newBell(func(b *bell) { s.done.Go(func() { b.listen(background, dsn, channel) }) })
	}
	s.bell, s.served = on(eventChannel), on(servedChannel)
	return s, background, nil
}

func gormOver(d gorm.Dialector) (*gorm.DB, error) {
	return gorm.Open(d, &gorm.Config{Logger: logger.Discard, SkipDefaultTransaction: true, TranslateError: true, DisableAutomaticPing: true})
}

func migrate(ctx context.Context, dialect goose.Dialect, db *sql.DB, opts ...goose.ProviderOption) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(dialect, db, files, append(opts, goose.WithDisableGlobalRegistry(true))...)
	if err != nil {
		return err
	}
	_, err = provider.Up(ctx)
	return err
}

// lockFile takes an exclusive lock between processes; the returned function gives it back.
func lockFile(path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil // closing gives the lock back
}

// Close stops the listener and closes the database.
func (s *Store) Close() error {
	s.cancel()
	s.done.Wait()
	var errs []error
	for _, g := range []*gorm.DB{s.db, s.read} {
		pool, err := g.DB()
		if err == nil {
			err = pool.Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Ping returns an Unavailable error when the database does not answer.
func (s *Store) Ping(ctx context.Context) error {
	pool, err := s.read.DB()
	if err != nil {
		return fault("ping the registry", err)
	}
	if err := pool.PingContext(ctx); err != nil {
		return registry.Errorf(registry.Unavailable, "registry database: %w", err)
	}
	return nil
}

// OpenAnyway is Open for a process that must start while the database is away: everything then ends in Unavailable
// until it comes back, and the schema is brought up to date at that moment.
func OpenAnyway(ctx context.Context, dsn string, log *slog.Logger) (*Store, error) {
	s, err := Open(ctx, dsn)
	if registry.CodeOf(err) != registry.Unavailable {
		return s, err
	}
	log.Warn("the registry's database is away; going on without it", "error", err)
	pool, err := openPool(dsn)
	if err != nil {
		return nil, err
	}
	s, background, err := overPool(ctx, pool, dsn)
	if err != nil {
		return nil, err
	}
	s.done.Go(func() {
		for background.Err() == nil {
			if late, err := Open(background, dsn); err == nil {
				log.Info("the registry's database is back")
				_ = late.Close() // it has migrated; s has connections of its own
				return
			}
			select {
			case <-background.Done():
			case <-time.After(time.Second):
			}
		}
	})
	return s, nil
}
