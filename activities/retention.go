package activities

import (
	"context"
	"slices"
	"strings"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
)

// retentionStore is the part of the registry that retention works on.
type retentionStore interface {
	registry.Catalog
	registry.Versions
	registry.Routes
	DeleteStrata(ctx context.Context, before time.Time) (int64, error)
}

// Retention removes what nothing needs any more.
type Retention struct {
	store   retentionStore
	objects registry.Objects
}

// NewRetention makes the activities.
func NewRetention(s retentionStore, o registry.Objects) *Retention {
	return &Retention{store: s, objects: o}
}

// SweepInput says what to keep.
type SweepInput struct {
	RunID         string        `json:"run_id"`
	KeepChampions int           `json:"keep_champions"` // the last versions that were champion stay
	ArchiveAfter  time.Duration `json:"archive_after"`  // age of a version that nothing needs
	Grace         time.Duration `json:"grace"`          // age of a blob that no version refers to
	KeepStrata    time.Duration `json:"keep_strata"`
}

// SweepResult counts what was removed.
type SweepResult struct {
	Archived int   `json:"archived"`
	Records  int   `json:"records"`
	Blobs    int   `json:"blobs"`
	Strata   int64 `json:"strata"`
}

// Sweep archives versions by compare-and-set, expires records and strata, and deletes blobs that no version that is not
// archived refers to.
func (a *Retention) Sweep(ctx context.Context, in SweepInput) (SweepResult, error) {
	var out SweepResult
	models, err := a.store.Models(ctx)
	if err != nil {
		return out, Fault(err)
	}
	now := time.Now()
	needed := map[string]bool{}
	for _, m := range models {
		if err := a.archive(ctx, m, in, now, &out); err != nil {
			return out, Fault(err)
		}
		if err := a.expire(ctx, m, now, &out); err != nil {
			return out, Fault(err)
		}
		versions, err := a.store.ListVersions(ctx, m.Name)
		if err != nil {
			return out, Fault(err)
		}
		for _, v := range versions {
			if v.Status != registry.Archived {
				refer(v, needed)
			}
		}
		activity.RecordHeartbeat(ctx, m.Name)
	}
	if err := a.collect(ctx, needed, now.Add(-in.Grace), &out); err != nil {
		return out, Fault(err)
	}
	out.Strata, err = a.store.DeleteStrata(ctx, now.Add(-in.KeepStrata))
	return out, Fault(err)
}

func refer(v registry.Version, needed map[string]bool) {
	for _, f := range v.Manifest.Files {
		needed[f.SHA256] = true
	}
	for _, sha := range []string{v.Documents.TrainingData, v.Documents.Baseline} {
		needed[sha] = true
	}
}

func (a *Retention) archive(ctx context.Context, m registry.Model, in SweepInput, now time.Time, out *SweepResult) error {
	history, err := a.store.RouteHistory(ctx, m.Name, 1000)
	if err != nil {
		return err
	}
	var champions []int
	for _, r := range history {
		if v := r.StableVersion(); v != 0 && !slices.Contains(champions, v) && len(champions) < in.KeepChampions {
			champions = append(champions, v)
		}
	}
	versions, err := a.store.ListVersions(ctx, m.Name)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if v.Status == registry.Archived || v.Status == registry.Pending || slices.Contains(champions, v.Number) || now.Sub(v.CreatedAt) < in.ArchiveAfter {
			continue
		}
		switch err := a.store.ArchiveVersion(ctx, m.Name, v.Number, "retention"); registry.CodeOf(err) {
		case "":
			out.Archived++
		case registry.Conflict: // something needs it
		default:
			return err
		}
	}
	return nil
}

func (a *Retention) expire(ctx context.Context, m registry.Model, now time.Time, out *SweepResult) error {
	until := now.AddDate(0, 0, -m.Config.RecordKeepDays)
	for _, prefix := range []string{records.RecordPrefix, records.ProfilePrefix} {
		keys, err := records.Window(ctx, a.objects, records.Slice{Prefix: prefix, Model: m.Name, To: until})
		if err != nil {
			return err
		}
		for _, key := range keys {
			if err := a.objects.Delete(ctx, key); err != nil {
				return err
			}
			out.Records++
		}
	}
	return nil
}

func (a *Retention) collect(ctx context.Context, needed map[string]bool, before time.Time, out *SweepResult) error {
	for o, err := range a.objects.List(ctx, registry.BlobPrefix) {
		if err != nil {
			return err
		}
		sha := o.Key[strings.LastIndexByte(o.Key, '/')+1:]
		if needed[sha] || o.Modified.After(before) {
			continue
		}
		if err := a.objects.Delete(ctx, o.Key); err != nil {
			return err
		}
		out.Blobs++
	}
	return nil
}
