// Package onnxfile reads and writes ONNX model files without ONNX Runtime: Scan tells what a file claims to be before
// any native code sees it, Build writes small models (the Go trainer, tests). It refuses to judge whether a graph
// computes anything sensible. Field numbers are those of onnx.proto, https://github.com/onnx/onnx.
package onnxfile
