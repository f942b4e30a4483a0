// Package testenv starts the real components that tests run against: PostgreSQL, MinIO and the Temporal dev server.
// Each is started once per test binary, on first use, on a free loopback port, and is gone when the binary ends. It
// refuses to fake any of them: where a program is missing the test fails and says what to run.
package testenv

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the "pgx" driver

	"github.com/orrery-ml/orrery/internal/toolpath"
)

var (
	mu       sync.Mutex
	cleanups []func()
	serial   atomic.Int64
)

// Main runs the tests, stops what they started, and then runs check (for leaks, say).
func Main(m *testing.M, check func() error) {
	code := m.Run()
	StopAll()
	if code == 0 && check != nil {
		if err := check(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// StopAll stops what was started.
func StopAll() {
	mu.Lock()
	defer mu.Unlock()
	for _, cleanup := range slices.Backward(cleanups) {
		cleanup()
	}
	cleanups = nil
}

func atEnd(f func()) {
	mu.Lock()
	defer mu.Unlock()
	cleanups = append(cleanups, f)
}

// Process is a component that was started; tests of crashes stop and start it.
type Process struct {
	name string
	args []string
	env  []string
	dir  string
	cred *syscall.Credential
	cmd  *exec.Cmd
	log  string
}

// NewProcess describes a process whose log lies in a directory of its own; it is killed when the test binary ends.
func NewProcess(name string, env []string, args ...string) (*Process, error) {
	dir, err := tempDir("orrery-" + name + "-*")
	if err != nil {
		return nil, err
	}
	p := &Process{name: name, dir: dir, env: env, args: args, log: filepath.Join(dir, "log")}
	atEnd(p.Kill)
	return p, nil
}

// PID returns the process's id, 0 when it does not run.
func (p *Process) PID() int {
	if p.cmd == nil || p.cmd.Process == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Exited says whether the process ended although nobody stopped it. It reads /proc, so it is false where there is none.
func (p *Process) Exited() bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	return err == nil && strings.Contains(string(raw), ") Z ")
}

// Log returns the end of what the process wrote.
func (p *Process) Log() string { return p.tail() }

// Start starts the process; its output goes to a file in its directory.
func (p *Process) Start() error {
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()             // the child has its own
	p.cmd = exec.Command(p.args[0], p.args[1:]...) //nolint:gosec,noctx // paths of our own tools; ended by Kill
	p.cmd.Env, p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = append(os.Environ(), p.env...), p.dir, out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.cred, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return p.cmd.Start()
}

// Kill ends the process and its children with SIGKILL and waits.
func (p *Process) Kill() {
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // gone already is as good
	_ = p.cmd.Wait()                                      // killed: the state says so
	p.cmd = nil
}

// Freeze stops the process as SIGSTOP does, and lets it go on; it says nothing while frozen.
func (p *Process) Freeze(frozen bool) error {
	signal := syscall.SIGCONT
	if frozen {
		signal = syscall.SIGSTOP
	}
	return syscall.Kill(-p.cmd.Process.Pid, signal)
}

// Interrupt asks the process to stop and waits until it has.
func (p *Process) Interrupt() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := p.cmd.Wait()
	p.cmd = nil
	return err
}

func (p *Process) tail() string {
	raw, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(raw[max(0, len(raw)-4000):])
}

// FreePort returns a loopback port that was free a moment ago. It lies below the range that systems take ports of
// outgoing connections from (32768 on Linux, 49152 elsewhere), so that none of those gets it in between.
func FreePort() (int, error) {
	const lowest, highest = 20_000, 32_000
	for range 100 {
		port := lowest + rand.IntN(highest-lowest)                                     //nolint:gosec // no secret
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))) //nolint:noctx // closed at once
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port found")
}

func tempDir(pattern string) (string, error) {
	dir, err := os.MkdirTemp("", pattern)
	if err == nil {
		atEnd(func() { _ = os.RemoveAll(dir) })
	}
	return dir, err
}

func waitFor(what string, limit time.Duration, p *Process, ok func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := ok(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s did not come up in %s: %w\n%s", what, limit, err, p.tail())
		case <-ticker.C:
		}
	}
}

// PostgresServer is a PostgreSQL server of one's own.
type PostgresServer struct {
	*Process

	Port int
}

// StartPostgres starts a PostgreSQL server with trust authentication on loopback. As root it drops privileges for it,
// because PostgreSQL refuses to run as root.
func StartPostgres() (*PostgresServer, error) {
	bin, err := toolpath.Postgres()
	if err != nil {
		return nil, err
	}
	dir, err := tempDir("orrery-pg-*")
	if err != nil {
		return nil, err
	}
	cred, err := unprivileged(dir)
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "orrery", "-A", "trust", "-E", "UTF8", "--no-locale", "-N") //nolint:gosec,noctx // our own tool
	initdb.SysProcAttr, initdb.Dir = &syscall.SysProcAttr{Credential: cred}, dir
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	p := &Process{
		name: "postgres", dir: dir, cred: cred, log: filepath.Join(dir, "log"),
		args: []string{
			filepath.Join(bin, "postgres"), "-D", data, "-h", "127.0.0.1", "-p", strconv.Itoa(port), "-k", dir,
			"-c", "fsync=off", "-c", "max_connections=400", "-c", "shared_buffers=64MB",
		},
	}
	s := &PostgresServer{Process: p, Port: port}
	if err := p.Start(); err != nil {
		return nil, err
	}
	atEnd(p.Kill)
	return s, waitFor("PostgreSQL", 30*time.Second, p, func(ctx context.Context) error { return s.exec(ctx, "SELECT 1") })
}

