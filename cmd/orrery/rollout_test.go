package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/workflowservice/v1"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
)

// say decides something about a run.
func (c *cluster) say(run, action string, d client.Decision) error {
	_, err := decode[client.Run](c.api(0).DecideRun(c.t.Context(), run, action, d))
	return err
}

// as returns a client with a new key of a role.
func (c *cluster) as(name, role string) *client.Client {
	c.t.Helper()
	k, err := decode[client.Key](c.api(0).CreateKey(c.t.Context(), client.NewKey{Name: name, Role: role}))
	require.NoError(c.t, err)
	api, err := client.NewClient(c.servers[0].url()+"/api/v1", client.WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+*k.Secret)
		return nil
	}))
	require.NoError(c.t, err)
	return api
}

// indexed counts the versions that the protocol's repository index shows to a key.
func (c *cluster) indexed(key string) int {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), http.MethodPost, c.servers[0].url()+"/v2/repository/index", strings.NewReader("{}"))
	require.NoError(c.t, err)
	r.Header.Set("Authorization", "Bearer "+key)
	list, err := decode[[]struct{ Name string }](http.DefaultClient.Do(r))
	require.NoError(c.t, err)
	return len(list)
}

func (c *cluster) policy(model, policy string) {
	c.t.Helper()
	raw := json.RawMessage(policy)
	_, err := decode[client.Model](c.api(0).ConfigureModel(c.t.Context(), model, client.ModelConfiguration{Rollout: &raw}))
	require.NoError(c.t, err)
}

// A shadow answers nobody: the caller's answers stay the stable version's, and pairs of answers decide.
func TestRollout_ShadowIsComparedPairByPair(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, 1)
	c.model("m", 1)
	c.allAtOnce("m")
	same := c.upload("m", map[string][]byte{"model.onnx": echo(1.0001, 0)})
	require.Equal(t, "SUCCEEDED", same.State, same.Message)
	other := c.upload("m", map[string][]byte{"model.onnx": echo(90, 0)})
	require.Equal(t, "SUCCEEDED", other.State, other.Message)
	failing := c.upload("m", map[string][]byte{"model.onnx": echo(1, 60)})
	require.Equal(t, "SUCCEEDED", failing.State, failing.Message)
	l := c.load(4)
	shadow := func(version int) client.Run {
		s, none, requests := client.NewRolloutStrategy("shadow"), int64(0), int64(400)
		return c.ended(c.rollout("m", client.NewRollout{Version: &version, Strategy: &s, BakeSeconds: &none, BakeRequests: &requests}).Id)
	}
	run := shadow(2)
	require.Equal(t, string(registry.Passed), run.Outcome, run.Message)
	require.Equal(t, "SUCCEEDED", run.State)
	run = shadow(3)
	require.Equal(t, string(registry.RolledBack), run.Outcome, run.Message)
	require.Contains(t, run.Message, "answers disagree")
	run = shadow(4)
	require.Equal(t, string(registry.RolledBack), run.Outcome, run.Message)
	require.Contains(t, run.Message, "errs more often")
	l.check(0)
	for answered := range l.routes {
		require.True(t, strings.HasSuffix(answered, "/1"), "%s answered", answered)
	}
	c.consistent(1)
}

