// Package engine runs models: it checks tensors against a signature, gathers requests into batches, runs them on a
// session and hands every request its own rows. It decides when a batch runs and what is shed; it refuses to know
// protocols, files' whereabouts and routes. Sessions come from engine/onnx.
package engine
