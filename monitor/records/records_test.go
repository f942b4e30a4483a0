package records_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/monitor/records"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/artifact"
)

func TestTable_ReadsCSVAndParquetAlike(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	plain, packed := filepath.Join(dir, "a.csv"), filepath.Join(dir, "a.parquet")
	require.NoError(t, os.WriteFile(plain, []byte("b,name,a\n1.5,x,1\n,y,2\n-3,z,3\n"), 0o600))
	f, err := os.Create(packed)
	require.NoError(t, err)
	require.NoError(t, records.WriteParquet(f, []records.Column{{Name: "b", Kind: records.Float}, {Name: "name", Kind: records.Text}, {Name: "a", Kind: records.Int}},
		[][]any{{1.5, "x", int64(1)}, {0.0, "y", int64(2)}, {-3.0, "z", int64(3)}}))
	require.NoError(t, f.Close())
	for _, path := range []string{plain, packed} {
		table, err := records.Open(path)
		require.NoError(t, err)
		_, err = table.Find([]string{"a", "nope"})
		require.Equal(t, registry.Invalid, registry.CodeOf(err))
		require.ErrorContains(t, err, "[nope]")
		columns, err := table.Find([]string{"a", "b"})
		require.NoError(t, err)
		require.NoError(t, table.Skip(1))
		rows, err := table.Read(columns, 10)
		require.NoError(t, err)
		require.Len(t, rows, 2)
		require.Equal(t, []float64{3, -3}, rows[1])
		require.NoError(t, table.Close())
	}
	require.NoError(t, os.WriteFile(plain, nil, 0o600))
	_, err = records.Open(plain)
	require.Equal(t, registry.Invalid, registry.CodeOf(err))
}

func TestRecords_RoundTripAndWindow(t *testing.T) {
	t.Parallel()
	o, err := artifact.OpenDir(t.TempDir())
	require.NoError(t, err)
	defer func() { require.NoError(t, o.Close()) }()
	at := time.Date(2026, 6, 1, 23, 59, 59, 0, time.UTC)
	raw, err := records.EncodeRecords([]string{"a", "b"}, []records.Record{
		{ID: "1", At: at, Version: 2, Role: "stable", Features: []float64{1, 2}, Outputs: []float64{0.5}},
		{ID: "2", At: at, Version: 2, Role: "stable", Features: []float64{3, 4}, Outputs: []float64{0.7}},
	})
	require.NoError(t, err)
	key := records.Slice{Prefix: records.RecordPrefix, Model: "m", Version: 2, From: at, To: at}.Key("w", 1, "parquet")
	file := filepath.Join(t.TempDir(), "f")
	require.NoError(t, os.WriteFile(file, raw, 0o600))
	f, err := os.Open(file)
	require.NoError(t, err)
	require.NoError(t, o.Put(t.Context(), key, f, int64(len(raw))))
	require.NoError(t, f.Close())

	in, err := records.Window(t.Context(), o, records.Slice{Prefix: records.RecordPrefix, Model: "m", From: at, To: at.Add(time.Second)})
	require.NoError(t, err)
	require.Equal(t, []string{key}, in)
	before, err := records.Window(t.Context(), o, records.Slice{Prefix: records.RecordPrefix, Model: "m", Version: 2, From: at.Add(-time.Hour), To: at})
	require.NoError(t, err)
	require.Empty(t, before)
	got := map[string][]float64{}
	require.NoError(t, records.ReadRecords(t.Context(), o, key, []string{"b", "a"}, func(id string, x []float64) { got[id] = x }))
	require.Equal(t, map[string][]float64{"1": {2, 1}, "2": {4, 3}}, got)
	require.Error(t, records.ReadRecords(t.Context(), o, key, []string{"c"}, func(string, []float64) {}))
}
