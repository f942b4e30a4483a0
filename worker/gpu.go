//go:build cgo

package worker

import (
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/orrery-ml/orrery/registry"
)

// gpuEvery is how often NVML is asked; who asks more often gets the last answer.
const gpuEvery = time.Second

// deviceReader returns a reader of the machine's devices: the GPUs NVML knows, none where there is no NVML.
func deviceReader(log *slog.Logger) func() []registry.Device {
	if r := nvml.Init(); r != nvml.SUCCESS {
		log.Info("no GPU", "reason", nvml.ErrorString(r))
		return func() []registry.Device { return nil }
	}
	var mu sync.Mutex
	var last []registry.Device
	var at time.Time
	return func() []registry.Device {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) >= gpuEvery {
			last, at = readGPUs(), time.Now()
		}
		return last
	}
}

// readGPUs lists the GPUs, and in place of one that is cut into MIG instances those instances.
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
		if mode, _, r := d.GetMigMode(); r == nvml.SUCCESS && mode == nvml.DEVICE_MIG_ENABLE {
			out = append(out, readInstances(d)...)
			continue
		}
		if device, ok := readGPU(d, "gpu"); ok {
			out = append(out, device)
		}
	}
	return out
}

func readInstances(parent nvml.Device) []registry.Device {
	n, r := parent.GetMaxMigDeviceCount()
	if r != nvml.SUCCESS {
		return nil
	}
	var out []registry.Device
	for i := range n {
		d, r := parent.GetMigDeviceHandleByIndex(i)
		if r != nvml.SUCCESS { // fewer instances than there could be
			continue
		}
		if device, ok := readGPU(d, "mig"); ok {
			out = append(out, device)
		}
	}
	return out
}

// readGPU reads what the device tells; what it does not tell stays zero.
func readGPU(d nvml.Device, kind string) (registry.Device, bool) {
	device := registry.Device{Kind: kind}
	var r nvml.Return
	if device.Name, r = d.GetName(); r != nvml.SUCCESS {
		return device, false
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
	if w, r := d.GetPowerUsage(); r == nvml.SUCCESS {
		device.PowerWatts = float64(w) / 1000
	}
	if w, r := d.GetEnforcedPowerLimit(); r == nvml.SUCCESS {
		device.PowerLimitWatts = float64(w) / 1000
	}
	if e, r := d.GetTotalEnergyConsumption(); r == nvml.SUCCESS {
		device.EnergyJoules = float64(e) / 1000
	}
	if t, r := d.GetTemperature(nvml.TEMPERATURE_GPU); r == nvml.SUCCESS {
		device.Celsius = float64(t)
	}
	processes, r := d.GetComputeRunningProcesses()
	for _, p := range processes {
		if r == nvml.SUCCESS && int(p.Pid) == os.Getpid() {
			device.OwnBytes = int64(p.UsedGpuMemory) //nolint:gosec // far below 2^63
		}
	}
	return device, true
}
