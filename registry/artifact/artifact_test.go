package artifact_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/internal/testenv"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/artifact"
)

func TestMain(m *testing.M) { testenv.Main(m, nil) }

// backends runs the conformance test f on a directory and on a MinIO server.
func backends(t *testing.T, f func(t *testing.T, o registry.Objects)) {
	t.Parallel()
	t.Run("dir", func(t *testing.T) {
		t.Parallel()
		d, err := artifact.OpenDir(t.TempDir())
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, d.Close()) })
		f(t, d)
	})
	t.Run("minio", func(t *testing.T) {
		t.Parallel()
		f(t, bucket(t))
	})
}

func bucket(t *testing.T) registry.Objects {
	t.Helper()
	m := testenv.Minio(t)
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	address := "s3://" + name[:min(len(name), 60)] + "/some/prefix?tls=false&endpoint=" + m.Endpoint
	o, err := artifact.Open(t.Context(), address, m.Access, m.Secret)
	require.NoError(t, err)
	return o
}

func blob(n int) (data []byte, sha string) {
	data = make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = source.Read(data) // never fails
	sum := sha256.Sum256(data)
	return data, hex.EncodeToString(sum[:])
}

func list(t *testing.T, o registry.Objects, prefix string) []string {
	t.Helper()
	var keys []string
	for obj, err := range o.List(t.Context(), prefix) {
		require.NoError(t, err)
		keys = append(keys, obj.Key)
	}
	return keys
}

func TestObjects_PutGetListDelete(t *testing.T) {
	backends(t, func(t *testing.T, o registry.Objects) {
		for _, key := range []string{"a/1", "a/2", "ab", "b/c/d"} {
			require.NoError(t, o.Put(t.Context(), key, strings.NewReader("hello "+key), -1))
		}
		require.NoError(t, o.Put(t.Context(), "a/2", strings.NewReader("again"), 5))
		body, err := o.Get(t.Context(), "a/2")
		require.NoError(t, err)
		got, err := io.ReadAll(body)
		require.NoError(t, errors.Join(err, body.Close()))
		require.Equal(t, "again", string(got))
		require.Equal(t, []string{"a/1", "a/2", "ab"}, list(t, o, "a"))
		require.Equal(t, []string{"a/1", "a/2"}, list(t, o, "a/"))
		require.Empty(t, list(t, o, "nothing/"))
		stat, err := o.Stat(t.Context(), "b/c/d")
		require.NoError(t, err)
		require.EqualValues(t, len("hello b/c/d"), stat.Size)
		require.NoError(t, o.Delete(t.Context(), "a/2"))
		require.NoError(t, o.Delete(t.Context(), "a/2"))
		_, err = o.Get(t.Context(), "a/2")
		require.Equal(t, registry.NotFound, registry.CodeOf(err))
		_, err = o.Stat(t.Context(), "a")
		require.Equal(t, registry.NotFound, registry.CodeOf(err), "a prefix is no object")
	})
}

func TestObjects_RefuseKeysThatLeadOut(t *testing.T) {
	backends(t, func(t *testing.T, o registry.Objects) {
		for _, key := range []string{"", "/etc/passwd", "../x", "a/../../x", "a//b", "a\\b"} {
			require.Equal(t, registry.Invalid, registry.CodeOf(o.Put(t.Context(), key, strings.NewReader("x"), 1)), key)
			_, err := o.Get(t.Context(), key)
			require.Equal(t, registry.Invalid, registry.CodeOf(err), key)
		}
	})
}

// torn fails after its bytes are spent.
type torn struct{ io.Reader }

