package gateway

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/orrery-ml/orrery/registry"
)

// table is what a gateway knows of the registry. Once it is served it is never changed; apply makes the next one.
type table struct {
	position int64
	models   map[string]served
}

// served is one model in a table.
type served struct {
	model    registry.Model
	route    registry.Route
	aliases  map[string]int
	versions map[int]registry.Version
	holds    []registry.Hold
}

func newTable(s registry.Snapshot) *table {
	t := &table{position: s.Position, models: make(map[string]served, len(s.Models))}
	for _, m := range s.Models {
		t.models[m.Name] = served{model: m, route: registry.Route{Model: m.Name}, aliases: map[string]int{}, versions: map[int]registry.Version{}}
	}
	for _, r := range s.Routes {
		m := t.models[r.Model]
		m.route = r
		t.models[r.Model] = m
	}
	for _, a := range s.Aliases {
		t.models[a.Model].aliases[a.Name] = a.Version
	}
	for _, v := range s.Versions {
		t.models[v.Model].versions[v.Number] = v
	}
	for _, h := range s.Holds {
		m := t.models[h.Model]
		m.holds = append(m.holds, h)
		t.models[h.Model] = m
	}
	return t
}

// snapshot is the inverse of newTable, for the state file.
func (t *table) snapshot() registry.Snapshot {
	s := registry.Snapshot{Position: t.position}
	for _, name := range slices.Sorted(maps.Keys(t.models)) {
		m := t.models[name]
		s.Models = append(s.Models, m.model)
		if m.route.Revision > 0 {
			s.Routes = append(s.Routes, m.route)
		}
		for _, a := range slices.Sorted(maps.Keys(m.aliases)) {
			s.Aliases = append(s.Aliases, registry.Alias{Model: name, Name: a, Version: m.aliases[a]})
		}
		for _, v := range slices.Sorted(maps.Keys(m.versions)) {
			s.Versions = append(s.Versions, m.versions[v])
		}
		s.Holds = append(s.Holds, m.holds...)
	}
	return s
}

// apply returns the table after events, and those of them that change what is served. An event that is not the next one
// is a fault of the feed.
func (t *table) apply(events ...registry.Event) (next *table, served []registry.Event, err error) {
	next = &table{position: t.position, models: t.models}
	for _, e := range events {
		if e.Number != next.position+1 {
			return t, nil, fmt.Errorf("event %d came after %d", e.Number, next.position)
		}
		next.position = e.Number
		if !e.Type.Served() {
			continue
		}
		if served == nil {
			next.models = maps.Clone(t.models)
		}
		if err := next.change(e); err != nil {
			return t, nil, err
		}
		served = append(served, e)
	}
	return next, served, nil
}

// change makes this table the one after an event that is served.
func (t *table) change(e registry.Event) error {
	if err := t.changeModel(e); err != nil {
		return fmt.Errorf("event %d, %s: %w", e.Number, e.Type, err)
	}
	t.position = e.Number
	return nil
}

func (t *table) changeModel(e registry.Event) error {
	m := t.models[e.Model]
	switch e.Type {
	case registry.ModelCreated:
		m.model = registry.Model{}
		if err := json.Unmarshal(e.Data, &m.model); err != nil {
			return err
		}
		m.route, m.aliases, m.versions = registry.Route{Model: e.Model}, map[string]int{}, map[int]registry.Version{}
	case registry.ModelConfigured:
		m.model = registry.Model{} // over the present one the decoder would add to maps, which other tables share
		if err := json.Unmarshal(e.Data, &m.model); err != nil {
			return err
		}
	case registry.VersionReady:
		var v registry.Version
		if err := json.Unmarshal(e.Data, &v); err != nil {
			return err
		}
		m.versions = maps.Clone(m.versions)
		m.versions[v.Number] = v
	case registry.VersionArchived, registry.VersionDeleted:
		m.versions = maps.Clone(m.versions)
		delete(m.versions, e.Version)
	case registry.RouteChanged:
		var r registry.Route
		if err := json.Unmarshal(e.Data, &r); err != nil {
			return err
		}
		r.Event = e.Number
		m.route = r
	case registry.AliasMoved:
		var move registry.AliasMove
		if err := json.Unmarshal(e.Data, &move); err != nil {
			return err
		}
		m.aliases = maps.Clone(m.aliases)
		m.aliases[move.Name] = move.To
		if move.To == 0 {
			delete(m.aliases, move.Name)
		}
	case registry.HoldChanged:
		var h registry.Hold
		if err := json.Unmarshal(e.Data, &h); err != nil {
			return err
		}
		same := func(o registry.Hold) bool { return o.Holder == h.Holder && o.Version == h.Version }
		m.holds = append(slices.DeleteFunc(slices.Clone(m.holds), same), h)
	case registry.VersionCreated, registry.VersionFailed, registry.RunChanged, registry.KeyChanged, registry.WebhookChanged: // not served
	}
	t.models[e.Model] = m
	return nil
}

// unexpired drops the holds that have run out.
func unexpired(holds []registry.Hold, now time.Time) []registry.Hold {
	return slices.DeleteFunc(slices.Clone(holds), func(h registry.Hold) bool { return !h.Until.After(now) })
}

// leased says whether a version must stay in the workers: an arm, an alias or a hold refers to it.
func (m served) leased(version int, now time.Time) bool {
	if _, ok := m.route.Arm(version); ok {
		return true
	}
	for _, v := range m.aliases {
		if v == version {
			return true
		}
	}
	return slices.ContainsFunc(unexpired(m.holds, now), func(h registry.Hold) bool { return h.Version == version })
}

// find splits "model" or "model@alias" and looks it up. version is 0 unless an alias names one.
func (t *table) find(name string) (m served, version int, err error) {
	base, alias, hasAlias := strings.Cut(name, "@")
	m, ok := t.models[base]
	if !ok {
		if near := registry.Closest(base, slices.Collect(maps.Keys(t.models))); near != "" {
			return m, 0, registry.Errorf(registry.NotFound, "no model %q; did you mean %q?", base, near)
		}
		return m, 0, registry.Errorf(registry.NotFound, "no model %q", base)
	}
	if !hasAlias {
		return m, 0, nil
	}
	version, ok = m.aliases[alias]
	if !ok {
		known := slices.Sorted(maps.Keys(m.aliases))
		if near := registry.Closest(alias, known); near != "" {
			return m, 0, registry.Errorf(registry.NotFound, "model %q has no alias %q; did you mean %q?", base, alias, near)
		}
		return m, 0, registry.Errorf(registry.NotFound, "model %q has no alias %q; it has %s", base, alias, strings.Join(known, ", "))
	}
	return m, version, nil
}
