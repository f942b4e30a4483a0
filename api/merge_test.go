package api

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
)

func TestMerge_ReplacesMapsAndKeepsTheRest(t *testing.T) {
	t.Parallel()
	c := registry.DefaultServingConfig()
	lay := func(text string) error {
		raw := json.RawMessage(text)
		return merge("config", &raw, &c)
	}
	require.NoError(t, lay(`{"worker_labels": {"gpu": "h100"}, "max_batch": 7}`))
	require.NoError(t, lay(`{"worker_labels": {"rack": "2"}}`))
	require.Equal(t, map[string]string{"rack": "2"}, c.WorkerLabels)
	require.Equal(t, 7, c.MaxBatch)
	require.NoError(t, lay(`{"max_batch": 8}`))
	require.Equal(t, map[string]string{"rack": "2"}, c.WorkerLabels)
	require.NoError(t, lay(`{"worker_labels": {}}`))
	require.Empty(t, c.WorkerLabels)
	require.ErrorContains(t, lay(`{"labels": {}}`), "unknown field")
	require.ErrorContains(t, lay(`[]`), "config")
}