// An experiment is decided by the feedback of callers, each on the arm that its key gives it.
func TestRollout_AnExperimentPromotesTheVariantThatFeedbackShows(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, 1)
	c.model("m", 3)
	c.allAtOnce("m")
	s, none, promote, bandit, every := client.NewRolloutStrategy("ab"), int64(0), true, true, int64(10)
	_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), "m", nil, client.NewRollout{Strategy: &s}))
	require.ErrorContains(t, err, "needs an experiment")
	run := c.rollout("m", client.NewRollout{
		Strategy: &s, BakeSeconds: &none, WatchSeconds: &none, Promote: &promote, Experiment: &client.Experiment{
			Bandit: &bandit, EverySeconds: &every, Variants: []client.VariantShare{{Version: 2, Percent: 30}, {Version: 3, Percent: 30}},
		},
	})
	c.phase(run.Id, "experiment")
	require.ErrorContains(t, c.say(run.Id, "promote_now", client.Decision{}), "promotes its winner")

	ctx, stop := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	defer callers.Wait()
	defer stop()
	chance := map[string]int{"1": 20, "2": 22, "3": 55} // of a hundred
	for g := range 4 {
		callers.Go(func() {
			for i := g; ctx.Err() == nil; i += 4 {
				key := fmt.Sprintf("caller-%d", i)
				_, version, _, err := infer(ctx, c.servers[i%2].url(), "m", 1, key)
				if err != nil {
					continue
				}
				v := 0.0
				if (i*7919)%100 < chance[version] {
					v = 1
				}
				got, err := c.api(i%2).AddFeedback(ctx, "m", []client.Feedback{{Key: key, Value: v}})
				if err == nil {
					_ = got.Body.Close()
				}
			}
		})
	}
	ended := c.ended(run.Id)
	stop()
	require.Equal(t, string(registry.Promoted), ended.Outcome, ended.Message)
	c.consistent(3)
	var result struct {
		Judgement struct {
			Winner int `json:"winner"`
			Metric []struct {
				Version int     `json:"version"`
				Lower   float64 `json:"lower"`
			} `json:"metric"`
		} `json:"judgement"`
	}
	require.NoError(t, json.Unmarshal(*ended.Result, &result))
	require.Equal(t, 3, result.Judgement.Winner)
	require.Positive(t, result.Judgement.Metric[1].Lower)
}

// Steps of one size, each of which waits for its requests, until the candidate has everything.
func TestRollout_LinearRaisesTheWeight(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	traffic := c.load(2)
	s, none, requests, percent := client.NewRolloutStrategy("linear"), int64(0), int64(300), float32(40)
	ended := c.ended(c.rollout("m", client.NewRollout{
		Version: new(2), Strategy: &s, StepPercent: &percent, BakeSeconds: &none, BakeRequests: &requests, WatchSeconds: &none,
	}).Id)
	require.Equal(t, string(registry.Promoted), ended.Outcome, ended.Message)
	c.consistent(2)
	traffic.check(0)
	routes, err := decode[[]registry.Route](c.api(0).ListRoutes(t.Context(), "m"))
	require.NoError(t, err)
	var weights []int
	for _, r := range slices.Backward(routes) {
		if arm, there := r.Arm(2); there {
			weights = append(weights, arm.Weight)
		}
	}
	require.Equal(t, []int{0, 4000, 8000, registry.FullWeight}, weights)
}

