package registry

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Strategy names a way of moving traffic.
type Strategy string

// The strategies.
const (
	AllAtOnce Strategy = "all_at_once" // warm, then everything
	BlueGreen Strategy = "blue_green"  // warm, switch everything, keep the old version warm for a while
	Canary    Strategy = "canary"      // one step
	Linear    Strategy = "linear"      // steps of one size
	Steps     Strategy = "steps"       // steps as listed
	ShadowRun Strategy = "shadow"      // mirror requests, compare pair by pair, answer nobody
	AB        Strategy = "ab"          // variants with a business metric
)

// Strategies lists them.
var Strategies = []Strategy{AllAtOnce, BlueGreen, Canary, Linear, Steps, ShadowRun, AB}

// OnInconclusive says what a roll-out does when its time is up without a verdict.
type OnInconclusive string

// RollBackThen ends it INCONCLUSIVE with the old route; HoldThen waits for a person; ExtendThen bakes once more and then
// rolls back.
const (
	RollBackThen OnInconclusive = "rollback"
	HoldThen     OnInconclusive = "hold"
	ExtendThen   OnInconclusive = "extend"
)

// RolloutPolicy is a model's own defaults and rules for roll-outs. A roll-out may choose another strategy; approvals,
// windows and the freeze bind all of them.
type RolloutPolicy struct {
	Strategy        Strategy        `json:"strategy"`         // of a roll-out that names none
	Steps           []float64       `json:"steps"`            // percents, ascending; of canary and steps
	BakeSeconds     int64           `json:"bake_s"`           // least time of a step
	BakeRequests    int64           `json:"bake_requests"`    // least requests of the candidate in a step
	MaxBakeSeconds  int64           `json:"max_bake_s"`       // then a step is inconclusive; 0 = never
	WatchSeconds    int64           `json:"watch_s"`          // after a promotion
	HoldbackPercent float64         `json:"holdback_percent"` // traffic the old version keeps while watched, to compare with
	OnInconclusive  OnInconclusive  `json:"on_inconclusive"`
	Judge           json.RawMessage `json:"judge,omitempty"` // thresholds that differ from the defaults
	Approvals       int             `json:"approvals"`       // people who must approve; 0 = none
	ApproveBefore   string          `json:"approve_before"`  // start or promotion
	ApprovalSeconds int64           `json:"approval_s"`      // then it is rejected; 0 = waits for ever
	FourEyes        bool            `json:"four_eyes"`       // who started a roll-out may not approve it
	Windows         []Window        `json:"windows"`         // when traffic may move to a candidate; none = always
	FrozenUntil     time.Time       `json:"frozen_until,omitzero"`
	FreezeReason    string          `json:"freeze_reason,omitempty"`
}

// Window is a time of the week.
type Window struct {
	Days []string `json:"days"` // mon, tue, …; none = every day
	From string   `json:"from"` // HH:MM
	To   string   `json:"to"`   // HH:MM, later than From
	Zone string   `json:"zone"` // IANA name; "" = UTC
}

// DefaultRolloutPolicy is what a new model gets.
func DefaultRolloutPolicy() RolloutPolicy {
	return RolloutPolicy{
		Strategy: Canary, Steps: []float64{10}, BakeSeconds: 60, MaxBakeSeconds: 3600, WatchSeconds: 600, OnInconclusive: RollBackThen, ApproveBefore: "start",
	}
}

const (
	clock  = "15:04"
	maxDay = 366 * 24 * 3600
)

