// Package artifact is the object store: a directory, or S3 by way of minio-go. It decides how an object becomes visible
// whole or not at all and what code a storage fault has. It refuses to know what the objects mean.
package artifact
