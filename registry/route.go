package registry

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// FullWeight is all of a model's traffic, in basis points.
const FullWeight = 10_000

// Role is what an arm of a route is for.
type Role string

// The roles. The weights of all but shadow arms add up to FullWeight; a shadow's weight is the share mirrored to it.
const (
	Stable    Role = "stable"
	Candidate Role = "candidate"
	Variant   Role = "variant"
	Shadow    Role = "shadow"
	Holdback  Role = "holdback"
)

// Arm sends Weight basis points of a model's traffic to a version.
type Arm struct {
	Version int  `json:"version"`
	Role    Role `json:"role"`
	Weight  int  `json:"weight"`
}

// Route is how a model's traffic is split. Revision 0 with no arms is the route of a model that serves nothing yet.
type Route struct {
	Model    string    `json:"model"`
	Revision int64     `json:"revision"`
	Arms     []Arm     `json:"arms"`
	Owner    string    `json:"owner"`           // run that owns the arms besides stable; "" when nobody does
	Salt     string    `json:"salt"`            // of the sticky hash; set anew by each roll-out
	Event    int64     `json:"event,omitempty"` // number of the event that announced it; left out in that event
	ChangeID string    `json:"change_id"`
	Actor    string    `json:"actor"`
	Reason   string    `json:"reason"`
	At       time.Time `json:"at"`
}

// Arm returns the arm of the given version.
func (r Route) Arm(version int) (Arm, bool) {
	i := slices.IndexFunc(r.Arms, func(a Arm) bool { return a.Version == version })
	if i < 0 {
		return Arm{}, false
	}
	return r.Arms[i], true
}

// StableVersion returns the version of the stable arm, 0 when there is none.
func (r Route) StableVersion() int {
	for _, a := range r.Arms {
		if a.Role == Stable {
			return a.Version
		}
	}
	return 0
}

// StableOnly returns the arms of a route that sends everything to version, none when version is 0.
func StableOnly(version int) []Arm {
	if version == 0 {
		return nil
	}
	return []Arm{{Version: version, Role: Stable, Weight: FullWeight}}
}

// Validate checks the arms; it ends in Invalid with every fault named.
func (r Route) Validate() error {
	var faults []string
	total, stable, owned := 0, 0, false
	seen := map[int]bool{}
	for _, a := range r.Arms {
		if a.Version < 1 || seen[a.Version] {
			faults = append(faults, fmt.Sprintf("version %d: want a positive number, once", a.Version))
		}
		seen[a.Version] = true
		if a.Weight < 0 || a.Weight > FullWeight {
			faults = append(faults, fmt.Sprintf("weight %d of version %d: want 0 to %d", a.Weight, a.Version, FullWeight))
		}
		switch a.Role {
		case Stable:
			stable++
			total += a.Weight
		case Candidate, Variant, Holdback:
			owned = owned || a.Role != Holdback
			total += a.Weight
		case Shadow:
			owned = true
		default:
			faults = append(faults, fmt.Sprintf("role %q of version %d: want stable, candidate, variant, shadow or holdback", a.Role, a.Version))
		}
	}
	if len(r.Arms) > 0 && stable != 1 {
		faults = append(faults, fmt.Sprintf("%d stable arms: want exactly one", stable))
	}
	if len(r.Arms) > 0 && total != FullWeight {
		faults = append(faults, fmt.Sprintf("weights add up to %d: want %d", total, FullWeight))
	}
	if owned && r.Owner == "" {
		faults = append(faults, "a candidate, variant or shadow arm needs an owner")
	}
	if len(faults) > 0 {
		return Errorf(Invalid, "route of %s: %s", r.Model, strings.Join(faults, "; "))
	}
	return nil
}

// RouteChange is the input of SetRoute: a compare-and-set of a model's route together with its alias moves.
type RouteChange struct {
	ChangeID string         // unique for ever; a repeat returns what the first did
	Model    string         // whose route
	Expected int64          // revision the change was decided on
	Arms     []Arm          // the new arms
	Owner    string         // run that owns the new route, "" for none
	Salt     string         // "" keeps the current one
	By       string         // run that makes the change, "" when a person does
	Take     bool           // an operator takes the route from its owner
	Aliases  map[string]int // alias -> version, 0 to remove; Champion follows the stable arm by itself
	Gated    bool           // only when the model's policy lets traffic move now
	Hold     *Hold          // placed with the change
	Actor    string
	Reason   string
}

// GateClosed is why a gated change of a route was not made.
type GateClosed struct {
	Opens time.Time
	Why   string
}

// Error implements error.
func (g *GateClosed) Error() string { return "no traffic may move now: " + g.Why }

// Next returns the route that follows current when c is applied. It ends in Conflict when the revision moved on or
// another run owns the route, and in Invalid when the arms make no route or an alias is malformed.
func (c RouteChange) Next(current Route, at time.Time) (Route, error) {
	if c.ChangeID == "" || c.Actor == "" {
		return Route{}, Errorf(Invalid, "a route change needs a change id and an actor")
	}
	if current.Revision != c.Expected {
		return Route{}, Errorf(Conflict, "route of %s is at revision %d, not %d: look again and decide anew", c.Model, current.Revision, c.Expected)
	}
	if current.Owner != "" && current.Owner != c.By && !c.Take {
		return Route{}, Errorf(Conflict, "route of %s is owned by run %s: abort it, or take the route", c.Model, current.Owner)
	}
	next := Route{
		Model: c.Model, Revision: current.Revision + 1, Arms: slices.Clone(c.Arms), Owner: c.Owner, Salt: c.Salt,
		ChangeID: c.ChangeID, Actor: c.Actor, Reason: c.Reason, At: at,
	}
	if next.Salt == "" {
		next.Salt = current.Salt
	}
	for name := range c.Aliases {
		if name == Champion {
			return Route{}, Errorf(Invalid, "alias %s follows the stable arm; change the route", Champion)
		}
		if err := CheckAliasName(name); err != nil {
			return Route{}, err
		}
	}
	return next, next.Validate()
}

// BackFrom returns the arms that undo the route at the head of history (newest first): while a roll-out is under way,
// the stable arm alone; otherwise the last version that was stable before the present one, a holdback's too. It ends in
// Precondition when there is nothing to go back to.
func BackFrom(history []Route) ([]Arm, error) {
	if len(history) == 0 || len(history[0].Arms) == 0 {
		return nil, Errorf(Precondition, "the model serves nothing, so there is nothing to roll back")
	}
	now := history[0]
	underWay := func(a Arm) bool { return a.Role != Stable && a.Role != Holdback }
	if slices.ContainsFunc(now.Arms, underWay) {
		return StableOnly(now.StableVersion()), nil
	}
	for _, r := range history[1:] {
		if v := r.StableVersion(); v != 0 && v != now.StableVersion() {
			return StableOnly(v), nil
		}
	}
	return nil, Errorf(Precondition, "no version was stable before version %d", now.StableVersion())
}
