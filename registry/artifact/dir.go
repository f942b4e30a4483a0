package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/orrery-ml/orrery/registry"
)

// temporary prefixes the names of files that are being written; List and Get do not see them.
const temporary = ".tmp-"

// Dir keeps objects as files below a directory.
type Dir struct{ root *os.Root }

// OpenDir opens, and makes if need be, the directory. Keys cannot lead out of it, by links neither.
func OpenDir(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return nil, fault("open object directory", err)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fault("open object directory", err)
	}
	return &Dir{root: root}, nil
}

// Close closes the directory.
func (d *Dir) Close() error { return d.root.Close() }

// Put implements registry.Objects by writing a temporary file and renaming it.
func (d *Dir) Put(ctx context.Context, key string, r io.Reader, size int64) error {
	if err := registry.CheckRelativePath(key); err != nil {
		return err
	}
	dir := filepath.Dir(filepath.FromSlash(key))
	if err := d.root.MkdirAll(dir, 0o750); err != nil {
		return fault("put "+key, err)
	}
	if free, ok := d.free(); ok && size > free {
		return registry.Errorf(registry.StorageFull, "put %s: it takes %d bytes, and the object store has %d left", key, size, free)
	}
	tmp := filepath.Join(dir, temporary+rand())
	f, err := d.root.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if err != nil {
		return fault("put "+key, err)
	}
	err = write(ctx, f, r, size)
	if err == nil {
		err = d.root.Rename(tmp, filepath.FromSlash(key))
	}
	if err != nil {
		return fault("put "+key, errors.Join(err, d.root.Remove(tmp)))
	}
	return nil
}

// free returns how many bytes may still be written, so that an upload that cannot fit is refused before it is sent.
func (d *Dir) free() (int64, bool) {
	f, err := d.root.Open(".")
	if err != nil {
		return 0, false
	}
	defer func() { _ = f.Close() }() // opened for reading
	var s syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &s); err != nil {
		return 0, false
	}
	return int64(s.Bavail) * int64(s.Bsize), true //nolint:gosec,unconvert // the types differ between systems; far below 2^63
}

// write copies r to f, syncs and closes it.
func write(ctx context.Context, f *os.File, r io.Reader, size int64) error {
	n, err := io.Copy(f, readerUntil{ctx, r})
	if err == nil && size >= 0 && n != size {
		err = registry.Errorf(registry.Corrupt, "%d bytes arrived of %d", n, size)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// readerUntil reads until ctx ends.
type readerUntil struct {
	ctx context.Context //nolint:containedctx // lives as long as one copy
	r   io.Reader
}

func (r readerUntil) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// Get implements registry.Objects.
func (d *Dir) Get(_ context.Context, key string) (io.ReadCloser, error) {
	if err := registry.CheckRelativePath(key); err != nil {
		return nil, err
	}
	f, err := d.root.Open(filepath.FromSlash(key))
	if err != nil {
		return nil, fault("get "+key, err)
	}
	return f, nil
}

// Stat implements registry.Objects.
func (d *Dir) Stat(_ context.Context, key string) (registry.Object, error) {
	if err := registry.CheckRelativePath(key); err != nil {
		return registry.Object{}, err
	}
	info, err := d.root.Stat(filepath.FromSlash(key))
	if err == nil && info.IsDir() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return registry.Object{}, fault("stat "+key, err)
	}
	return registry.Object{Key: key, Size: info.Size(), Modified: info.ModTime()}, nil
}

// List implements registry.Objects.
func (d *Dir) List(ctx context.Context, prefix string) iter.Seq2[registry.Object, error] {
	return func(yield func(registry.Object, error) bool) {
		start := "."
		if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
			start = prefix[:i]
		}
		err := fs.WalkDir(d.root.FS(), start, func(key string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case ctx.Err() != nil:
				return ctx.Err()
			case e.IsDir() || !strings.HasPrefix(key, prefix) || strings.HasPrefix(e.Name(), temporary):
				return nil
			}
			info, err := e.Info()
			if err != nil {
				return nil //nolint:nilerr // deleted between listing and looking
			}
			if !yield(registry.Object{Key: key, Size: info.Size(), Modified: info.ModTime()}, nil) {
				return fs.SkipAll
			}
			return nil
		})
		if err != nil {
			yield(registry.Object{}, fault("list "+prefix, err))
		}
	}
}

// Delete implements registry.Objects.
func (d *Dir) Delete(_ context.Context, key string) error {
	if err := registry.CheckRelativePath(key); err != nil {
		return err
	}
	if err := d.root.Remove(filepath.FromSlash(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault("delete "+key, err)
	}
	return nil
}

// fault gives a file system error its code. Errors that have one keep it.
func fault(op string, err error) error {
	var coded *registry.Error
	switch {
	case err == nil, errors.As(err, &coded), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return &registry.Error{Code: registry.NotFound, Op: op, Err: errors.New("no such object")}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return &registry.Error{Code: registry.StorageFull, Op: op, Err: errors.New("no space left in the object store")}
	case errors.Is(err, io.ErrUnexpectedEOF):
		return &registry.Error{Code: registry.Corrupt, Op: op, Err: fmt.Errorf("the upload broke off: %w", err)}
	}
	return &registry.Error{Code: registry.Internal, Op: op, Err: err}
}
