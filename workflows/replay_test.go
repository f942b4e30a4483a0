package workflows_test

import (
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.temporal.io/api/history/v1"
	"go.temporal.io/api/temporalproto"
	"go.temporal.io/sdk/worker"

	"github.com/orrery-ml/orrery/workflows"
)

// TestReplay replays every recorded history: a change of a workflow that would break runs under way turns it red. How
// to record: cmd/orrery/histories_test.go. Histories are never edited, and replaced only together with a GetVersion.
func TestReplay(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/histories/*/*.json.gz")
	require.NoError(t, err)
	seen := map[string]bool{}
	for _, file := range files {
		seen[filepath.Base(filepath.Dir(file))] = true
		t.Run(filepath.ToSlash(file[len("testdata/histories/"):]), func(t *testing.T) {
			t.Parallel()
			replayer := worker.NewWorkflowReplayer()
			workflows.Register(replayer)
			require.NoError(t, replayer.ReplayWorkflowHistory(nil, read(t, file)))
		})
	}
	for _, name := range []string{
		workflows.RegisterVersionName, workflows.RolloutName, workflows.WatchName, workflows.BatchScoreName,
		workflows.DriftCheckName, workflows.RetrainPolicyName, workflows.RetrainName, workflows.RetentionName,
	} {
		require.True(t, seen[name], "no history of %s is recorded", name)
	}
}

func read(t *testing.T, file string) *history.History {
	t.Helper()
	f, err := os.Open(file)
	require.NoError(t, err)
	defer func() { require.NoError(t, f.Close()) }()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	raw, err := io.ReadAll(z)
	require.NoError(t, err)
	var h history.History
	require.NoError(t, temporalproto.CustomJSONUnmarshalOptions{}.Unmarshal(raw, &h))
	return &h
}
