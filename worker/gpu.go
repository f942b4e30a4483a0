//go:build cgo

package worker

import (
	"log/slog"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/orrery-ml/orrery/registry"
)

// deviceReader returns a reader of the machine's devices: the GPUs NVML knows, none where there is no NVML.
func deviceReader(log *slog.Logger) func() []registry.Device {
	if r := nvml.Init(); r != nvml.SUCCESS {
		log.Info("no GPU", "reason", nvml.ErrorString(r))
		return func() []registry.Device { return nil }
	}
	return readGPUs
}

func readGPUs() []registry.Device {
	n, r := nvml.DeviceGetCount()
	if r != nvml.SUCCESS {
		return nil
	}
	var out []registry.Device
	for i := range n {
		d, r := nvml.DeviceGetHandleByIndex(i)
		if r != nvml.SUCCESS {
			continue
		}
		device := registry.Device{Kind: "gpu"}
		if device.Name, r = d.GetName(); r != nvml.SUCCESS {
			continue
		}
		if uuid, r := d.GetUUID(); r == nvml.SUCCESS {
			device.UUID = uuid
		}
		if m, r := d.GetMemoryInfo(); r == nvml.SUCCESS {
			device.MemoryBytes, device.UsedBytes = int64(m.Total), int64(m.Used) //nolint:gosec // far below 2^63
		}
		if u, r := d.GetUtilizationRates(); r == nvml.SUCCESS {
			device.Utilisation = float64(u.Gpu) / 100
		}
		out = append(out, device)
	}
	return out
}
