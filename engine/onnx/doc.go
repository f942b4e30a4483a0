// Package onnx runs models on ONNX Runtime. It is the only package that touches native inference code; built without
// cgo it opens nothing and says so. It decides how Orrery's tensors become ONNX Runtime's and back, and refuses to hide
// a provider that is not there or a shape the model did not declare.
package onnx
