package worker

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/registry"
)

// A version that does not decode is not held, and the rest of the message is followed.
func TestDecodeNews(t *testing.T) {
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
	broken := say("c", 3, true)
	broken.Manifest = []byte("{")
	list, dropped, err := decodeNews(&attach.AttachResponse{
		Held: []*attach.HeldVersion{say("b", 2, false), broken, say("d", 4, true)}, Dropped: []*attach.VersionName{{Model: "a", Version: 1}},
	})
	require.ErrorContains(t, err, "c version 3")
	require.Equal(t, []key{{"a", 1}, {"c", 3}}, dropped)
	require.Len(t, list, 2)
	require.Equal(t, []key{{"b", 2}, {"d", 4}}, []key{list[0].key, list[1].key})
	require.Equal(t, []bool{false, true}, []bool{list[0].leased, list[1].leased})
}
