package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
)

// BlobPrefix is where content-addressed blobs lie in the object store.
const BlobPrefix = "blobs/sha256/"

// BlobKey returns the key of the blob with the given sha256.
func BlobKey(sha string) string { return BlobPrefix + sha[:2] + "/" + sha }

// PutBlob streams size bytes of r to the store under their sha256. The last bytes are handed on only after the digest
// is known to be right, so a torn or wrong upload is never visible. A blob that is there already is not written again.
// It ends in Invalid, Corrupt, StorageFull or Unavailable.
func PutBlob(ctx context.Context, objects Objects, sha string, size int64, r io.Reader) error {
	if err := CheckDigest(sha); err != nil {
		return err
	}
	verified := &verifyingReader{r: r, left: size, want: sha, hash: sha256.New()}
	have, err := objects.Stat(ctx, BlobKey(sha))
	there := err == nil && have.Size == size
	if there || size == 0 { // a store need not read an empty object to write it, so it is verified here
		if _, err := io.Copy(io.Discard, verified); err != nil || there {
			return err
		}
	}
	return objects.Put(ctx, BlobKey(sha), verified, size)
}

// OpenBlob opens a blob; reading it to the end verifies it and ends in Corrupt when it is not what its name says.
func OpenBlob(ctx context.Context, objects Objects, sha string) (io.ReadCloser, error) {
	if err := CheckDigest(sha); err != nil {
		return nil, err
	}
	o, err := objects.Stat(ctx, BlobKey(sha))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", sha, err)
	}
	body, err := objects.Get(ctx, BlobKey(sha))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", sha, err)
	}
	return &verifiedBody{verifyingReader{r: body, left: o.Size, want: sha, hash: sha256.New()}, body}, nil
}

type verifiedBody struct {
	verifyingReader
	io.Closer
}

// verifyingReader passes left bytes of r on and withholds the last read of them until their digest is known to be right.
type verifyingReader struct {
	r    io.Reader
	left int64
	want string
	hash hash.Hash
	done bool
}

func (v *verifyingReader) Read(p []byte) (int, error) {
	if v.done {
		return 0, io.EOF
	}
	if int64(len(p)) > v.left+1 {
		p = p[:v.left+1]
	}
	n, err := v.r.Read(p)
	v.hash.Write(p[:n])
	v.left -= int64(n)
	switch {
	case v.left < 0:
		return 0, Errorf(Corrupt, "more bytes than the announced size")
	case v.left == 0:
		if got := hex.EncodeToString(v.hash.Sum(nil)); got != v.want {
			return 0, Errorf(Corrupt, "sha256 is %s, not %s", got, v.want)
		}
		if err := v.atEnd(err); err != nil {
			return 0, err
		}
		v.done = true
		return n, nil
	case errors.Is(err, io.EOF):
		return 0, Errorf(Corrupt, "%d bytes short of the announced size", v.left)
	}
	return n, err
}

// atEnd returns nil when r has no more bytes.
func (v *verifyingReader) atEnd(err error) error {
	var one [1]byte
	for err == nil {
		var n int
		if n, err = v.r.Read(one[:]); n > 0 {
			return Errorf(Corrupt, "more bytes than the announced size")
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// FetchVersion writes the files of m below dir, each verified and moved into place only when whole. Files that are
// there with the right size are left alone. It ends in NotFound, Corrupt, StorageFull or Unavailable.
func FetchVersion(ctx context.Context, objects Objects, m Manifest, dir string) error {
	for _, f := range m.Files {
		if err := CheckRelativePath(f.Path); err != nil {
			return err
		}
		if err := FetchBlob(ctx, objects, f.SHA256, filepath.Join(dir, filepath.FromSlash(f.Path))); err != nil {
			return fmt.Errorf("fetch %s: %w", f.Path, err)
		}
	}
	return nil
}

// FetchBlob writes a blob to target, verified, by way of a temporary file beside it.
func FetchBlob(ctx context.Context, objects Objects, sha, target string) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return err
	}
	if FileSHA256(target) == sha {
		return nil
	}
	body, err := OpenBlob(ctx, objects, sha)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // read to the end or failed already
	tmp, err := os.CreateTemp(filepath.Dir(target), ".fetch-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone when renamed
	if _, err := io.Copy(tmp, body); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), target)
}

// FileSHA256 returns the sha256 of a file in hex, or "" when it cannot be read.
func FileSHA256(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }() // opened for reading
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}
