// Package oip is the Open Inference Protocol v2 as bytes: tensors between JSON, typed protobuf contents and raw
// little-endian bytes, the REST surface with the binary extension over any implementation of the gRPC service, and the
// mapping of error codes to statuses. It decides what is a well-formed request; what a model makes of it is not its
// business.
package oip
