package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// blackbox remembers, in a file mapped into memory, which versions are being run or loaded at this moment. The pages
// outlive the process: when it dies in native code, the next worker in its place reads what it was doing. Writing costs
// two atomic additions a run.
type blackbox struct {
	node    string
	log     *slog.Logger
	pages   []byte
	crashes []registry.Crash // of the last hour, of the processes before

	mu   sync.Mutex
	free []int // slots
}

const (
	slots        = 256 // further versions go without
	slotSize     = 512 // a counter of 8 bytes, a length of 2, then JSON of the key
	slotHeader   = 10
	crashMemory  = time.Hour
	maxCrashes   = 100
	blackboxName = "running"
	crashesName  = "crashes.json"
)

// slotKey is what a slot says of its version.
type slotKey struct {
	Model   string `json:"m"`
	Version int    `json:"v"`
}

// openBlackbox reads what the process before left in dir and begins anew. Without a usable directory it works and
// remembers nothing.
func openBlackbox(dir, node string, now time.Time, log *slog.Logger) *blackbox {
	b := &blackbox{node: node, log: log}
	if err := b.open(dir, now); err != nil {
		log.Warn("what this worker runs cannot be kept for the case that it dies", "directory", dir, "error", err)
	}
	return b
}

func (b *blackbox) open(dir string, now time.Time) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	file := filepath.Join(dir, blackboxName)
	b.readCrashes(filepath.Join(dir, crashesName), now)
	before, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, k := range underway(before) {
		b.crashes = append(b.crashes, registry.Crash{Model: k.Model, Version: k.Version, At: now.UTC(), Node: b.node})
		b.log.Error("the worker before this one died while it ran a version", "model", k.Model, "version", k.Version)
	}
	b.crashes = b.crashes[max(0, len(b.crashes)-maxCrashes):]
	if err := b.writeCrashes(filepath.Join(dir, crashesName)); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := f.Truncate(slots * slotSize); err != nil {
		return errors.Join(err, f.Close())
	}
	pages, err := syscall.Mmap(int(f.Fd()), 0, slots*slotSize, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return errors.Join(fmt.Errorf("map %s: %w", file, err), f.Close())
	}
	b.pages = pages
	for i := slots - 1; i >= 0; i-- {
		b.free = append(b.free, i)
	}
	return f.Close() // the mapping stays
}

func (b *blackbox) readCrashes(file string, now time.Time) {
	raw, err := os.ReadFile(file)
	var all []registry.Crash
	if err != nil || json.Unmarshal(raw, &all) != nil {
		return
	}
	for _, c := range all {
		if now.Sub(c.At) < crashMemory {
			b.crashes = append(b.crashes, c)
		}
	}
}

func (b *blackbox) writeCrashes(file string) error {
	raw, err := json.Marshal(b.crashes)
	if err != nil {
		return err
	}
	return os.WriteFile(file, raw, 0o600)
}

// underway returns the versions whose counter is above zero in the pages of a process that ended.
func underway(pages []byte) []slotKey {
	var out []slotKey
	for at := 0; at+slotSize <= len(pages); at += slotSize {
		slot := pages[at : at+slotSize]
		size := int(slot[8])<<8 | int(slot[9])
		var k slotKey
		if *counterOf(slot) > 0 && size <= slotSize-slotHeader && json.Unmarshal(slot[slotHeader:slotHeader+size], &k) == nil {
			out = append(out, k)
		}
	}
	return out
}

func counterOf(slot []byte) *int64 { return (*int64)(unsafe.Pointer(unsafe.SliceData(slot))) } //nolint:gosec // slots are aligned

// since returns the crashes that are worth reporting.
func (b *blackbox) since(now time.Time) []registry.Crash {
	var out []registry.Crash
	for _, c := range b.crashes {
		if now.Sub(c.At) < crashMemory {
			out = append(out, c)
		}
	}
	return out
}

// mark is a version's slot; nil remembers nothing.
type mark struct {
	box     *blackbox
	slot    int
	counter *int64
}

// enter takes a slot for a version.
func (b *blackbox) enter(k key) *mark {
	raw, err := json.Marshal(slotKey{k.model, k.version})
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil || len(b.free) == 0 || len(raw) > slotSize-slotHeader {
		return nil
	}
	i := b.free[len(b.free)-1]
	b.free = b.free[:len(b.free)-1]
	slot := b.pages[i*slotSize : (i+1)*slotSize]
	m := &mark{box: b, slot: i, counter: counterOf(slot)}
	atomic.StoreInt64(m.counter, 0)
	slot[8], slot[9] = byte(len(raw)>>8), byte(len(raw)) //nolint:gosec // at most slotSize
	copy(slot[slotHeader:], raw)
	return m
}

func (m *mark) begin() {
	if m != nil {
		atomic.AddInt64(m.counter, 1)
	}
}

func (m *mark) end() {
	if m != nil {
		atomic.AddInt64(m.counter, -1)
	}
}

func (m *mark) leave() {
	if m == nil {
		return
	}
	atomic.StoreInt64(m.counter, 0)
	m.box.mu.Lock()
	defer m.box.mu.Unlock()
	m.box.free = append(m.box.free, m.slot)
}

// close says that nothing runs any more: the process ends by its own will.
func (b *blackbox) close() {
	if b.pages == nil {
		return
	}
	clear(b.pages)
	if err := syscall.Munmap(b.pages); err != nil {
		b.log.Warn("unmap what runs", "error", err)
	}
	b.pages, b.free = nil, nil
}

// markedSession is a session whose runs are remembered.
type markedSession struct {
	engine.Session

	mark *mark
}

func (s *markedSession) Run(ctx context.Context, inputs []engine.Tensor) ([]engine.Tensor, error) {
	s.mark.begin()
	defer s.mark.end()
	return s.Session.Run(ctx, inputs)
}

func (s *markedSession) Close() error {
	defer s.mark.leave()
	return s.Session.Close()
}
