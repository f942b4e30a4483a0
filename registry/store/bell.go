package store

import (
	"context"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Channels of LISTEN and NOTIFY: what every event rings, and what those ring that change what gateways serve.
const (
	eventChannel  = "orrery_events"
	servedChannel = "orrery_served"
)

// ring wakes those who wait for events, and gateways when what they serve changed.
func (s *Store) ring(served bool) {
	s.bell.ring()
	if served {
		s.served.ring()
	}
}

// bell wakes everybody who waits when rung.
type bell struct {
	hear func() // begins to listen to other processes, from the first wait on: each listener costs every change a little

	mu   sync.Mutex
	next chan struct{}
}

func newBell(hear func(*bell)) *bell {
	b := &bell{next: make(chan struct{})}
	b.hear = sync.OnceFunc(func() { hear(b) })
	return b
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.next)
	b.next = make(chan struct{})
}

func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.next
}

// listen rings on every notification until ctx ends, and reconnects when the connection is lost. Bells are a
// convenience: Await looks at the counter every s.poll anyway.
func (b *bell) listen(ctx context.Context, dsn, channel string) {
	for ctx.Err() == nil {
		b.listenOnce(ctx, dsn, channel)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func (b *bell) listenOnce(ctx context.Context, dsn, channel string) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return // the next try is a second away; Await polls meanwhile
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // the connection is given up either way
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return
	}
	for b.ring(); ; b.ring() {
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return
		}
	}
}

// Await implements registry.Feed.
func (s *Store) Await(ctx context.Context, after int64) error { return s.await(ctx, after, s.bell) }

// AwaitServed implements registry.Feed.
func (s *Store) AwaitServed(ctx context.Context, after int64) error {
	return s.await(ctx, after, s.served)
}

// await returns once an event above after exists, or the bell rang, which it may do for nothing.
func (s *Store) await(ctx context.Context, after int64, b *bell) error {
	b.hear()
	ticker := time.NewTicker(s.poll)
	defer ticker.Stop()
	for {
		rung := b.wait()
		var now int64
		if err := s.read.WithContext(ctx).Raw("SELECT value FROM counters WHERE name = 'event'").Scan(&now).Error; err != nil {
			return fault("read the event counter", err)
		}
		if now > after {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-rung:
			return nil
		case <-ticker.C:
		}
	}
}
