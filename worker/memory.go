package worker

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// memory is the worker's budget. What counts is what the process really takes; only what a version that is being
// loaded will take is a guess, until it is measured.
type memory struct {
	budget   int64 // bytes; 0 = none
	resident func() int64
	reserved int64            // for loads under way; guarded by cache.mu
	known    map[string]int64 // what versions took when they were last loaded, by digest; guarded by cache.mu
}

// needs is what loading a version will take: what it took before, else half as much again as its files.
func (m *memory) needs(h held) int64 {
	if n, ok := m.known[h.digest]; ok {
		return n
	}
	return h.manifest.Size() * 3 / 2
}

// makeRoom unloads versions that nothing leases, least valuable first, until there is room for another one. It reserves
// the room until the returned function is called. It ends in Exhausted when what must stay leaves too little.
func (c *cache) makeRoom(ctx context.Context, e *entry) (free func(), err error) {
	if c.memory.budget == 0 {
		return func() {}, nil
	}
	for {
		c.mu.Lock()
		need, used := c.memory.needs(e.held), c.memory.resident()+c.memory.reserved
		if used+need <= c.memory.budget {
			c.memory.reserved += need
			c.mu.Unlock()
			return func() { c.settle(e, need) }, nil
		}
		victim := c.victim(e)
		if victim == nil {
			c.mu.Unlock()
			return nil, registry.Errorf(registry.Exhausted,
				"it takes about %s; this worker has %s of %s left, and routes or runs hold the rest", size(need), size(max(c.memory.budget-used, 0)), size(c.memory.budget))
		}
		c.evicted[victim.key] = true
		victim.leave()
		c.mu.Unlock()
		c.log.Info("unloaded to make room", "model", victim.key.model, "version", victim.version, "for", fmt.Sprintf("%s:%d", e.key.model, e.version))
		select {
		case <-victim.gone:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// settle replaces the guess by what was measured.
func (c *cache) settle(e *entry, guessed int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory.reserved -= guessed
	if e.memory > 0 {
		if c.memory.known == nil {
			c.memory.known = map[string]int64{}
		}
		c.memory.known[e.digest] = e.memory
	}
}

// victim returns the version whose loss costs least for the memory it gives: the time to load it again, over its size
// and the time since it was last used. It returns nil when nothing can go; c.mu is held.
func (c *cache) victim(but *entry) *entry {
	var best *entry
	least, now := 0.0, time.Now().UnixNano()
	for _, e := range c.entries {
		if e.leased || e.state != registry.Loaded || e.key == but.key || e.next != nil {
			continue
		}
		idle := time.Duration(now - e.used.Load()).Seconds()
		value := e.took.Seconds() / (float64(max(e.memory, e.manifest.Size(), 1)) * max(idle, 1e-3))
		if best == nil || value < least {
			best, least = e, value
		}
	}
	return best
}

func size(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// residentBytes is the process's resident memory, 0 where /proc does not tell.
func residentBytes() int64 {
	raw, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(raw))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// machineBytes is the memory the process may take: the machine's, or its control group's; 0 where neither is known.
func machineBytes() int64 {
	if raw, err := os.ReadFile("/sys/fs/cgroup/memory.max"); err == nil {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64); err == nil {
			return n
		}
	}
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	return 0
}