var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// Validate returns one Invalid error that names every field out of range.
func (p RolloutPolicy) Validate() error {
	var faults []string
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	}
	check(slices.Contains(Strategies, p.Strategy) && p.Strategy != AB, "strategy %q: want one of all_at_once, blue_green, canary, linear, steps, shadow", p.Strategy)
	for _, s := range p.Steps {
		check(s > 0 && s < 100, "step %v %%: want between 0 and 100", s)
	}
	check(slices.IsSorted(p.Steps), "steps must ascend, got %v", p.Steps)
	for name, n := range map[string]int64{
		"bake_s": p.BakeSeconds, "bake_requests": p.BakeRequests, "max_bake_s": p.MaxBakeSeconds, "watch_s": p.WatchSeconds, "approval_s": p.ApprovalSeconds,
	} {
		check(n >= 0 && (n <= maxDay || name == "bake_requests"), "%s %d: want 0 to a year", name, n)
	}
	check(p.MaxBakeSeconds == 0 || p.MaxBakeSeconds >= p.BakeSeconds, "max_bake_s %d: want at least bake_s, %d, or 0", p.MaxBakeSeconds, p.BakeSeconds)
	check(p.HoldbackPercent >= 0 && p.HoldbackPercent <= 50, "holdback_percent %v: want 0 to 50", p.HoldbackPercent)
	check(p.OnInconclusive == RollBackThen || p.OnInconclusive == HoldThen || p.OnInconclusive == ExtendThen,
		"on_inconclusive %q: want rollback, hold or extend", p.OnInconclusive)
	check(p.Approvals >= 0 && p.Approvals <= 10, "approvals %d: want 0 to 10", p.Approvals)
	check(p.ApproveBefore == "start" || p.ApproveBefore == "promotion", "approve_before %q: want start or promotion", p.ApproveBefore)
	for i, w := range p.Windows {
		if err := w.validate(); err != nil {
			faults = append(faults, fmt.Sprintf("window %d: %v", i+1, err))
		}
	}
	if len(faults) > 0 {
		slices.Sort(faults)
		return Errorf(Invalid, "rollout policy: %s", strings.Join(faults, "; "))
	}
	return nil
}

func (w Window) validate() error {
	for _, d := range w.Days {
		if !slices.Contains(weekdays, strings.ToLower(d)) {
			return fmt.Errorf("day %q: want mon, tue, wed, thu, fri, sat or sun", d)
		}
	}
	from, err := time.Parse(clock, w.From)
	if err != nil {
		return fmt.Errorf("from %q: want HH:MM", w.From)
	}
	to, err := time.Parse(clock, w.To)
	if err != nil || !to.After(from) {
		return fmt.Errorf("to %q: want HH:MM, later than %s", w.To, w.From)
	}
	if _, err := time.LoadLocation(w.Zone); err != nil {
		return fmt.Errorf("zone %q: %w", w.Zone, err)
	}
	return nil
}

// Open returns zero when traffic may move to a candidate at the given time, else when it may next, and why not now. The
// policy is valid.
func (p RolloutPolicy) Open(now time.Time) (next time.Time, why string) {
	at := now
	if p.FrozenUntil.After(now) {
		at = p.FrozenUntil
		why = "frozen until " + p.FrozenUntil.UTC().Format(time.RFC3339)
		if p.FreezeReason != "" {
			why += ": " + p.FreezeReason
		}
	}
	opens := time.Time{}
	for _, w := range p.Windows {
		if t := w.next(at); opens.IsZero() || t.Before(opens) {
			opens = t
		}
	}
	switch {
	case len(p.Windows) == 0 || opens.Equal(at):
		opens = at
	case why == "":
		why = "the next window opens at " + opens.UTC().Format(time.RFC3339)
	}
	if opens.Equal(now) {
		return time.Time{}, ""
	}
	return opens, why
}

// next returns at, when it lies in the window, else when the window opens next.
func (w Window) next(at time.Time) time.Time {
	zone, err := time.LoadLocation(w.Zone)
	if err != nil {
		zone = time.UTC // Validate has seen it; the zone's file is gone
	}
	from, _ := time.Parse(clock, w.From)
	to, _ := time.Parse(clock, w.To)
	local := at.In(zone)
	for day := range 8 {
		y, m, d := local.AddDate(0, 0, day).Date()
		opens := time.Date(y, m, d, from.Hour(), from.Minute(), 0, 0, zone)
		closes := time.Date(y, m, d, to.Hour(), to.Minute(), 0, 0, zone)
		if !w.on(opens.Weekday()) || !at.Before(closes) {
			continue
		}
		if at.Before(opens) {
			return opens
		}
		return at
	}
	return at.AddDate(0, 0, 7)
}

func (w Window) on(day time.Weekday) bool {
	return len(w.Days) == 0 || slices.ContainsFunc(w.Days, func(d string) bool { return strings.ToLower(d) == weekdays[day] })
}
