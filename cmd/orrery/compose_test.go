package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
)

// secrets are what .env holds.
var secrets = map[string]string{
	"POSTGRES_PASSWORD": "postgres-secret", "MINIO_ACCESS_KEY": "orrery-test", "MINIO_SECRET_KEY": "orrery-test-secret",
	"ORRERY_JOIN_TOKEN": joinToken, "ORRERY_ADMIN_KEY": adminKey, "GRAFANA_PASSWORD": "grafana-secret",
}

func loadCompose(t *testing.T, env map[string]string) (*types.Project, error) {
	t.Helper()
	var pairs []string
	for k, v := range env {
		pairs = append(pairs, k+"="+v)
	}
	options, err := cli.NewProjectOptions([]string{"../../docker-compose.yml"}, cli.WithEnv(pairs))
	require.NoError(t, err)
	return options.LoadProject(t.Context())
}

func TestCompose_HasNoDefaultSecretAndEveryServiceIsHealthChecked(t *testing.T) {
	t.Parallel()
	for missing := range secrets {
		env := map[string]string{}
		for k, v := range secrets {
			if k != missing {
				env[k] = v
			}
		}
		_, err := loadCompose(t, env)
		require.ErrorContains(t, err, missing)
	}
	p, err := loadCompose(t, secrets)
	require.NoError(t, err)
	for name, s := range p.Services {
		oneShot := s.Restart == "on-failure"
		require.True(t, oneShot || s.HealthCheck != nil || name == "temporal-ui", "%s has no health check", name)
	}
}

// The roles of the compose file start as processes with its very commands and environment, and a roll-out goes through
// them. Only addresses change: the names of services become addresses on loopback.
func TestCompose_DrivesARolloutThroughTheSameRoles(t *testing.T) {
	t.Parallel()
	p, err := loadCompose(t, secrets)
	require.NoError(t, err)
	c := &cluster{t: t}
	_ = t.TempDir() // registers its removal before the kill, so that it happens after it
	c.postgres, err = testenv.StartPostgres()
	require.NoError(t, err)
	c.temporal, err = testenv.StartTemporal()
	require.NoError(t, err)
	minio := testenv.Minio(t)
	t.Cleanup(c.kill)
	replace := map[string]string{
		"@postgres:5432/orrery": fmt.Sprintf("@127.0.0.1:%d/postgres", c.postgres.Port), "minio:9000": minio.Endpoint, "temporal:7233": c.temporal.Address,
	}
	for _, name := range []string{"server", "worker-1", "worker-2"} {
		n := &node{}
		for port, into := range map[string]*string{"80": &n.http, "81": &n.grpc} {
			free, err := testenv.FreePort()
			require.NoError(t, err)
			*into = fmt.Sprintf("127.0.0.1:%d", free)
			replace[name+" 0.0.0.0:*0"+port] = *into
		}
		if name == "server" {
			replace["server:8081"] = n.grpc
			c.servers = append(c.servers, n)
		} else {
			replace[name+":9081"] = n.grpc
			c.workers = append(c.workers, n)
		}
	}
	c.servers[0].Process = composeProcess(t, p.Services["server"], replace)
	c.orchestrator = &node{Process: composeProcess(t, p.Services["orchestrator"], replace)}
	c.workers[0].Process = composeProcess(t, p.Services["worker-1"], replace)
	c.workers[1].Process = composeProcess(t, p.Services["worker-2"], replace)
	for _, n := range []*node{c.servers[0], c.orchestrator, c.workers[0], c.workers[1]} {
		require.NoError(t, n.Start())
	}
	c.awaitReady(0, 2)
	c.model("m", 2)
	c.allAtOnce("m")
	_, _, _, err = infer(t.Context(), c.servers[0].url(), "m", 1, "k")
	require.ErrorContains(t, err, "API key", "production needs a key for inference")
	s := client.NewRolloutStrategy("all_at_once")
	run := c.ended(c.rollout("m", client.NewRollout{Version: new(2), Strategy: &s}).Id)
	require.Equal(t, string(registry.Promoted), run.Outcome, run.Message)
	c.consistent(2)
}

// composeProcess turns a service into a process.
func composeProcess(t *testing.T, s types.ServiceConfig, replace map[string]string) *testenv.Process {
	t.Helper()
	state := t.TempDir()
	local := func(text string) string {
		for _, port := range []string{"80", "81"} {
			for _, tens := range []string{"8", "9"} {
				if text == "0.0.0.0:"+tens+"0"+port {
					return replace[s.Name+" 0.0.0.0:*0"+port]
				}
			}
		}
		for from, to := range replace {
			text = strings.ReplaceAll(text, from, to)
		}
		return strings.ReplaceAll(text, "/state", state)
	}
	args := []string{binary}
	for _, a := range s.Command {
		args = append(args, local(a))
	}
	env := []string{"ORRERY_ONNXRUNTIME_LIB=" + testenv.OnnxRuntime(t)} // the image carries it
	for k, v := range s.Environment {
		require.NotNil(t, v, k)
		env = append(env, k+"="+local(*v))
	}
	p, err := testenv.NewProcess(s.Name, env, args...)
	require.NoError(t, err)
	return p
}
