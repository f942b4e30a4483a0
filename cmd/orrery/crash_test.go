package main

import (
	"database/sql"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
	"github.com/orrery-ml/orrery/workflows"
)

func canary(version int, requests int64) client.NewRollout {
	s := client.NewRolloutStrategy("steps")
	steps := []float32{20, 50}
	return client.NewRollout{Version: new(version), Strategy: &s, Steps: &steps, BakeRequests: &requests, BakeSeconds: new(int64(0)), WatchSeconds: new(int64(0))}
}

// (Argo Rollouts #943, #1411: what is decided depends on who lived to see it.)
//
// The orchestrator dies mid-bake, a worker mid-traffic and a server mid-rollout; the roll-out finishes and no answer
// is another version's.
func TestRollout_SurvivesKills(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, 2)
	c.model("m", 2)
	c.allAtOnce("m")
	traffic := c.load(4)
	run := c.rollout("m", canary(2, 800))

	c.phase(run.Id, "step 1")
	c.orchestrator.Kill()
	time.Sleep(time.Second)
	c.workers[0].Kill()
	time.Sleep(500 * time.Millisecond)
	require.NoError(t, c.orchestrator.Start())
	require.NoError(t, c.workers[0].Start())

	c.phase(run.Id, "step 2")
	c.servers[1].Kill()
	time.Sleep(time.Second)
	require.NoError(t, c.servers[1].Start())

	ended := c.ended(run.Id)
	require.Equal(t, string(registry.Promoted), ended.Outcome, ended.Message)
	c.consistent(2)
	traffic.check(0.001)
}

// Rollback is one write in the server: it works while Temporal is down, and the roll-out it overtook ends SUPERSEDED
// once Temporal is back.
func TestRollback_WorksWhileTemporalIsDown(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	run := c.rollout("m", canary(2, 100_000))
	c.phase(run.Id, "step 1")
	c.temporal.Kill()

	reason := "it looks bad"
	r, err := decode[registry.Route](c.api(0).Rollback(t.Context(), "m", client.Decision{Reason: &reason}))
	require.NoError(t, err)
	require.Equal(t, registry.StableOnly(1), r.Arms)
	_, version, _, err := infer(t.Context(), c.servers[0].url(), "m", 1, "k")
	require.NoError(t, err)
	require.Equal(t, "1", version)
	_, err = decode[client.Run](c.api(0).StartRollout(t.Context(), "m", nil, canary(2, 1)))
	require.ErrorContains(t, err, "Temporal does not answer")

	require.NoError(t, c.temporal.Start())
	ended := c.ended(run.Id)
	require.Equal(t, string(registry.Superseded), ended.Outcome, ended.Message)
	c.consistent(1)
}

// A workflow that is terminated runs no compensation; the reaper reverts what it left, and the next roll-out is judged
// anew. (Argo Rollouts #3120: an aborted canary cannot be retried; Flagger #1152, devantler-tech/platform #2387: wedged
// in Failed.)
func TestRollout_TerminatedByHandLeavesNoOrphanArm(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	run := c.rollout("m", canary(2, 100_000))
	c.phase(run.Id, "step 1")
	out, err := exec.CommandContext(t.Context(), c.temporal.Bin(), "workflow", "terminate", "--workflow-id", run.WorkflowId, "--address", c.temporal.Address).CombinedOutput()
	require.NoError(t, err, string(out))

	ended := c.ended(run.Id)
	require.Equal(t, string(registry.Terminated), ended.Outcome)
	require.Eventually(t, func() bool { return len(c.route("m").Arms) == 1 }, 20*time.Second, 50*time.Millisecond)
	c.consistent(1)
	again := c.rollout("m", canary(2, 1))
	require.NotEmpty(t, again.Id, "the model is not locked")
	_, err = decode[client.Run](c.api(0).DecideRun(t.Context(), again.Id, "abort", client.Decision{}))
	require.NoError(t, err)
	require.Equal(t, string(registry.Aborted), c.ended(again.Id).Outcome)
	c.consistent(1)
}

// Loaded models answer while the database is down, and a server that starts then serves its last route from disk.
func TestServer_StartsFromDiskWhileTheDatabaseIsAway(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 1)
	c.allAtOnce("m")
	c.postgres.Kill()
	c.servers[0].Kill()
	require.NoError(t, c.servers[0].Start())
	require.Eventually(t, func() bool {
		_, version, _, err := infer(t.Context(), c.servers[0].url(), "m", 1, "k")
		return err == nil && version == "1"
	}, 30*time.Second, 100*time.Millisecond)
	_, err := decode[[]client.Model](c.api(0).ListModels(t.Context()))
	require.ErrorContains(t, err, "registry database")

	require.NoError(t, c.postgres.Start())
	c.awaitReady(0, 1)
	c.consistent(1)
}

// After a promotion the watch goes back by itself when an absolute guardrail trips.
func TestWatch_GoesBackWhenAGuardrailTrips(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 1)
	c.allAtOnce("m")
	nan := c.upload("m", map[string][]byte{"model.onnx": logarithm()})
	require.Equal(t, "SUCCEEDED", nan.State, nan.Message)
	s, watch := client.NewRolloutStrategy("all_at_once"), int64(600)
	run := c.ended(c.rollout("m", client.NewRollout{Version: new(2), Strategy: &s, WatchSeconds: &watch}).Id)
	require.Equal(t, string(registry.Promoted), run.Outcome, run.Message)
	_, _, _, err := infer(t.Context(), c.servers[0].url(), "m", -1, "k") // NaN has no JSON form, and is counted
	require.Error(t, err)
	ended := c.ended(run.Id + "-watch")
	require.Equal(t, string(registry.RolledBack), ended.Outcome, ended.Message)
	require.Contains(t, ended.Message, "NaN")
	c.consistent(1)
}

