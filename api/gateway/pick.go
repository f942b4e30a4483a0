package gateway

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"

	"github.com/orrery-ml/orrery/registry"
)

// pickArm chooses the arm that answers: by weighted rendezvous of the caller's key, so that raising one arm's weight
// moves only the callers it must and every gateway agrees; at random when there is no key. False when no arm has
// weight.
func pickArm(r registry.Route, key string) (registry.Arm, bool) {
	var best registry.Arm
	top := math.Inf(-1)
	for _, a := range r.Arms {
		if a.Role == registry.Shadow || a.Weight == 0 {
			continue
		}
		if score := -float64(a.Weight) / math.Log(draw(r, a, key)); score > top {
			best, top = a, score
		}
	}
	return best, !math.IsInf(top, -1)
}

// draw returns a number in (0,1) that is uniform over keys and fixed for (key, model, salt, version).
func draw(r registry.Route, a registry.Arm, key string) float64 {
	if key == "" {
		return 1 - rand.Float64()*(1-1e-16) //nolint:gosec // no secret depends on it
	}
	h := xxhash.New()
	for _, s := range []string{key, r.Model, r.Salt, strconv.Itoa(a.Version)} {
		_, _ = h.WriteString(s) // never fails
		_, _ = h.Write([]byte{0})
	}
	return (float64(h.Sum64()>>11) + 0.5) / (1 << 53)
}

// candidate is a worker that may hold versions.
type candidate struct {
	id     string
	labels map[string]string
}

// place returns the workers that hold a version: of those that have the labels asked for, the replicas highest by
// rendezvous hash of (worker, model, version), all when replicas is 0. It depends on nothing else, so servers agree, and
// a worker that comes or goes moves only what it must.
func place(workers []candidate, model string, version, replicas int, labels map[string]string) map[string]bool {
	type scored struct {
		id    string
		score uint64
	}
	var able []scored
	for _, w := range workers {
		if hasLabels(w.labels, labels) {
			able = append(able, scored{w.id, xxhash.Sum64String(w.id + "\x00" + model + "\x00" + strconv.Itoa(version))})
		}
	}
	slices.SortFunc(able, func(a, b scored) int { return cmp.Or(cmp.Compare(b.score, a.score), strings.Compare(a.id, b.id)) })
	if replicas > 0 && replicas < len(able) {
		able = able[:replicas]
	}
	chosen := make(map[string]bool, len(able))
	for _, w := range able {
		chosen[w.id] = true
	}
	return chosen
}

func hasLabels(has, wanted map[string]string) bool {
	for k, v := range wanted {
		if has[k] != v {
			return false
		}
	}
	return true
}
