package store

import (
	"context"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// channel is the LISTEN/NOTIFY channel of the doorbells.
const channel = "orrery_events"

// unserved is what a notification says when nothing that gateways serve has changed.
const unserved = "unserved"

// ring wakes those who wait for events, and gateways when what they serve changed.
func (s *Store) ring(served bool) {
	s.bell.ring()
	if served {
		s.served.ring()
	}
}

// bell wakes everybody who waits when rung.
type bell struct {
	mu   sync.Mutex
	next chan struct{}
}

func newBell() *bell { return &bell{next: make(chan struct{})} }

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
func (s *Store) listen(ctx context.Context, dsn string) {
	for ctx.Err() == nil {
		s.listenOnce(ctx, dsn)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func (s *Store) listenOnce(ctx context.Context, dsn string) {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return // the next try is a second away; Await polls meanwhile
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // the connection is given up either way
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return
	}
	s.ring(true)
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return
		}
		s.ring(n.Payload != unserved)
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
	s.hear()
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
