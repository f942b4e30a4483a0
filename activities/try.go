package activities

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/orrery-ml/orrery/internal/onnxfile"
	"github.com/orrery-ml/orrery/registry"
)

const (
	tryLimit = 2 * time.Minute // a model that takes longer to load and try is refused
	tryNoise = 600             // bytes of a failed program's output that are kept
)

// newestOpset is the newest ai.onnx opset that ONNX Runtime 1.24, the oldest one supported, knows.
const newestOpset = 24

// Models tries and finishes versions.
type Models struct {
	versions registry.Versions
	objects  registry.Objects
	scratch  string
	try      []string // command that tries a model file in a process of its own
}

// NewModels makes the activities. try is a command that takes the model file and the largest batch as arguments and
// prints a TryReport; scratch is a directory for temporary files.
func NewModels(v registry.Versions, o registry.Objects, scratch string, try []string) *Models {
	return &Models{versions: v, objects: o, scratch: scratch, try: try}
}

// TryReport is what the child process prints: what it derived, or why it refuses.
type TryReport struct {
	Signature registry.Signature      `json:"signature"`
	Latency   []registry.BatchLatency `json:"latency"`
	Refused   string                  `json:"refused,omitempty"`
}

// TryUnavailable is the exit code of a child process that cannot try any model, because ONNX Runtime is missing.
const TryUnavailable = 5

// TryVersionInput names the version to try.
type TryVersionInput struct {
	Model   string `json:"model"`
	Version int    `json:"version"`
}

// TryVersionResult is what was derived.
type TryVersionResult struct {
	Derived registry.Derived `json:"derived"`
}

// TryVersion fetches a version, scans its file without running it, and then loads, runs and measures it in a process
// of its own with limits. It ends in Invalid with the reason when the version is no good.
func (a *Models) TryVersion(ctx context.Context, in TryVersionInput) (TryVersionResult, error) {
	v, err := a.versions.Version(ctx, in.Model, in.Version)
	if err != nil {
		return TryVersionResult{}, Fault(err)
	}
	dir, err := os.MkdirTemp(a.scratch, "try-*")
	if err != nil {
		return TryVersionResult{}, Fault(err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // scratch
	if err := registry.FetchVersion(ctx, a.objects, v.Manifest, dir); err != nil {
		return TryVersionResult{}, Fault(err)
	}
	activity.RecordHeartbeat(ctx, "fetched")
	entry, err := v.Manifest.Entry()
	if err != nil {
		return TryVersionResult{}, Fault(err)
	}
	info, err := scan(filepath.Join(dir, filepath.FromSlash(entry)), entry, v.Manifest)
	if err != nil {
		return TryVersionResult{}, Fault(err)
	}
	report, err := a.runTry(ctx, dir, entry)
	if err != nil {
		return TryVersionResult{}, Fault(err)
	}
	nameFeatures(&report.Signature, info.Metadata["features"])
	return TryVersionResult{Derived: registry.Derived{Signature: report.Signature, Latency: report.Latency, Documents: v.Documents}}, nil
}

// scan looks at the file without native code: is it ONNX, does everything it refers to lie in the manifest?
func scan(path, entry string, m registry.Manifest) (onnxfile.Info, error) {
	info, err := onnxfile.ScanFile(path)
	if err != nil {
		return info, registry.Errorf(registry.Invalid, "%s: %w", entry, err)
	}
	for _, e := range info.External {
		if err := registry.CheckRelativePath(e); err != nil {
			return info, registry.Errorf(registry.Invalid, "%s refers to external data outside its directory: %q", entry, e)
		}
		if !slices.ContainsFunc(m.Files, func(f registry.File) bool { return f.Path == e }) {
			return info, registry.Errorf(registry.Invalid, "%s refers to external data %q, which is not among the files of the version: upload it too", entry, e)
		}
	}
	if opset := info.Opsets[""]; opset > newestOpset {
		return info, registry.Errorf(registry.Invalid, "%s uses opset %d; ONNX Runtime here knows up to %d: export it with an older opset", entry, opset, newestOpset)
	}
	return info, nil
}

// nameFeatures names the features of the only input, when the file's metadata lists as many as its last axis has.
func nameFeatures(s *registry.Signature, list string) {
	names := strings.Split(list, ",")
	if len(s.Inputs) != 1 || list == "" {
		return
	}
	if shape := s.Inputs[0].Shape; len(shape) > 0 && shape[len(shape)-1] == int64(len(names)) {
		s.Inputs[0].Features = names
	}
}

// runTry runs the child process. A crash of it is the model's fault, and costs nothing else.
func (a *Models) runTry(ctx context.Context, dir, entry string) (TryReport, error) {
	limited, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	command := append(slices.Clone(a.try), filepath.Join(dir, filepath.FromSlash(entry)))
	child := exec.CommandContext(limited, command[0], command[1:]...) //nolint:gosec // our own binary
	child.Dir = dir
	child.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + dir, "TMPDIR=" + dir}
	child.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	child.Stdout, child.Stderr = &stdout, &stderr
	stop := keepAlive(ctx)
	err := child.Run()
	stop()
	if ctx.Err() != nil {
		return TryReport{}, ctx.Err()
	}
	if limited.Err() != nil {
		return TryReport{}, registry.Errorf(registry.Invalid, "the model did not load and run within %s", tryLimit)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return TryReport{}, fmt.Errorf("start the model-try process: %w", err)
	}
	if exit != nil && exit.ExitCode() == TryUnavailable {
		return TryReport{}, registry.Errorf(registry.Unavailable, "no model can be tried here: %s", strings.TrimSpace(stderr.String()))
	}
	if err != nil {
		return TryReport{}, registry.Errorf(registry.Invalid, "the model crashed the process that tried it (%s): %s", exit, firstLine(stderr.String()))
	}
	var report TryReport
	if err := json.Unmarshal(stdout.Bytes(), &report); err != nil {
		return TryReport{}, fmt.Errorf("read the model-try report: %w", err)
	}
	if report.Refused != "" {
		return TryReport{}, registry.Errorf(registry.Invalid, "%s", report.Refused)
	}
	return report, nil
}

// firstLine returns the first line of what a program wrote, at most tryNoise bytes.
func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line[:min(len(line), tryNoise)]
}

// keepAlive heartbeats until the returned function is called.
func keepAlive(ctx context.Context, details ...any) func() {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { // ends with the returned function
		defer close(done)
		ticker := time.NewTicker(2 * time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				activity.RecordHeartbeat(ctx, details...)
			}
		}
	}()
	return func() { cancel(); <-done }
}

// FinishVersionInput ends a registration: READY, or FAILED with the reason.
type FinishVersionInput struct {
	Model   string           `json:"model"`
	Version int              `json:"version"`
	Derived registry.Derived `json:"derived"`
	Failed  string           `json:"failed,omitempty"`
}

// FinishVersion writes the outcome of a registration.
func (a *Models) FinishVersion(ctx context.Context, in FinishVersionInput) error {
	_, err := a.versions.FinishVersion(ctx, in.Model, in.Version, in.Derived, in.Failed)
	return Fault(err)
}
