//go:build !cgo

package worker

import (
	"log/slog"

	"github.com/orrery-ml/orrery/registry"
)

// deviceReader says that a build without cgo knows no GPU.
func deviceReader(log *slog.Logger) func() []registry.Device {
	log.Info("no GPU", "reason", "built with CGO_ENABLED=0")
	return func() []registry.Device { return nil }
}
