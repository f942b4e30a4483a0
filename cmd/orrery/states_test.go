package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	temporal "go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
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
	engine := c.engine()
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

// moving is a state in which a roll-out waits for a gateway that does not come along.
type moving struct {
	enter   func(c *cluster, model string, run client.Run) client.Run
	outcome registry.Outcome // of what cannot stop it any more
	version int              // that has the traffic then
}

// A roll-out whose route is on its way has a way out too: while it gives its candidate the first traffic, promotes and
// puts its route back, a gateway holds its lease and acknowledges nothing.
func TestRollout_MovingStatesHaveAWayOut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	engine := c.engine()
	s, err := store.Open(t.Context(), c.postgres.DSN("postgres"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	oneArm := func(c *cluster, model string) {
		require.Eventually(t, func() bool { return len(c.route(model).Arms) == 1 }, 20*time.Second, 20*time.Millisecond, model)
	}
	states := map[string]moving{
		"shifting": {enter: func(c *cluster, model string, _ client.Run) client.Run {
			run := c.rollout(model, canary(2, 100_000))
			require.Eventually(t, func() bool { return len(c.route(model).Arms) == 2 }, 20*time.Second, 20*time.Millisecond)
			return run
		}},
		"promoting": {enter: func(c *cluster, _ string, run client.Run) client.Run {
			require.NoError(t, c.say(run.Id, "promote_now", client.Decision{}))
			c.phase(run.Id, "promoting")
			return run
		}, outcome: registry.Promoted, version: 2},
		"undoing": {enter: func(c *cluster, model string, run client.Run) client.Run {
			require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
			oneArm(c, model)
			return run
		}, outcome: registry.Aborted, version: 1},
	}
	// Each event returns what must come of it, and which version has the traffic then.
	events := map[string]func(s moving, model string, run client.Run) (registry.Outcome, int){
		"abort": func(s moving, _ string, run client.Run) (registry.Outcome, int) {
			err := c.say(run.Id, "abort", client.Decision{})
			if s.outcome == "" {
				require.NoError(t, err)
				return registry.Aborted, 1
			}
			require.ErrorContains(t, err, map[registry.Outcome]string{registry.Promoted: "too late", registry.Aborted: "is ending"}[s.outcome])
			return s.outcome, s.version
		},
		"cancel": func(s moving, _ string, run client.Run) (registry.Outcome, int) {
			require.NoError(t, engine.CancelWorkflow(t.Context(), run.WorkflowId, ""))
			if s.outcome == "" {
				return registry.Aborted, 1
			}
			return s.outcome, s.version
		},
		"terminate": func(s moving, _ string, run client.Run) (registry.Outcome, int) {
			require.NoError(t, engine.TerminateWorkflow(t.Context(), run.WorkflowId, "", "the last resort"))
			return registry.Terminated, max(s.version, 1)
		},
		"rollback": func(s moving, model string, _ client.Run) (registry.Outcome, int) {
			_, err := decode[registry.Route](c.api(0).Rollback(t.Context(), model, client.Decision{}))
			if s.outcome == registry.Aborted { // it is under way
				require.ErrorContains(t, err, "no version was stable before")
				return s.outcome, 1
			}
			require.NoError(t, err)
			if s.outcome == registry.Promoted { // and then somebody rolled back
				return s.outcome, 1
			}
			return registry.Superseded, 1
		},
		"second roll-out": func(s moving, model string, run client.Run) (registry.Outcome, int) {
			_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), model, nil, canary(3, 100_000)))
			require.ErrorContains(t, err, run.Id)
			if s.outcome == "" {
				return registry.Superseded, 1
			}
			return s.outcome, s.version
		},
	}
	type roll struct {
		state, event, model string
		run                 client.Run
	}
	var all []roll
	for state := range states {
		for event := range events {
			r := roll{state: state, event: event, model: state + "-" + strings.ReplaceAll(event, " ", "-")}
			c.model(r.model, 3)
			c.allAtOnce(r.model)
			if state != "shifting" {
				r.run = c.rollout(r.model, canary(2, 100_000))
				c.phase(r.run.Id, "step 1")
			}
			all = append(all, r)
		}
	}
	feed, err := s.Snapshot(t.Context())
	require.NoError(t, err)
	const slow = "a-slow-gateway"
	require.NoError(t, s.PutLease(t.Context(), registry.Lease{
		ID: slow, Kind: registry.GatewayLease, Node: slow, Applied: feed.Position, StartedAt: time.Now(), Expires: time.Now().Add(time.Hour),
	}))
	for i, r := range all {
		all[i].run = states[r.state].enter(c, r.model, r.run)
	}
	outcomes, versions, seconds := map[string]registry.Outcome{}, map[string]int{}, map[string]chan client.Run{}
	for _, r := range all {
		outcomes[r.model], versions[r.model] = events[r.event](states[r.state], r.model, r.run)
		if r.event != "second roll-out" {
			continue
		}
		seconds[r.model] = make(chan client.Run, 1) // it waits for the first one's end
		again := canary(3, 100_000)
		again.OnConflict = new(client.NewRolloutOnConflict("supersede"))
		go func() {
			run, err := decode[client.Run](c.api(0).StartRollout(context.WithoutCancel(t.Context()), r.model, nil, again))
			if err != nil {
				t.Errorf("%s: %v", r.model, err)
			}
			seconds[r.model] <- run
		}()
	}
	for _, r := range all {
		taken := r.event == "rollback" && outcomes[r.model] == registry.Superseded // it has nothing to put back
		if taken || r.event == "terminate" {
			continue
		}
		phase := "putting the route back"
		if r.state == "promoting" {
			phase = r.state
		}
		c.phase(r.run.Id, phase+", waiting for gateway "+slow)
		run, err := decode[client.Run](c.api(0).GetRun(t.Context(), r.run.Id))
		require.NoError(t, err)
		require.Nil(t, run.EndedAt, "%s is %s", r.model, run.State)
	}
	require.NoError(t, s.DropLease(t.Context(), slow))
	for _, r := range all {
		ended := c.ended(r.run.Id)
		require.Equal(t, string(outcomes[r.model]), ended.Outcome, "%s: %s", r.model, ended.Message)
		require.NotEmpty(t, ended.Message, r.model)
		if second := seconds[r.model]; second != nil {
			run := <-second
			require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
			require.Equal(t, string(registry.Aborted), c.ended(run.Id).Outcome)
		}
		oneArm(c, r.model)
		c.settled(r.model, versions[r.model])
		_, version, _, err := infer(t.Context(), c.servers[0].url(), r.model, 1, "k")
		require.NoError(t, err, r.model)
		require.Equal(t, strconv.Itoa(versions[r.model]), version, r.model)
	}
}

