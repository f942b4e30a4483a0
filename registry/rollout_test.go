package registry

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRolloutPolicy_Open(t *testing.T) {
	t.Parallel()
	at := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339, s)
		require.NoError(t, err)
		return v
	}
	office := RolloutPolicy{Windows: []Window{{Days: []string{"mon", "tue", "wed", "thu"}, From: "09:00", To: "17:00", Zone: "Europe/Berlin"}}}
	for _, c := range []struct {
		name, now, next string
		policy          RolloutPolicy
	}{
		{"no windows", "2026-11-25T03:00:00Z", "", RolloutPolicy{}},
		{"inside", "2026-11-25T10:00:00Z", "", office},
		{"before it opens, in its own zone", "2026-11-25T07:59:00Z", "2026-11-25T08:00:00Z", office},
		{"after it closed", "2026-11-25T16:00:00Z", "2026-11-26T08:00:00Z", office},
		{"over a weekend", "2026-11-26T16:00:00Z", "2026-11-30T08:00:00Z", office},
		{"summer time", "2026-07-01T06:30:00Z", "2026-07-01T07:00:00Z", office},
		{"frozen", "2026-11-25T10:00:00Z", "2026-12-01T00:00:00Z", RolloutPolicy{FrozenUntil: at("2026-12-01T00:00:00Z")}},
		{"frozen into the night", "2026-11-25T10:00:00Z", "2026-12-01T08:00:00Z", RolloutPolicy{FrozenUntil: at("2026-12-01T00:00:00Z"), Windows: office.Windows}},
		{"a freeze that is over", "2026-11-25T10:00:00Z", "", RolloutPolicy{FrozenUntil: at("2026-11-25T09:00:00Z")}},
	} {
		next, why := c.policy.Open(at(c.now))
		if c.next == "" {
			require.True(t, next.IsZero(), "%s: %s", c.name, why)
			continue
		}
		require.Equal(t, at(c.next), next.UTC(), c.name)
		require.NotEmpty(t, why, c.name)
	}
}

func TestRolloutPolicy_Validate(t *testing.T) {
	t.Parallel()
	require.NoError(t, DefaultRolloutPolicy().Validate())
	p := DefaultRolloutPolicy()
	p.Steps, p.Approvals, p.OnInconclusive, p.Windows = []float64{50, 5}, 99, "shrug", []Window{{Days: []string{"someday"}}, {From: "17:00", To: "09:00"}}
	err := p.Validate()
	require.Equal(t, Invalid, CodeOf(err))
	for _, part := range []string{"steps must ascend", "approvals 99", "shrug", "window 1: day", "window 2: to"} {
		require.ErrorContains(t, err, part)
	}
}