// DSN returns the address of a database on the server.
func (s *PostgresServer) DSN(database string) string {
	return fmt.Sprintf("postgres://orrery@127.0.0.1:%d/%s?sslmode=disable", s.Port, database)
}

func (s *PostgresServer) exec(ctx context.Context, statement string) error {
	db, err := sql.Open("pgx", s.DSN("postgres"))
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, statement)
	return errors.Join(err, db.Close())
}

// unprivileged returns the credentials to run PostgreSQL with when this process is root, and hands dir to them.
func unprivileged(dir string) (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil //nolint:nilnil // nil credentials mean: stay who you are
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, err
		}
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, os.Chown(dir, uid, gid) //nolint:gosec // ids of the system
}

var sharedPostgres = sync.OnceValues(StartPostgres)

// Postgres returns the address of a fresh database on the test binary's PostgreSQL server.
func Postgres(t testing.TB) string {
	t.Helper()
	s, err := sharedPostgres()
	if err != nil {
		t.Fatalf("PostgreSQL: %v", err)
	}
	name := fmt.Sprintf("t%d", serial.Add(1))
	if err := s.exec(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatalf("create database: %v", err)
	}
	return s.DSN(name)
}

// MinioServer is a MinIO server of one's own.
type MinioServer struct {
	*Process

	Endpoint string // host:port, plain HTTP
	Access   string
	Secret   string
}

// StartMinio starts a MinIO server over a temporary directory.
func StartMinio() (*MinioServer, error) {
	bin, err := toolpath.Find("minio")
	if err != nil {
		return nil, err
	}
	dir, err := tempDir("orrery-minio-*")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	s := &MinioServer{Endpoint: fmt.Sprintf("127.0.0.1:%d", port), Access: "orrery-test", Secret: "orrery-test-secret"} //nolint:gosec // of a server that lives as long as the test
	s.Process = &Process{
		name: "minio", dir: dir, log: filepath.Join(dir, "log"),
		args: []string{bin, "server", "--quiet", "--address", s.Endpoint, "--console-address", "127.0.0.1:0", filepath.Join(dir, "data")},
		env: []string{
			"MINIO_ROOT_USER=" + s.Access, "MINIO_ROOT_PASSWORD=" + s.Secret, "MINIO_BROWSER=off", "MINIO_UPDATE=off",
			"MINIO_CI_CD=1", "HOME=" + dir,
		},
	}
	if err := s.Start(); err != nil {
		return nil, err
	}
	atEnd(s.Kill)
	// A server that is up but not initialised answers 503; one that is ready refuses the anonymous listing.
	return s, waitFor("MinIO", 60*time.Second, s.Process, func(ctx context.Context) error { return answers(ctx, "http://"+s.Endpoint+"/", http.StatusForbidden) })
}

var sharedMinio = sync.OnceValues(StartMinio)

// Minio returns the test binary's MinIO server.
func Minio(t testing.TB) *MinioServer {
	t.Helper()
	s, err := sharedMinio()
	if err != nil {
		t.Fatalf("MinIO: %v", err)
	}
	return s
}

// TemporalServer is a Temporal dev server of one's own, its state in a file so that it survives a kill.
type TemporalServer struct {
	*Process

	Address string
}

// Bin returns the path of the Temporal CLI.
func (s *TemporalServer) Bin() string { return s.args[0] }

// StartTemporal starts a Temporal dev server without its UI.
func StartTemporal() (*TemporalServer, error) {
	bin, err := toolpath.Find("temporal")
	if err != nil {
		return nil, err
	}
	dir, err := tempDir("orrery-temporal-*")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	s := &TemporalServer{Address: fmt.Sprintf("127.0.0.1:%d", port)}
	s.Process = &Process{
		name: "temporal", dir: dir, log: filepath.Join(dir, "log"), env: []string{"HOME=" + dir},
		args: []string{
			bin, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", strconv.Itoa(port),
			"--db-filename", filepath.Join(dir, "temporal.db"), "--log-level", "error",
			"--search-attribute", "OrreryModel=Keyword", "--search-attribute", "OrreryVersion=Int",
			"--search-attribute", "OrreryKind=Keyword", "--search-attribute", "OrreryActor=Keyword",
			"--search-attribute", "OrreryRun=Keyword",
		},
	}
	if err := s.Start(); err != nil {
		return nil, err
	}
	atEnd(s.Kill)
	return s, waitFor("Temporal", 60*time.Second, s.Process, func(ctx context.Context) error { return dial(ctx, s.Address) })
}

var sharedTemporal = sync.OnceValues(StartTemporal)

// Temporal returns the address of the test binary's Temporal dev server.
func Temporal(t testing.TB) *TemporalServer {
	t.Helper()
	s, err := sharedTemporal()
	if err != nil {
		t.Fatalf("Temporal: %v", err)
	}
	return s
}

// answers returns nil when a GET of url answers with the wanted status.
func answers(ctx context.Context, url string, want int) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	if answer.StatusCode != want {
		err = fmt.Errorf("%s answers %s", url, answer.Status)
	}
	return errors.Join(err, answer.Body.Close())
}

func dial(ctx context.Context, address string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// OnnxRuntime returns the path of the ONNX Runtime library and fails the test when there is none.
func OnnxRuntime(t testing.TB) string {
	t.Helper()
	path, err := toolpath.OnnxRuntime(strings.TrimSpace(os.Getenv("ORRERY_ONNXRUNTIME_LIB")))
	if err != nil {
		t.Fatal(err)
	}
	return path
}
