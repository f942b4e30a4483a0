package gateway

import (
	"math"
	"math/rand/v2"
	"strconv"

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

// place returns the workers that hold a version: the replicas highest by rendezvous hash of (worker, model, version),
// all when replicas is 0. It depends on nothing else, so servers agree, and a worker that comes or goes moves only
// what it must.
func place(workers []string, model string, version, replicas int) map[string]bool {
	chosen := map[string]bool{}
	if replicas <= 0 || replicas >= len(workers) {
		for _, w := range workers {
			chosen[w] = true
		}
		return chosen
	}
	for range replicas {
		best, top := "", uint64(0)
		for _, w := range workers {
			if score := xxhash.Sum64String(w + "\x00" + model + "\x00" + strconv.Itoa(version)); !chosen[w] && (best == "" || score > top) {
				best, top = w, score
			}
		}
		chosen[best] = true
	}
	return chosen
}
