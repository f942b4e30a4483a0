package gateway

import (
	"encoding/json"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/registry"
)

// assignment is what a worker was told to hold: by model, in order of version. It is one stream's.
type assignment map[string][]given

// given is a version as a worker was told of it; it is told anew when any of this changes.
type given struct {
	version  int
	revision int64 // of the serving config
	leased   bool
}

// assignEvery is how often all models are looked at: holds run out, and versions that nobody asks for any more.
const assignEvery = time.Second

// assignSpacing bounds how often a worker is told anew.
const assignSpacing = 5 * time.Millisecond

// assign tells the worker what to hold whenever that changes.
func (g *Gateway) assign(stream attach.AttachService_AttachServer, w *attached, left <-chan error) error {
	ticker := time.NewTicker(assignEvery)
	defer ticker.Stop()
	told := assignment{}
	for first, all := true, true; ; first = false {
		models, rungAll := g.fleet.rung(w)
		t := g.table.Load()
		if all = all || rungAll; all {
			models = slices.Concat(slices.Collect(maps.Keys(t.models)), slices.Collect(maps.Keys(told)))
		}
		news := &attach.AttachResponse{Position: t.position}
		workers := g.fleet.candidates()
		for _, name := range slices.Compact(slices.Sorted(slices.Values(models))) {
			list := g.placedOn(w.id, workers, t.models[name], time.Now())
			if !all {
				told.keepLeased(name, list)
			}
			g.reassign(told, t, name, list, news)
		}
		if first || len(news.GetHeld())+len(news.GetDropped()) > 0 {
			if err := stream.Send(news); err != nil {
				return err
			}
		}
		all = false
		select {
		case err := <-left:
			return err
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-g.stopping:
			return status.Error(codes.Unavailable, "the server stops")
		case <-w.wake:
			select { // what else changes meanwhile comes along
			case <-stream.Context().Done():
				return stream.Context().Err()
			case <-time.After(assignSpacing):
			}
		case <-ticker.C:
			all = true
		}
	}
}

// placedOn lists what a worker should hold of a model: versions that are leased, and those that were asked for lately, as
// far as placement puts them on it.
func (g *Gateway) placedOn(worker string, workers []candidate, m served, now time.Time) (list []given) {
	config := m.model.Config
	for _, number := range slices.Sorted(maps.Keys(m.versions)) {
		leased := m.leased(number, now)
		if leased {
			g.want(m.model.Name, number)
		} else if !g.wanted(m.model.Name, number, now, time.Duration(config.KeepAliveSecs)*time.Second) {
			continue
		}
		if place(workers, m.model.Name, number, config.Replicas, config.WorkerLabels)[worker] {
			list = append(list, given{number, m.model.ConfigRevision, leased})
		}
	}
	return list
}

// keepLeased leaves versions of the list leased that the worker was told are: that nothing leases them any more matters
// only when memory is short, and can wait for the next look at all models.
func (a assignment) keepLeased(model string, list []given) {
	for i, n := range list {
		n.leased = true
		list[i].leased = list[i].leased || slices.Contains(a[model], n)
	}
}

// reassign adds to the news how what a worker should hold of a model differs from what it was told.
func (g *Gateway) reassign(told assignment, t *table, name string, list []given, news *attach.AttachResponse) {
	for _, old := range told[name] {
		if !slices.ContainsFunc(list, func(n given) bool { return n.version == old.version }) {
			news.Dropped = append(news.Dropped, &attach.VersionName{Model: name, Version: int64(old.version)})
		}
	}
	for _, n := range list {
		if slices.Contains(told[name], n) {
			continue
		}
		m := t.models[name]
		held, err := encodeHeld(m.versions[n.version], m.model.Config, n.leased)
		if err != nil { // told once, and not again before it changes
			g.log.Error("encode a held version", "model", name, "version", n.version, "error", err)
			continue
		}
		news.Held = append(news.Held, held)
	}
	if told[name] = list; len(list) == 0 {
		delete(told, name)
	}
}

func encodeHeld(v registry.Version, c registry.ServingConfig, leased bool) (*attach.HeldVersion, error) {
	manifest, err := json.Marshal(v.Manifest)
	if err != nil {
		return nil, err
	}
	signature, err := json.Marshal(v.Signature)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	return &attach.HeldVersion{
		Model: v.Model, Version: int64(v.Number), Digest: v.Digest, Manifest: manifest, Signature: signature, Config: config, Leased: leased,
	}, nil
}
