package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/orrery-ml/orrery/registry"
)

// journal keeps a gateway's table on disk, for restarts while the registry is away: a snapshot, and beside it the
// events that came after. What it wrote outlives a kill of the process at any moment; after a power failure the last
// changes may be missing. It is used by one goroutine at a time.
type journal struct {
	path   string   // of the snapshot; "" keeps nothing
	events *os.File // since the snapshot; nil when the next thing to write is a snapshot
	size   int64    // of events
	most   int64    // then a snapshot takes their place
}

// leastEvents is how long the events' file may become at least, in bytes; otherwise as long as the snapshot, so that
// what is written stays in proportion to what happens.
const leastEvents = 1 << 20

func (j *journal) eventsPath() string { return j.path + "l" }

// read returns the table that was kept. It ends in fs.ErrNotExist when there is none. Events that were not written to
// their end, or follow one that was not, are left out.
func (j *journal) read() (*table, error) {
	if j.path == "" {
		return nil, fs.ErrNotExist
	}
	raw, err := os.ReadFile(j.path)
	if err != nil {
		return nil, err
	}
	var s registry.Snapshot
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, err
	}
	t := newTable(s)
	if raw, err = os.ReadFile(j.eventsPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lines := json.NewDecoder(bytes.NewReader(raw))
	line := func() (e registry.Event, whole bool) {
		whole = lines.Decode(&e) == nil
		return e, whole
	}
	for e, whole := line(); whole; e, whole = line() {
		if e.Number <= t.position || !e.Type.Served() { // killed before the file was emptied; written by a later build
			continue
		}
		if err := t.change(e); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// add keeps the events that led to t; nothing that is not served needs to be among them.
func (j *journal) add(events []registry.Event, t *table) error {
	if j.path == "" {
		return nil
	}
	if j.events == nil || j.size > j.most {
		return j.keep(t)
	}
	var lines bytes.Buffer
	encoder := json.NewEncoder(&lines)
	for _, e := range events {
		if err := encoder.Encode(e); err != nil {
			return err
		}
	}
	n, err := j.events.Write(lines.Bytes())
	j.size += int64(n)
	if err != nil { // nothing may follow half an event
		return errors.Join(err, j.close())
	}
	return nil
}

// keep writes all of t, and begins the events anew.
func (j *journal) keep(t *table) error {
	if j.path == "" {
		return nil
	}
	if err := j.close(); err != nil {
		return err
	}
	raw, err := json.Marshal(t.snapshot())
	if err != nil {
		return err
	}
	tmp := j.path + ".tmp"
	if err := os.MkdirAll(filepath.Dir(tmp), 0o750); err != nil {
		return err
	}
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, j.path); err != nil {
		return err
	}
	events, err := os.OpenFile(j.eventsPath(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	j.events, j.size, j.most = events, 0, max(leastEvents, int64(len(raw)))
	return nil
}

func (j *journal) close() error {
	if j.events == nil {
		return nil
	}
	events := j.events
	j.events = nil
	return events.Close()
}
