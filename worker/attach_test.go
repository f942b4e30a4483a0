package worker

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/registry"
)

// A server says what changed; the worker holds what all it said amounts to.
func TestReassign(t *testing.T) {
	t.Parallel()
	manifest, err := registry.NewManifest([]registry.File{{Path: "model.onnx", Size: 1, SHA256: strings.Repeat("0", 64)}})
	require.NoError(t, err)
	say := func(model string, version int64, leased bool) *attach.HeldVersion {
		document := func(v any) []byte {
			raw, err := json.Marshal(v)
			require.NoError(t, err)
			return raw
		}
		return &attach.HeldVersion{
			Model: model, Version: version, Digest: manifest.Digest(), Manifest: document(manifest),
			Signature: document(registry.Signature{}), Config: document(registry.DefaultServingConfig()), Leased: leased,
		}
	}
	assigned := map[key]held{}
	held := func() []key {
		return slices.SortedFunc(maps.Keys(assigned), func(a, b key) int { return strings.Compare(a.model, b.model) })
	}
	require.NoError(t, reassign(assigned, &attach.AttachResponse{Held: []*attach.HeldVersion{say("a", 1, true), say("b", 2, true)}}))
	require.Equal(t, []key{{"a", 1}, {"b", 2}}, held())

	require.NoError(t, reassign(assigned, &attach.AttachResponse{
		Held: []*attach.HeldVersion{say("b", 2, false), say("c", 3, true)}, Dropped: []*attach.VersionName{{Model: "a", Version: 1}},
	}))
	require.Equal(t, []key{{"b", 2}, {"c", 3}}, held())
	require.False(t, assigned[key{"b", 2}].leased)

	broken := say("c", 3, true)
	broken.Manifest = []byte("{")
	require.ErrorContains(t, reassign(assigned, &attach.AttachResponse{Held: []*attach.HeldVersion{broken, say("d", 4, true)}}), "c version 3")
	require.Equal(t, []key{{"b", 2}, {"d", 4}}, held(), "what does not decode is not held, and the rest is")
}