// A roll-out that cannot put its route back waits for an operator, and there is a way out of that too. Here its model is
// lost from the registry for a while, as after a restore of the wrong backup.
func TestRollout_NeedsOperatorHasAWayOut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	engine := c.engine()
	db, err := sql.Open("pgx", c.postgres.DSN("postgres"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	rename := func(from, to string) {
		tx, err := db.BeginTx(t.Context(), nil)
		require.NoError(t, err)
		_, err = tx.ExecContext(t.Context(), "SET LOCAL session_replication_role = replica") // no foreign keys
		require.NoError(t, err)
		done, err := tx.ExecContext(t.Context(), "UPDATE models SET name = $2 WHERE name = $1", from, to)
		require.NoError(t, err)
		n, err := done.RowsAffected()
		require.NoError(t, err)
		require.Equal(t, int64(1), n)
		require.NoError(t, tx.Commit())
	}
	release := func(run client.Run) { // it is refused while an earlier one is tried, which may be the last
		require.Eventually(t, func() bool {
			err := c.say(run.Id, "release", client.Decision{})
			return err == nil || strings.Contains(err.Error(), "run "+run.Id+" ended")
		}, 20*time.Second, 20*time.Millisecond)
	}
	// Each event gives the model back and returns what must come of the run.
	events := map[string]func(model string, run client.Run, found func()) registry.Outcome{
		"abort": func(_ string, run client.Run, found func()) registry.Outcome {
			require.ErrorContains(t, c.say(run.Id, "abort", client.Decision{}), "is ending")
			found()
			release(run)
			return registry.Aborted
		},
		"cancel": func(_ string, run client.Run, found func()) registry.Outcome {
			require.NoError(t, engine.CancelWorkflow(t.Context(), run.WorkflowId, ""))
			found()
			release(run)
			return registry.Aborted
		},
		"terminate": func(_ string, run client.Run, found func()) registry.Outcome {
			require.NoError(t, engine.TerminateWorkflow(t.Context(), run.WorkflowId, "", "the last resort"))
			require.Equal(t, string(registry.Terminated), c.ended(run.Id).Outcome)
			found()
			return registry.Terminated
		},
		"rollback": func(model string, run client.Run, found func()) registry.Outcome {
			found()
			_, err := decode[registry.Route](c.api(0).Rollback(t.Context(), model, client.Decision{}))
			require.NoError(t, err)
			release(run)
			return registry.Superseded
		},
		"second roll-out": func(model string, run client.Run, found func()) registry.Outcome {
			found()
			_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), model, nil, canary(2, 100_000)))
			require.ErrorContains(t, err, run.Id)
			release(run)
			return registry.Aborted
		},
		"too early": func(_ string, run client.Run, found func()) registry.Outcome {
			release(run)
			release(run) // it needs an operator again
			found()
			release(run)
			return registry.Aborted
		},
	}
	for event, happens := range events {
		model := "lost-" + strings.ReplaceAll(event, " ", "-")
		c.model(model, 2)
		c.allAtOnce(model)
		run := c.rollout(model, canary(2, 100_000))
		c.phase(run.Id, "step 1")
		rename(model, "elsewhere")
		require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
		c.state(run.Id, registry.RunNeedsOperator)
		seen, err := decode[client.Run](c.api(0).GetRun(t.Context(), run.Id))
		require.NoError(t, err)
		require.Contains(t, seen.Phase, "needs an operator: no model", "it says why")
		_, _, _, err = infer(t.Context(), c.servers[0].url(), model, 1, "k")
		require.NoError(t, err, "%s: servers go on meanwhile", event)
		want := happens(model, run, func() { rename("elsewhere", model) })
		ended := c.ended(run.Id)
		require.Equal(t, string(want), ended.Outcome, "%s: %s", event, ended.Message)
		require.Eventually(t, func() bool { return len(c.route(model).Arms) == 1 }, 20*time.Second, 20*time.Millisecond, event)
		c.settled(model, 1)
	}
}

// state waits until a run is in a state.
func (c *cluster) state(id string, state registry.RunState) {
	c.t.Helper()
	require.Eventually(c.t, func() bool {
		run, err := decode[client.Run](c.api(0).GetRun(c.t.Context(), id))
		return err == nil && run.State == string(state)
	}, 150*time.Second, 20*time.Millisecond, "run %s never was %s", id, state)
}

// engine returns a client of Temporal.
func (c *cluster) engine() temporal.Client {
	c.t.Helper()
	engine, err := temporal.Dial(temporal.Options{HostPort: c.temporal.Address, Logger: quietLog{}})
	require.NoError(c.t, err)
	c.t.Cleanup(engine.Close)
	return engine
}
