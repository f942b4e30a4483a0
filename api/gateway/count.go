package gateway

import (
	"strconv"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/grpc/codes"

	"github.com/orrery-ml/orrery/monitor"
	"github.com/orrery-ml/orrery/registry"
)

const (
	window    = time.Second      // of a stratum
	voteEpoch = 30 * time.Second // a sticky key votes once in each
	maxVoters = 1 << 20          // remembered per epoch; further keys vote with every request
	maxStrata = 100_000          // kept while the registry is away; the oldest are dropped and counted
)

// attempt is one request to one worker, as it is counted.
type attempt struct {
	route     registry.Route
	arm       registry.Arm
	key       string // sticky key, "" for none
	code      codes.Code
	took      time.Duration
	notFinite bool
}

type stratumKey struct {
	model    string
	revision int64
	version  int
	start    int64 // Unix seconds
}

// counter counts attempts into strata of one second. A stratum is sealed once its second is over: count looks at the
// clock under the lock, so nothing is added to a second that take has handed out.
type counter struct {
	gateway string
	now     func() time.Time

	mu      sync.Mutex
	last    time.Time // latest second seen: a clock that steps back does not reopen a sealed second
	strata  map[stratumKey]*registry.Stratum
	voters  map[uint64]struct{}
	epoch   int64
	dropped int64
}

func newCounter(gateway string, now func() time.Time) *counter {
	return &counter{gateway: gateway, now: now, strata: map[stratumKey]*registry.Stratum{}, voters: map[uint64]struct{}{}}
}

func (c *counter) second() time.Time {
	if t := c.now().Truncate(window); t.After(c.last) {
		c.last = t
	}
	return c.last
}

func (c *counter) count(a attempt) {
	c.mu.Lock()
	defer c.mu.Unlock()
	start := c.second()
	k := stratumKey{a.route.Model, a.route.Revision, a.arm.Version, start.Unix()}
	s, ok := c.strata[k]
	if !ok {
		s = &registry.Stratum{
			Gateway: c.gateway, Model: a.route.Model, Revision: a.route.Revision, Version: a.arm.Version, Role: a.arm.Role,
			Start: start.UTC(), Latency: registry.LatencyCounts{},
		}
		c.strata[k] = s
	}
	switch a.code {
	case codes.Canceled:
		s.Cancelled++
		return
	case codes.ResourceExhausted:
		s.Sheds++
		return
	default: // everything else counts, errors of the input too
	}
	failed := a.code != codes.OK
	s.Requests++
	if failed {
		s.Errors++
	} else {
		s.Latency[monitor.LatencyBucket(a.took)]++
	}
	if a.notFinite {
		s.NotFinite++
	}
	if c.votes(a, start) {
		s.Votes++
		if failed {
			s.VoteFails++
		}
	}
}

// votes says whether this attempt is the first of its caller, on this version, in the epoch.
func (c *counter) votes(a attempt, at time.Time) bool {
	if a.key == "" {
		return true
	}
	if epoch := at.Unix() / int64(voteEpoch/time.Second); epoch != c.epoch {
		c.epoch = epoch
		clear(c.voters)
	}
	id := xxhash.Sum64String(a.key + "\x00" + a.route.Model + "\x00" + strconv.Itoa(a.arm.Version))
	if _, voted := c.voters[id]; voted {
		return false
	}
	if len(c.voters) < maxVoters {
		c.voters[id] = struct{}{}
	}
	return true
}

// take hands out the strata of seconds that are over, and the watermark before which nothing more will come. Strata
// that could not be stored come back by restore.
func (c *counter) take() (done []registry.Stratum, sealed time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sealed = c.second()
	for k, s := range c.strata {
		if k.start < sealed.Unix() {
			done = append(done, *s)
			delete(c.strata, k)
		}
	}
	return done, sealed.UTC()
}

// restore puts strata back that could not be stored.
func (c *counter) restore(strata []registry.Stratum) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range strata {
		if len(c.strata) >= maxStrata {
			c.dropped++
			continue
		}
		c.strata[stratumKey{s.Model, s.Revision, s.Version, s.Start.Unix()}] = &s
	}
}
