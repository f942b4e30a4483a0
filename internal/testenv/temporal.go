package testenv

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/orrery-ml/orrery/internal/toolpath"
)

// temporalConfig is a Temporal server of one process over PostgreSQL. The ports are those of frontend, matching, history
// and worker, each followed by that of its membership.
const temporalConfig = `log: {stdout: true, level: warn}
persistence:
  defaultStore: default
  visibilityStore: visibility
  numHistoryShards: 64
  datastores:
    default: {sql: &sql {pluginName: postgres12, databaseName: temporal, connectAddr: "127.0.0.1:%[1]d", connectProtocol: tcp, user: orrery, password: "", maxConns: 40, maxIdleConns: 40, maxConnLifetime: 1h}}
    visibility: {sql: {<<: *sql, databaseName: temporal_visibility, maxConns: 10, maxIdleConns: 10}}
global: {membership: {maxJoinDuration: 30s, broadcastAddress: 127.0.0.1}}
services:
  frontend: {rpc: {grpcPort: %[2]d, membershipPort: %[3]d, bindOnLocalHost: true}}
  matching: {rpc: {grpcPort: %[4]d, membershipPort: %[5]d, bindOnLocalHost: true}}
  history: {rpc: {grpcPort: %[6]d, membershipPort: %[7]d, bindOnLocalHost: true}}
  worker: {rpc: {grpcPort: %[8]d, membershipPort: %[9]d, bindOnLocalHost: true}}
clusterMetadata:
  enableGlobalNamespace: false
  failoverVersionIncrement: 10
  masterClusterName: active
  currentClusterName: active
  clusterInformation: {active: {enabled: true, initialFailoverVersion: 1, rpcName: frontend, rpcAddress: "127.0.0.1:%[2]d"}}
dcRedirectionPolicy: {policy: noop}
publicClient: {hostPort: "127.0.0.1:%[2]d"}
`

// StartTemporalOn starts Temporal's own server with its state in databases of a PostgreSQL server, as production has
// it. It needs temporal-server and temporal-sql-tool (deploy/setup.sh cluster).
func StartTemporalOn(ctx context.Context, pg *PostgresServer) (*TemporalServer, error) {
	server, err := toolpath.Find("temporal-server")
	if err != nil {
		return nil, err
	}
	schema, err := toolpath.Find("temporal-sql-tool")
	if err != nil {
		return nil, err
	}
	cli, err := toolpath.Find("temporal")
	if err != nil {
		return nil, err
	}
	for database, name := range map[string]string{"temporal": "postgresql/v12/temporal", "temporal_visibility": "postgresql/v12/visibility"} {
		flags := []string{"--plugin", "postgres12", "--ep", "127.0.0.1", "--port", strconv.Itoa(pg.Port), "--user", "orrery", "--db", database}
		for _, step := range [][]string{{"create"}, {"setup-schema", "-v", "0.0"}, {"update-schema", "--schema-name", name}} {
			out, err := exec.CommandContext(ctx, schema, append(flags, step...)...).CombinedOutput() //nolint:gosec // our own tool
			if err != nil {
				return nil, fmt.Errorf("%s of %s: %w\n%s", step[0], database, err, out)
			}
		}
	}
	dir, err := tempDir("orrery-temporal-*")
	if err != nil {
		return nil, err
	}
	ports := []any{pg.Port}
	for range 8 {
		port, err := FreePort()
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, temporalConfig, ports...), 0o600); err != nil {
		return nil, err
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(ports[1].(int))) //nolint:forcetypeassert // put there above
	s := &TemporalServer{Address: address, Process: &Process{
		name: "temporal", dir: dir, log: filepath.Join(dir, "log"), args: []string{server, "--config-file", file, "--allow-no-auth", "start"},
	}}
	if err := s.Start(); err != nil {
		return nil, err
	}
	atEnd(s.Kill)
	run := func(ctx context.Context, args ...string) error {
		out, err := exec.CommandContext(ctx, cli, append(args, "--address", address)...).CombinedOutput() //nolint:gosec // our own tool
		if err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
		return nil
	}
	return s, waitFor("Temporal", 2*time.Minute, s.Process, func(ctx context.Context) error {
		if run(ctx, "operator", "namespace", "describe", "default") != nil {
			if err := run(ctx, "operator", "namespace", "create", "default"); err != nil {
				return err
			}
		}
		return run(ctx, "workflow", "count") // the namespace is known a while after it was made
	})
}
