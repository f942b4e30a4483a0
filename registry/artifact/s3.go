package artifact

import (
	"context"
	cryptorand "crypto/rand"
	"errors"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/orrery-ml/orrery/registry"
)

// partSize bounds the memory of an upload of unknown size: minio-go holds one part.
const partSize = 16 << 20

func rand() string { return cryptorand.Text() }

// S3Config says where the bucket is.
type S3Config struct {
	Endpoint string // host:port
	Bucket   string
	Prefix   string // prepended to every key, "" or ending in "/"
	Region   string
	Access   string
	Secret   string
	TLS      bool
}

// ParseS3 reads s3://bucket/prefix?endpoint=host:port&tls=false&region=r. It ends in Invalid.
func ParseS3(address, access, secret string) (S3Config, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "s3" || u.Host == "" {
		return S3Config{}, registry.Errorf(registry.Invalid, "object store address %q: want s3://bucket/prefix?endpoint=host:port", address)
	}
	c := S3Config{
		Endpoint: u.Query().Get("endpoint"), Bucket: u.Host, Prefix: strings.TrimPrefix(u.Path, "/"),
		Region: u.Query().Get("region"), Access: access, Secret: secret, TLS: u.Query().Get("tls") != "false",
	}
	if c.Endpoint == "" {
		c.Endpoint = "s3.amazonaws.com"
	}
	if c.Prefix != "" && !strings.HasSuffix(c.Prefix, "/") {
		c.Prefix += "/"
	}
	return c, nil
}

// S3 keeps objects in an S3 bucket.
type S3 struct {
	client *minio.Client
	config S3Config
}

// OpenS3 connects and makes the bucket when it is not there. It ends in Unavailable when the server does not answer
// and Denied when it does not know the keys.
func OpenS3(ctx context.Context, c S3Config) (*S3, error) {
	s, err := newS3(c)
	if err != nil {
		return nil, err
	}
	ok, err := s.client.BucketExists(ctx, c.Bucket)
	if err != nil {
		return nil, s.fault("look for bucket "+c.Bucket, err)
	}
	if !ok {
		if err := s.client.MakeBucket(ctx, c.Bucket, minio.MakeBucketOptions{Region: c.Region}); err != nil {
			if code := minio.ToErrorResponse(err).Code; code != minio.BucketAlreadyOwnedByYou && code != minio.BucketAlreadyExists {
				return nil, s.fault("make bucket "+c.Bucket, err)
			}
		}
	}
	return s, nil
}

func newS3(c S3Config) (*S3, error) {
	options := &minio.Options{Secure: c.TLS, Region: c.Region, MaxRetries: 3}
	options.Creds = credentials.NewIAM("")
	if c.Access != "" {
		options.Creds = credentials.NewStaticV4(c.Access, c.Secret, "")
	}
	client, err := minio.New(c.Endpoint, options)
	if err != nil {
		return nil, registry.Errorf(registry.Invalid, "object store %s: %w", c.Endpoint, err)
	}
	return &S3{client: client, config: c}, nil
}

// Put implements registry.Objects. S3 makes an object visible when its upload completes, so a reader that fails leaves
// nothing; minio-go aborts the multipart upload.
func (s *S3) Put(ctx context.Context, key string, r io.Reader, size int64) error {
	if err := registry.CheckRelativePath(key); err != nil {
		return err
	}
	_, err := s.client.PutObject(ctx, s.config.Bucket, s.config.Prefix+key, onlyReader{r}, size, minio.PutObjectOptions{
		PartSize: partSize, SendContentMd5: false, DisableContentSha256: s.config.TLS,
	})
	return s.fault("put "+key, err)
}

// onlyReader hides Seek and ReadAt, which minio-go would use to read r several times.
type onlyReader struct{ io.Reader }

// Get implements registry.Objects.
func (s *S3) Get(ctx context.Context, key string) (io.ReadCloser, error) {
	if err := registry.CheckRelativePath(key); err != nil {
		return nil, err
	}
	body, _, _, err := (&minio.Core{Client: s.client}).GetObject(ctx, s.config.Bucket, s.config.Prefix+key, minio.GetObjectOptions{})
	if err != nil {
		return nil, s.fault("get "+key, err)
	}
	return body, nil
}

// Stat implements registry.Objects.
func (s *S3) Stat(ctx context.Context, key string) (registry.Object, error) {
	if err := registry.CheckRelativePath(key); err != nil {
		return registry.Object{}, err
	}
	info, err := s.client.StatObject(ctx, s.config.Bucket, s.config.Prefix+key, minio.StatObjectOptions{})
	if err != nil {
		return registry.Object{}, s.fault("stat "+key, err)
	}
	return registry.Object{Key: key, Size: info.Size, Modified: info.LastModified}, nil
}

// List implements registry.Objects.
func (s *S3) List(ctx context.Context, prefix string) iter.Seq2[registry.Object, error] {
	return func(yield func(registry.Object, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		found := s.client.ListObjects(ctx, s.config.Bucket, minio.ListObjectsOptions{Prefix: s.config.Prefix + prefix, Recursive: true})
		for o := range found {
			if o.Err != nil {
				yield(registry.Object{}, s.fault("list "+prefix, o.Err))
				return
			}
			if !yield(registry.Object{Key: strings.TrimPrefix(o.Key, s.config.Prefix), Size: o.Size, Modified: o.LastModified}, nil) {
				return
			}
		}
	}
}

// Delete implements registry.Objects.
func (s *S3) Delete(ctx context.Context, key string) error {
	if err := registry.CheckRelativePath(key); err != nil {
		return err
	}
	return s.fault("delete "+key, s.client.RemoveObject(ctx, s.config.Bucket, s.config.Prefix+key, minio.RemoveObjectOptions{}))
}

func (s *S3) fault(op string, err error) error {
	var coded *registry.Error
	var network net.Error
	if err == nil || errors.As(err, &coded) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	answer := minio.ToErrorResponse(err)
	switch {
	case answer.StatusCode == http.StatusNotFound:
		return &registry.Error{Code: registry.NotFound, Op: op, Err: errors.New("no such object")}
	case answer.StatusCode == http.StatusForbidden, answer.StatusCode == http.StatusUnauthorized:
		return &registry.Error{Code: registry.Denied, Op: op, Err: errors.New("the object store refused the credentials")}
	case answer.StatusCode == http.StatusInsufficientStorage, answer.Code == "XMinioStorageFull":
		return &registry.Error{Code: registry.StorageFull, Op: op, Err: errors.New("no space left in the object store")}
	case answer.StatusCode >= http.StatusInternalServerError, errors.As(err, &network), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return &registry.Error{Code: registry.Unavailable, Op: op, Err: errors.New("the object store at " + s.config.Endpoint + " does not answer")}
	}
	return &registry.Error{Code: registry.Internal, Op: op, Err: err}
}

// Open opens an object store by its address: dir:PATH or s3://….
func Open(ctx context.Context, address, access, secret string) (registry.Objects, error) {
	if path, ok := strings.CutPrefix(address, "dir:"); ok {
		return OpenDir(path)
	}
	c, err := ParseS3(address, access, secret)
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	s, err := OpenS3(limited, c)
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return nil, registry.Errorf(registry.Unavailable, "the object store at %s does not answer", c.Endpoint)
	}
	return s, err
}

// OpenLater is Open without asking the server anything, for a process that must start while the store is away.
func OpenLater(address, access, secret string) (registry.Objects, error) {
	c, err := ParseS3(address, access, secret)
	if err != nil {
		return nil, err
	}
	return newS3(c)
}
