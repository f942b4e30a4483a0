//go:build !cgo

package onnx

import (
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/registry"
)

// Start says that this binary has no ONNX Runtime: it was built with CGO_ENABLED=0.
func Start(string) (engine.Runtime, error) {
	return nil, registry.Errorf(registry.Unsupported,
		"this binary was built with CGO_ENABLED=0 and cannot run models: use the full image for the roles worker, data and dev")
}