// A policy's rules bind every roll-out: who approves, and when traffic may move.
func TestRollout_ObeysThePolicy(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	raw := json.RawMessage(`{"steps": [50, 5]}`)
	_, err := decode[client.Model](c.api(0).ConfigureModel(t.Context(), "m", client.ModelConfiguration{Rollout: &raw}))
	require.ErrorContains(t, err, "ascend")
	until := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	c.policy("m", `{"strategy": "all_at_once", "watch_s": 0, "approvals": 1, "four_eyes": true, "frozen_until": "`+until+`", "freeze_reason": "the fair"}`)
	deployer, approver := c.as("dan", "deployer"), c.as("ann", "approver")
	require.Equal(t, 2, c.indexed(adminKey))
	other, err := decode[client.Key](c.api(0).CreateKey(t.Context(), client.NewKey{Name: "other", Role: "predictor", Models: &[]string{"another"}}))
	require.NoError(t, err)
	require.Zero(t, c.indexed(*other.Secret), "a key knows of its models only")

	run, err := decode[client.Run](deployer.StartRollout(t.Context(), "m", nil, client.NewRollout{Version: new(2)}))
	require.NoError(t, err)
	c.phase(run.Id, "waiting for approval")
	_, err = decode[client.Run](deployer.DecideRun(t.Context(), run.Id, "approve", client.Decision{}))
	require.ErrorContains(t, err, "needs a approver")
	_, err = decode[client.Run](approver.DecideRun(t.Context(), run.Id, "abort", client.Decision{}))
	require.ErrorContains(t, err, "needs a deployer")
	_, err = decode[client.Run](approver.DecideRun(t.Context(), run.Id, "approve", client.Decision{}))
	require.NoError(t, err)
	c.phase(run.Id, "frozen until")
	require.Equal(t, "the fair", strings.TrimPrefix(c.run(run.Id).Phase[strings.LastIndex(c.run(run.Id).Phase, ": "):], ": "))
	c.policy("m", `{"frozen_until": "0001-01-01T00:00:00Z"}`)
	require.Equal(t, string(registry.Promoted), c.ended(run.Id).Outcome, "the end of the freeze is noticed at once")
	c.consistent(2)

	c.policy("m", `{"approvals": 0, "windows": [{"days": ["`+strings.ToLower(time.Now().UTC().AddDate(0, 0, 3).Format("Mon"))+`"], "from": "01:00", "to": "02:00"}]}`)
	run = c.rollout("m", client.NewRollout{Version: new(1)})
	c.phase(run.Id, "the next window opens")
	urgent, supersede := true, client.NewRolloutOnConflict("supersede")
	hotfix := c.rollout("m", client.NewRollout{Version: new(1), Urgent: &urgent, OnConflict: &supersede})
	require.Equal(t, string(registry.Superseded), c.ended(run.Id).Outcome)
	require.Equal(t, string(registry.Promoted), c.ended(hotfix.Id).Outcome)
	c.consistent(1)
}

func (c *cluster) run(id string) client.Run {
	c.t.Helper()
	r, err := decode[client.Run](c.api(0).GetRun(c.t.Context(), id))
	require.NoError(c.t, err)
	return r
}

// Blue/green keeps the old version warm and a little of the traffic: what goes wrong afterwards is seen by comparison,
// and a new roll-out does not wait for the watch (kserve #1968, #2130: the way back leads to the version before).
func TestRollout_BlueGreenIsWatchedAgainstAHoldback(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	bad := c.upload("m", map[string][]byte{"model.onnx": echo(3, 60)})
	require.Equal(t, "SUCCEEDED", bad.State, bad.Message)
	l := c.load(4)
	s, watch, holdback := client.NewRolloutStrategy("blue_green"), int64(600), float32(20)
	green := func(version int) client.Run {
		return c.ended(c.rollout("m", client.NewRollout{Version: &version, Strategy: &s, WatchSeconds: &watch, HoldbackPercent: &holdback}).Id)
	}
	run := green(2)
	require.Equal(t, string(registry.Promoted), run.Outcome, run.Message)
	r := c.route("m")
	require.Equal(t, []registry.Arm{{Version: 2, Role: registry.Stable, Weight: 8000}, {Version: 1, Role: registry.Holdback, Weight: 2000}}, r.Arms)
	bads := green(3)
	require.Equal(t, string(registry.Promoted), bads.Outcome, "nothing is known of it yet")
	require.Equal(t, string(registry.Superseded), c.ended(run.Id+"-watch").Outcome, "a hotfix does not wait for a watch")
	watched := c.ended(bads.Id + "-watch")
	require.Equal(t, string(registry.RolledBack), watched.Outcome, watched.Message)
	require.Contains(t, watched.Message, "errs more often")
	c.consistent(2)
	l.stop()

	_, err := decode[registry.Route](c.api(0).Rollback(t.Context(), "m", client.Decision{}))
	require.NoError(t, err)
	require.NotEqual(t, 2, c.route("m").StableVersion())
}

