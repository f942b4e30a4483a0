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
	maxVoters = 1 << 20          // callers remembered per set; further keys do not vote
	maxStrata = 100_000          // kept while the registry is away; the oldest are dropped and counted
)

// attempt is one request to one worker, as it is counted.
type attempt struct {
	route     registry.Route
	arm       registry.Arm
	key       string // sticky key, "" for none
	again     bool   // the second attempt of a request
	code      codes.Code
	took      time.Duration
	notFinite bool
	outputs   []int // keys of the answer's first row
}

type stratumKey struct {
	model    string
	revision int64
	version  int
	start    int64 // Unix seconds
}

// callers is what is remembered of a model's callers with a sticky key.
type callers struct {
	revision int64
	salt     string
	failed   map[uint64]struct{} // under this revision, by key and version: they vote no more
	seen     map[uint64]struct{} // in this roll-out
	gave     map[uint64]struct{} // feedback, in this roll-out
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
	callers map[string]*callers // by model
	dropped int64
}

func newCounter(gateway string, now func() time.Time) *counter {
	return &counter{
		gateway: gateway, now: now, strata: map[stratumKey]*registry.Stratum{}, voters: map[uint64]struct{}{},
		callers: map[string]*callers{},
	}
}

func (c *counter) second() time.Time {
	if t := c.now().Truncate(window); t.After(c.last) {
		c.last = t
	}
	return c.last
}

// stratum returns the present second's stratum of an arm.
func (c *counter) stratum(r registry.Route, arm registry.Arm) (*registry.Stratum, time.Time) {
	start := c.second()
	k := stratumKey{r.Model, r.Revision, arm.Version, start.Unix()}
	s, ok := c.strata[k]
	if !ok {
		s = &registry.Stratum{
			Gateway: c.gateway, Model: r.Model, Revision: r.Revision, Version: arm.Version, Role: arm.Role,
			Start: start.UTC(), Latency: registry.LatencyCounts{},
		}
		c.strata[k] = s
	}
	return s, start
}

func (c *counter) count(a attempt) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, start := c.stratum(a.route, a.arm)
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
	bucket := monitor.LatencyBucket(a.took)
	s.Requests++
	if failed {
		s.Errors++
	} else {
		s.Latency[bucket]++
	}
	if a.notFinite {
		s.NotFinite++
	}
	if len(a.route.Arms) < 2 { // nothing is compared, so nobody needs to be known
		delete(c.callers, a.route.Model)
		s.Votes++
		if failed {
			s.VoteFails++
		}
		return
	}
	known := c.callersOf(a.route)
	if a.arm.Role != registry.Shadow && !a.again && (a.key == "" || remember(known.seen, xxhash.Sum64String(a.key))) {
		s.Detail.Callers++
	}
	if !c.votes(known, a.key, a.arm.Version, start, failed) {
		return
	}
	s.Votes++
	if failed {
		s.VoteFails++
		return
	}
	s.Detail.VoteLatency = plusOne(s.Detail.VoteLatency, bucket)
	for _, k := range a.outputs {
		s.Detail.Outputs = plusOne(s.Detail.Outputs, k)
	}
}

func plusOne[M ~map[int]int64](m M, k int) M {
	if m == nil {
		m = M{}
	}
	m[k]++
	return m
}

// remember adds an id to a set and says whether that is news; a full set learns nothing more.
func remember(set map[uint64]struct{}, id uint64) bool {
	if _, known := set[id]; known || len(set) >= maxVoters {
		return false
	}
	set[id] = struct{}{}
	return true
}

// callersOf returns what is known of a model's callers under its route. A new roll-out (salt) forgets all of them, a
// new revision who failed; an answer that comes late under an older revision forgets nothing.
func (c *counter) callersOf(r registry.Route) *callers {
	known := c.callers[r.Model]
	if known == nil {
		known = &callers{revision: r.Revision, salt: r.Salt, failed: map[uint64]struct{}{}, seen: map[uint64]struct{}{}, gave: map[uint64]struct{}{}}
		c.callers[r.Model] = known
	}
	if r.Revision <= known.revision {
		return known
	}
	clear(known.failed)
	if r.Salt != known.salt {
		clear(known.seen)
		clear(known.gave)
	}
	known.revision, known.salt = r.Revision, r.Salt
	return known
}

// votes says whether an attempt is the first of its caller, on this version, in the epoch, and the caller has not failed
// under this revision before.
func (c *counter) votes(known *callers, key string, version int, at time.Time, failed bool) bool {
	if key == "" {
		return true
	}
	if epoch := at.Unix() / int64(voteEpoch/time.Second); epoch != c.epoch {
		c.epoch = epoch
		clear(c.voters)
	}
	id := xxhash.Sum64String(key + "\x00" + strconv.Itoa(version) + "\x00" + known.salt)
	if _, out := known.failed[id]; out || !remember(c.voters, id) {
		return false
	}
	return !failed || remember(known.failed, id)
}

// pair counts a request that the stable arm and a shadow were both asked.
func (c *counter) pair(r registry.Route, shadow registry.Arm, key string, stableFailed, shadowFailed bool, gap float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, start := c.stratum(r, shadow)
	if !c.votes(c.callersOf(r), key, -shadow.Version, start, stableFailed != shadowFailed) {
		return
	}
	s.Detail.Pairs++
	switch {
	case stableFailed && shadowFailed:
	case shadowFailed:
		s.Detail.OnlyFailed++
	case stableFailed:
		s.Detail.OnlyAnswered++
	default:
		s.Detail.Gaps = plusOne(s.Detail.Gaps, monitor.GapBucket(gap))
	}
}

// feedback counts a caller's value of the business metric, the first in a roll-out, and says whether it counted.
func (c *counter) feedback(r registry.Route, arm registry.Arm, key string, v float64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !remember(c.callersOf(r).gave, xxhash.Sum64String(key)) {
		return false
	}
	s, _ := c.stratum(r, arm)
	s.Detail.Feedback++
	s.Detail.FeedbackSum += v
	s.Detail.FeedbackSquares += v * v
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
			if s.Votes == s.Requests { // then both distributions are the same
				s.Detail.VoteLatency = nil
			}
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
