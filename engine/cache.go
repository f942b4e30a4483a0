package engine

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"sync"
)

// cacheKey is a digest of the inputs, in the signature's order.
type cacheKey [sha256.Size]byte

func keyOf(inputs []Tensor) cacheKey {
	h := sha256.New()
	var n [8]byte
	number := func(v int) {
		binary.LittleEndian.PutUint64(n[:], uint64(v)) //nolint:gosec // only told apart
		_, _ = h.Write(n[:])                           // never fails
	}
	for _, t := range inputs {
		number(len(t.Shape))
		for _, d := range t.Shape {
			number(int(d))
		}
		number(len(t.Data))
		_, _ = h.Write(t.Data) // never fails
	}
	return cacheKey(h.Sum(nil))
}

// cache keeps a version's answers by their inputs, the latest used up to limit bytes. Requests with equal inputs that
// come while the first is under way wait for its answer.
type cache struct {
	limit int64

	mu    sync.Mutex
	bytes int64
	order *list.List // of *cached, the latest used first
	known map[cacheKey]*list.Element
	under map[cacheKey]*flight
}

type cached struct {
	key     cacheKey
	outputs []Tensor
	bytes   int64
}

type flight struct {
	done    chan struct{}
	outputs []Tensor
	err     error
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, order: list.New(), known: map[cacheKey]*list.Element{}, under: map[cacheKey]*flight{}}
}

// get returns the answer to k: from memory, from a request under way, or from run.
func (c *cache) get(ctx context.Context, k cacheKey, run func() ([]Tensor, error)) (outputs []Tensor, hit bool, err error) {
	for {
		c.mu.Lock()
		if e, ok := c.known[k]; ok {
			c.order.MoveToFront(e)
			outputs = e.Value.(*cached).outputs //nolint:forcetypeassert // the only type in it
			c.mu.Unlock()
			return outputs, true, nil
		}
		f, ok := c.under[k]
		if !ok {
			f = &flight{done: make(chan struct{})}
			c.under[k] = f
			c.mu.Unlock()
			c.lead(k, f, run)
			return f.outputs, false, f.err
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-f.done:
		}
		if !errors.Is(f.err, context.Canceled) && !errors.Is(f.err, context.DeadlineExceeded) {
			return f.outputs, true, f.err
		} // who led gave up: that says nothing about this request
	}
}

func (c *cache) lead(k cacheKey, f *flight, run func() ([]Tensor, error)) {
	f.outputs, f.err = run()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.under, k)
	close(f.done)
	if size := bytesOf(f.outputs) + entryCost; f.err == nil && size <= c.limit {
		c.known[k] = c.order.PushFront(&cached{k, f.outputs, size})
		c.bytes += size
	}
	for c.bytes > c.limit {
		e := c.order.Remove(c.order.Back()).(*cached) //nolint:forcetypeassert // the only type in it
		delete(c.known, e.key)
		c.bytes -= e.bytes
	}
}

// entryCost is about what an entry takes beside its outputs' bytes.
const entryCost = 512