// A long roll-out continues as new: its run, its lock, its traffic and what people said go on.
func TestRollout_ContinuesAsNew(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1, "ORRERY_CONTINUE_AFTER=60")
	c.model("m", 2)
	c.allAtOnce("m")
	run := c.rollout("m", canary(2, 100_000))
	c.phase(run.Id, "step 1")
	for range 8 {
		require.NoError(t, c.say(run.Id, "pause", client.Decision{}))
		require.NoError(t, c.say(run.Id, "resume", client.Decision{}))
	}
	require.NoError(t, c.say(run.Id, "extend", client.Decision{Seconds: new(int64(60))}))
	require.Eventually(t, func() bool { return c.run(run.Id).Phase == "step 1 of 2: 20 %" }, 20*time.Second, 20*time.Millisecond, "no longer paused")
	require.Equal(t, 2000, c.route("m").Arms[1].Weight)
	_, err := decode[client.Run](c.api(0).StartRollout(t.Context(), "m", nil, canary(2, 1)))
	require.ErrorContains(t, err, run.Id, "it is still the only one")
	require.NoError(t, c.say(run.Id, "promote_now", client.Decision{}))
	require.Equal(t, string(registry.Promoted), c.ended(run.Id).Outcome)
	c.consistent(2)
	require.Contains(t, c.executions(run.WorkflowId), enums.WORKFLOW_EXECUTION_STATUS_CONTINUED_AS_NEW)
}

// executions lists how the executions of a workflow id ended.
func (c *cluster) executions(id string) (out []enums.WorkflowExecutionStatus) {
	c.t.Helper()
	list, err := c.engine().ListWorkflow(c.t.Context(), &workflowservice.ListWorkflowExecutionsRequest{Query: fmt.Sprintf("WorkflowId = %q", id)})
	require.NoError(c.t, err)
	for _, e := range list.GetExecutions() {
		out = append(out, e.GetStatus())
	}
	return out
}

// otherBuild describes a process of a program that is the same but for its digest.
func (c *cluster) otherBuild(args ...string) *testenv.Process {
	c.t.Helper()
	raw, err := os.ReadFile(binary)
	require.NoError(c.t, err)
	path := filepath.Join(c.t.TempDir(), "orrery")
	require.NoError(c.t, os.WriteFile(path, append(raw, 0), 0o700)) //nolint:gosec // it is to be run
	p, err := testenv.NewProcess("other-build", c.env, append([]string{path}, args...)...)
	require.NoError(c.t, err)
	return p
}

// Whatever breaks under a roll-out, it ends, traffic is on one version, alias and route agree, and the run tells the
// truth. (Flagger #1035, #1501: no traffic; Kayenta #521: why; Argo Rollouts #777: the stable version stays up.)
func TestRollout_SurvivesWhateverBreaks(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, 2)
	c.model("m", 2)
	c.allAtOnce("m")
	faults := []struct {
		name    string
		traffic bool
		breaks  func(run client.Run)
		want    registry.Outcome
		says    string
	}{
		{"no traffic", false, func(client.Run) {}, registry.Inconclusive, "0 requests of 400"},
		{"a worker dies", true, func(client.Run) {
			c.workers[0].Kill()
			time.Sleep(2 * time.Second)
			require.NoError(t, c.workers[0].Start())
		}, registry.Promoted, "is the champion"},
		{"the registry is away", true, func(client.Run) {
			c.postgres.Kill()
			time.Sleep(3 * time.Second)
			require.NoError(t, c.postgres.Start())
		}, registry.Promoted, "is the champion"},
		{"Temporal restarts", true, func(client.Run) {
			c.temporal.Kill()
			time.Sleep(2 * time.Second)
			require.NoError(t, c.temporal.Start())
		}, registry.Promoted, "is the champion"},
		{"a server restarts in the middle of a window", true, func(client.Run) {
			c.servers[1].Kill()
			require.NoError(t, c.servers[1].Start())
		}, registry.Promoted, "is the champion"},
		{"a gateway is cut off past its lease, and comes back with what it counted", true, func(client.Run) {
			require.NoError(t, c.servers[1].Freeze(true))
			time.Sleep(7 * time.Second)
			require.NoError(t, c.servers[1].Freeze(false))
		}, registry.Promoted, "is the champion"},
		{"no workers, until somebody aborts", false, func(run client.Run) {
			for _, w := range c.workers {
				w.Kill()
			}
			require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
			for _, w := range c.workers {
				require.NoError(t, w.Start())
			}
		}, registry.Aborted, "aborted by"},
	}
	stable := 1
	for _, f := range faults {
		candidate := 3 - stable
		var l *load
		if f.traffic {
			l = c.load(3)
		}
		r := canary(candidate, 400)
		if !f.traffic {
			r.MaxBakeSeconds = new(int64(3))
		}
		if f.want == registry.Aborted {
			r.MaxBakeSeconds = nil
		}
		run := c.rollout("m", r)
		c.phase(run.Id, "step 1")
		f.breaks(run)
		ended := c.ended(run.Id)
		require.Equal(t, string(f.want), ended.Outcome, "%s: %s", f.name, ended.Message)
		require.Contains(t, ended.Message, f.says, f.name)
		if f.want == registry.Promoted {
			stable = candidate
		}
		c.awaitReady(0, 2)
		c.consistent(stable)
		if l != nil {
			l.check(0.02)
		}
	}
}