// A person pauses, resumes, promotes, rejects and aborts.
func TestRollout_ObeysPeople(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	say := func(run, action string) error {
		_, err := decode[client.Run](c.api(0).DecideRun(t.Context(), run, action, client.Decision{}))
		return err
	}
	run := c.rollout("m", canary(2, 100_000))
	c.phase(run.Id, "step 1")
	require.NoError(t, say(run.Id, "pause"))
	require.ErrorContains(t, say(run.Id, "pause"), "paused already")
	require.ErrorContains(t, say(run.Id, "approve"), "no approval is asked for")
	require.NoError(t, say(run.Id, "resume"))
	require.NoError(t, say(run.Id, "promote_now"))
	require.Equal(t, string(registry.Promoted), c.ended(run.Id).Outcome)
	c.consistent(2)
	require.ErrorContains(t, say(run.Id, "abort"), "ended")

	approve := true
	r := canary(1, 1)
	r.RequireApproval = &approve
	run = c.rollout("m", r)
	c.phase(run.Id, "waiting for approval")
	require.NoError(t, say(run.Id, "reject"))
	require.Equal(t, string(registry.Rejected), c.ended(run.Id).Outcome)
	c.consistent(2)

	run = c.rollout("m", canary(1, 100_000))
	c.phase(run.Id, "step 1")
	champion := client.AliasChange{Version: 1}
	_, err := decode[[]client.Alias](c.api(0).SetAlias(t.Context(), "m", registry.Champion, champion))
	require.ErrorContains(t, err, run.Id, "a roll-out owns the route")
	require.NoError(t, say(run.Id, "abort"))
	require.Equal(t, string(registry.Aborted), c.ended(run.Id).Outcome)
	c.consistent(2)
}

// Two roll-outs of one model: the second is refused with the id of the first. A bad candidate is rolled back.
func TestRollout_OneAtATimeAndRolledBackWhenWorse(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 1)
	c.allAtOnce("m")
	bad := c.upload("m", map[string][]byte{"model.onnx": echo(2, 60)}) // fails for x from 60 to 99
	require.Equal(t, "SUCCEEDED", bad.State, bad.Message)
	l := c.load(4)
	run := c.rollout("m", canary(2, 100_000))
	_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), "m", nil, canary(2, 1)))
	require.ErrorContains(t, err, run.Id)
	ended := c.ended(run.Id)
	require.Equal(t, string(registry.RolledBack), ended.Outcome, ended.Message)
	require.Contains(t, ended.Message, "errs more often", ended.Message)
	l.stop()
	c.consistent(1)
	evidence, err := decode[[]registry.Evidence](c.api(0).ListEvidence(t.Context(), run.Id))
	require.NoError(t, err)
	require.NotEmpty(t, evidence)
}

// A roll-out that cannot begin is refused, or ends; it never stays and keeps others out.
func TestRollout_ThatCannotBegin(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	for body, says := range map[string]string{
		`{"version": 2, "holdback": 10}`:                                              `unknown field "holdback"`,
		`{"version": 2, "bake_seconds": 10, "max_bake_seconds": 5}`:                   "max_bake_s 5: want at least bake_s, 10, or 0",
		`{"version": 2, "reason": "` + strings.Repeat("because ", 50_000) + `"}`:      "the body is over 65536 bytes",
		`{"version": 2, "strategy": "ab", "variants": [{"version": 2, "weight": 5}]}`: `unknown field "variants"`,
	} {
		_, err := decode[client.Run](c.api(0).StartRolloutWithBody(t.Context(), "m", nil, "application/json", strings.NewReader(body)))
		require.ErrorContains(t, err, says)
	}

	s, err := store.Open(t.Context(), c.postgres.DSN("postgres"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	inserted := func(id, reason string) registry.Run {
		input, err := json.Marshal(workflows.RolloutInput{RunID: id, Model: "m", Candidate: 2, Actor: "ann", Reason: reason})
		require.NoError(t, err)
		run, err := s.InsertRun(t.Context(), registry.Run{
			ID: id, Kind: registry.KindRollout, Model: "m", Version: 2, WorkflowID: workflows.RolloutID("m"), Lock: workflows.RolloutID("m"), Input: input, Actor: "ann",
		})
		require.NoError(t, err)
		return run
	}
	// The server died before it started the workflow, and nobody wants it any more.
	run := inserted("never-started", "")
	require.NoError(t, c.say(run.ID, "abort", client.Decision{Reason: new("too late")}))
	ended := c.ended(run.ID)
	require.Equal(t, string(registry.Aborted), ended.Outcome)
	require.Contains(t, ended.Message, "before it began: too late")
	// Temporal will not have it, and has not for a while.
	run = inserted("refused", strings.Repeat("because ", 500_000))
	db, err := sql.Open("pgx", c.postgres.DSN("postgres"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	_, err = db.ExecContext(t.Context(), "UPDATE runs SET created_at = created_at - 180000000 WHERE id = $1", run.ID)
	require.NoError(t, err)
	ended = c.ended(run.ID)
	require.Equal(t, string(registry.RunFailed), ended.State)
	require.Contains(t, ended.Message, "Temporal refuses to start it")
	c.consistent(1)
	inserted("superseded", "")
	again := canary(2, 100_000)
	again.OnConflict = new(client.NewRolloutOnConflict("supersede"))
	require.NotEmpty(t, c.rollout("m", again).Id, "the model is not locked")
	require.Equal(t, string(registry.Superseded), c.ended("superseded").Outcome)
}
