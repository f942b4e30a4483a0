package activities

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"go.temporal.io/sdk/testsuite"

	"github.com/orrery-ml/orrery/registry"
)

func TestSurvive_GivesUpOnWhatKillsItsProcess(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		last any // heartbeat of the attempt before
		want registry.Code
	}{
		{"first attempt", nil, ""},
		{"failed by itself twice", deaths{Count: 2}, ""},
		{"died twice", deaths{Count: 1, Live: true}, ""},
		{"died three times", deaths{Count: 2, Live: true}, registry.Invalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var suite testsuite.WorkflowTestSuite
			env := suite.NewTestActivityEnvironment()
			work := func(ctx context.Context) error {
				stop, err := survive(ctx, "the work")
				if err != nil {
					return Fault(err)
				}
				stop()
				return nil
			}
			env.RegisterActivity(work)
			if c.last != nil {
				env.SetHeartbeatDetails(c.last)
			}
			_, err := env.ExecuteActivity(work)
			require.Equal(t, c.want, CodeOf(err))
		})
	}
}