func (r torn) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func TestBlobs_ATornOrWrongUploadIsNeverVisible(t *testing.T) {
	backends(t, func(t *testing.T, o registry.Objects) {
		for _, size := range []int{0, 1, 5000, 40 << 20} {
			data, sha := blob(size)
			other := append(bytes.Clone(data), 'x')
			if size > 0 {
				other = bytes.Clone(data)
				other[size-1] ^= 1
				require.Error(t, registry.PutBlob(t.Context(), o, sha, int64(size), torn{bytes.NewReader(data[:size-1])}))
				require.Equal(t, registry.Corrupt, registry.CodeOf(registry.PutBlob(t.Context(), o, sha, int64(size), bytes.NewReader(data[:size-1]))))
			}
			require.Equal(t, registry.Corrupt, registry.CodeOf(registry.PutBlob(t.Context(), o, sha, int64(size), bytes.NewReader(other))))
			require.Empty(t, list(t, o, ""))

			require.NoError(t, registry.PutBlob(t.Context(), o, sha, int64(size), bytes.NewReader(data)))
			require.NoError(t, registry.PutBlob(t.Context(), o, sha, int64(size), bytes.NewReader(data)), "once more is no error")
			body, err := registry.OpenBlob(t.Context(), o, sha)
			require.NoError(t, err)
			got, err := io.ReadAll(body)
			require.NoError(t, errors.Join(err, body.Close()))
			require.True(t, bytes.Equal(data, got))
			require.NoError(t, o.Delete(t.Context(), registry.BlobKey(sha)))
		}
	})
}

func TestBlobs_AChangedBlobIsNotHandedOut(t *testing.T) {
	backends(t, func(t *testing.T, o registry.Objects) {
		data, sha := blob(1000)
		data[10] ^= 1
		require.NoError(t, o.Put(t.Context(), registry.BlobKey(sha), bytes.NewReader(data), 1000))
		dir := t.TempDir()
		m := registry.Manifest{Files: []registry.File{{Path: "sub/model.onnx", Size: 1000, SHA256: sha}}}
		err := registry.FetchVersion(t.Context(), o, m, dir)
		require.Equal(t, registry.Corrupt, registry.CodeOf(err))
		left, err := os.ReadDir(filepath.Join(dir, "sub"))
		require.NoError(t, err)
		require.Empty(t, left)
	})
}

// Not parallel: it measures the heap of the whole process.
func TestObjects_StreamBigFilesInFlatMemory(t *testing.T) {
	d, err := artifact.OpenDir(t.TempDir())
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	for name, o := range map[string]registry.Objects{"dir": d, "minio": bucket(t)} {
		const size = 256 << 20
		var before runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		ctx, stop := context.WithCancel(t.Context())
		peak := make(chan uint64, 1)
		go func() { peak <- watchHeap(ctx) }()
		require.NoError(t, o.Put(t.Context(), "big", io.LimitReader(zeros{}, size), size))
		body, err := o.Get(t.Context(), "big")
		require.NoError(t, err)
		n, err := io.Copy(io.Discard, body)
		require.NoError(t, errors.Join(err, body.Close()))
		require.EqualValues(t, size, n)
		stop()
		require.Less(t, <-peak, before.HeapAlloc+96<<20, "%s: an object is streamed, not held", name)
		require.NoError(t, o.Delete(t.Context(), "big"))
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func watchHeap(ctx context.Context) uint64 {
	var top uint64
	for ticker := time.NewTicker(5 * time.Millisecond); ; {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		top = max(top, m.HeapAlloc)
		select {
		case <-ctx.Done():
			return top
		case <-ticker.C:
		}
	}
}

// A full disk is real here: the process may write no file over the limit, so the kernel refuses the write.
func TestDir_AFullDiskLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	d, err := artifact.OpenDir(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	var old syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old))
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 1 << 20, Max: old.Max}))
	err = d.Put(t.Context(), "big", io.LimitReader(zeros{}, 10<<30), 10<<30)
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old))
	require.Equal(t, registry.StorageFull, registry.CodeOf(err))
	require.Empty(t, list(t, d, ""))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestOpenS3_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	_, err := artifact.Open(t.Context(), "ftp://x", "", "")
	require.Equal(t, registry.Invalid, registry.CodeOf(err))
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	_, err = artifact.Open(ctx, "s3://bbb?tls=false&endpoint=127.0.0.1:1", "a", "b")
	require.Equal(t, registry.Unavailable, registry.CodeOf(err))
	m := testenv.Minio(t)
	_, err = artifact.Open(t.Context(), "s3://bbb?tls=false&endpoint="+m.Endpoint, m.Access, "wrong-secret")
	require.Equal(t, registry.Denied, registry.CodeOf(err))
}