func TestLaterBuild(t *testing.T) {
	t.Parallel()
	const old, recent = "20261101T120000-aaaa", "20261125T040000-0000"
	require.True(t, laterBuild(recent, old))
	require.False(t, laterBuild(old, recent))
	require.False(t, laterBuild(recent, "20261125T040000-ffff"), "another build of the same commit")
	require.True(t, laterBuild(old, "00000000T000000-ffff"), "one that does not know its commit")
}

// Two builds of the orchestrator: the later one takes over the roll-out under way, and work goes to it only.
func TestOrchestrator_ALaterBuildTakesOver(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	run := c.rollout("m", canary(2, 100_000))
	c.phase(run.Id, "step 1")
	later := c.otherBuild("orchestrator", "--scratch", t.TempDir())
	require.NoError(t, later.Start())
	t.Cleanup(later.Kill)
	require.Eventually(t, func() bool { return strings.Contains(later.Log(), "current version") }, 30*time.Second, 50*time.Millisecond)
	require.NoError(t, c.orchestrator.Interrupt())
	require.NoError(t, c.say(run.Id, "promote_now", client.Decision{}))
	require.Equal(t, string(registry.Promoted), c.ended(run.Id).Outcome)
	c.consistent(2)
	later.Kill()
	require.NoError(t, c.orchestrator.Start(), "and back")
	run = c.rollout("m", canary(1, 100_000))
	c.phase(run.Id, "step 1")
	require.NoError(t, c.say(run.Id, "abort", client.Decision{}))
	require.Equal(t, string(registry.Aborted), c.ended(run.Id).Outcome)
}

// A webhook hears of a roll-out, from the command line on.
func TestWebhook_HearsOfARollOut(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2, 1)
	c.model("m", 2)
	c.allAtOnce("m")
	var mu sync.Mutex
	var texts []string
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		texts = append(texts, string(body))
	}))
	t.Cleanup(receiver.Close)
	orrery := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), binary, append([]string{"--api", c.servers[1].url(), "--key", adminKey}, args...)...)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%v: %s", args, out)
		return string(out)
	}
	made := orrery("webhook", "create", receiver.URL, "--format", "slack", "--types", "run.*", "--models", "m", "--output", "json")
	var hook client.Webhook
	require.NoError(t, json.Unmarshal([]byte(made), &hook))
	require.Contains(t, *hook.Secret, "whsec_")
	require.Contains(t, orrery("webhook", "test", hook.Id), "200")
	orrery("rollout", "start", "m", "2", "--strategy", "all_at_once", "--watch", "0s", "--wait")
	require.Eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(texts) == 3 }, 20*time.Second, 20*time.Millisecond)
	mu.Lock()
	require.Contains(t, texts[1], "m: rollout of version 2 started by admin")
	require.Contains(t, texts[2], "ended PROMOTED: version 2 is the champion")
	mu.Unlock()
	require.Equal(t, 2, strings.Count(orrery("webhook", "deliveries", hook.Id), " 200 "))
	require.NotContains(t, orrery("webhook", "list"), *hook.Secret)
	orrery("webhook", "delete", hook.Id)
}
