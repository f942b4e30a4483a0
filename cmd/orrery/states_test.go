package main

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	temporal "go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
)

// resting is a state in which a roll-out stays until somebody does something.
type resting struct {
	name    string
	request func(*client.NewRollout)
	policy  string
	config  string // serving config while it is in the state
	phase   string
	then    string // what is said once it is in phase
	after   string // the phase that this leads to
}

// Every state that a roll-out rests in has a way out, whatever is thrown at it; afterwards traffic is on the version that
// had it, alias and route agree, the run tells the truth, and the next roll-out may come. All of it is real.
func TestRollout_EveryStateHasAWayOut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	engine, err := temporal.Dial(temporal.Options{HostPort: c.temporal.Address, Logger: quietLog{}})
	require.NoError(t, err)
	t.Cleanup(engine.Close)
	allAtOnce := func(r *client.NewRollout) { r.Strategy, r.Steps = new(client.NewRolloutStrategy("all_at_once")), nil }
	states := []resting{
		{name: "approval", request: func(r *client.NewRollout) { r.RequireApproval = new(true) }, phase: "waiting for approval"},
		{name: "gate", policy: `{"frozen_until": "2099-01-01T00:00:00Z"}`, phase: "waiting until traffic may move"},
		{name: "warming", config: `{"worker_labels": {"rack": "none"}}`, phase: "warming the candidate"},
		{name: "step", phase: "step 1"},
		{name: "paused", phase: "step 1", then: "pause", after: "(paused)"},
		{name: "held", request: func(r *client.NewRollout) {
			r.OnInconclusive, r.MaxBakeSeconds = new(client.NewRolloutOnInconclusive("hold")), new(int64(1))
		}, phase: "waiting for a decision"},
		{name: "promotion", request: allAtOnce, policy: `{"approvals": 1, "approve_before": "promotion"}`, phase: "waiting for approval"},
	}
	events := map[string]func(t *testing.T, c *cluster, model string, run client.Run) registry.Outcome{
		"abort": func(t *testing.T, c *cluster, _ string, run client.Run) registry.Outcome {
			require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
			return registry.Aborted
		},
		"cancel": func(t *testing.T, _ *cluster, _ string, run client.Run) registry.Outcome {
			require.NoError(t, engine.CancelWorkflow(t.Context(), run.WorkflowId, ""))
			return registry.Aborted
		},
		"terminate": func(t *testing.T, _ *cluster, _ string, run client.Run) registry.Outcome {
			require.NoError(t, engine.TerminateWorkflow(t.Context(), run.WorkflowId, "", "the last resort"))
			return registry.Terminated
		},
		"rollback": func(t *testing.T, c *cluster, model string, run client.Run) registry.Outcome {
			arms := len(c.route(model).Arms)
			_, err := decode[registry.Route](c.api(0).Rollback(t.Context(), model, client.Decision{}))
			if arms == 1 { // nothing has moved yet
				require.ErrorContains(t, err, "no version was stable before")
				require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
				return registry.Aborted
			}
			require.NoError(t, err)
			return registry.Superseded
		},
		"second roll-out": func(t *testing.T, c *cluster, model string, run client.Run) registry.Outcome {
			again := canary(2, 100_000)
			_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), model, nil, again))
			require.ErrorContains(t, err, run.Id)
			again.OnConflict = new(client.NewRolloutOnConflict("supersede"))
			second := c.rollout(model, again)
			require.NoError(t, c.say(second.Id, "abort", client.Decision{}))
			require.Equal(t, string(registry.Aborted), c.ended(second.Id).Outcome)
			return registry.Superseded
		},
	}
	for _, s := range states {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			c := *c
			c.t = t
			c.model(s.name, 2)
			c.allAtOnce(s.name)
			if s.policy != "" {
				c.policy(s.name, s.policy)
			}
			for name, happens := range events {
				if s.config != "" {
					c.config(s.name, s.config)
				}
				r := canary(2, 100_000)
				if s.request != nil {
					s.request(&r)
				}
				run := c.rollout(s.name, r)
				c.phase(run.Id, s.phase)
				if s.then != "" {
					require.NoError(t, c.say(run.Id, s.then, client.Decision{}))
					c.phase(run.Id, s.after)
				}
				want := happens(t, &c, s.name, run)
				ended := c.ended(run.Id)
				require.Equal(t, string(want), ended.Outcome, "%s: %s", name, ended.Message)
				require.NotEmpty(t, ended.Message, name)
				require.Eventually(t, func() bool { return len(c.route(s.name).Arms) == 1 }, 20*time.Second, 20*time.Millisecond, name)
				if s.config != "" {
					c.config(s.name, `{"worker_labels": {}}`)
				}
				c.settled(s.name, 1)
				_, version, _, err := infer(t.Context(), c.servers[0].url(), s.name, 1, "k")
				require.NoError(t, err, name)
				require.Equal(t, "1", version, name)
			}
		})
	}
}

// config changes a model's serving config.
func (c *cluster) config(model, config string) {
	c.t.Helper()
	raw := json.RawMessage(config)
	_, err := decode[client.Model](c.api(0).ConfigureModel(c.t.Context(), model, client.ModelConfiguration{Config: &raw}))
	require.NoError(c.t, err)
}
