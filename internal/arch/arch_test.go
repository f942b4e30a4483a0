// Package arch_test keeps the arrows between packages pointing one way.
package arch_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/orrery-ml/orrery"

// allowed lists, for each component, the components it may import directly. A package belongs to the longest path that
// matches; "internal" is open to everybody and imports nothing of ours.
var allowed = map[string][]string{
	"registry":          {},
	"monitor":           {},
	"api/proto":         {},
	"internal":          {},
	"registry/store":    {"registry"},
	"registry/artifact": {"registry"},
	"monitor/records":   {"registry", "monitor"},
	"engine":            {"registry"},
	"engine/onnx":       {"engine", "registry"},
	"worker":            {"engine", "api/proto", "registry"},
	"activities":        {"registry", "monitor", "monitor/records", "engine", "api/proto"},
	"workflows":         {"activities", "registry", "monitor"},
	"api/gateway":       {"registry", "monitor", "monitor/records", "api/proto"},
	"api/client":        {"registry"},
	"api/webhook":       {"registry"},
	"api":               {"api/gateway", "api/webhook", "api/proto", "workflows", "registry", "monitor", "web"},
	"web":               {"registry"},
	"cmd/orrery":        {"*"},
	"examples":          {"*"},
	"bench":             {"*"},
	"bench/rollouts":    {"*"}, // a composition root of its own
}

// owners names the one component that may import a library, and why the others may not.
var owners = map[string]struct {
	components []string
	why        string
}{
	"gorm.io/":                        {[]string{"registry/store"}, "a database is reached through the store interfaces"},
	"github.com/minio/minio-go":       {[]string{"registry/artifact"}, "objects are reached through registry.Objects"},
	"github.com/gin-gonic/gin":        {[]string{"api", "web"}, "HTTP ends at the front door"},
	"github.com/yalue/onnxruntime_go": {[]string{"engine/onnx"}, "native inference code stays in one place"},
	"github.com/NVIDIA/go-nvml":       {[]string{"worker"}, "only serving processes look at GPUs"},
	"gonum.org/":                      {[]string{"monitor", "examples"}, "statistics are pure"},
	"github.com/parquet-go":           {[]string{"monitor/records"}, "records have one format and one home"},
	"github.com/spf13/cobra":          {[]string{"cmd/orrery"}, "flags are read in one place"},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func listPackages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps", module+"/...")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var list []pkg
	for d := json.NewDecoder(out); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	require.NoError(t, cmd.Wait())
	require.NotEmpty(t, list)
	return list
}

// componentOf returns the component a package of ours belongs to, "" for none.
func componentOf(path string) string {
	path, ours := strings.CutPrefix(path, module+"/")
	best := ""
	for name := range allowed {
		if ours && (path == name || strings.HasPrefix(path, name+"/")) && len(name) > len(best) {
			best = name
		}
	}
	return best
}

func TestImportsPointOneWay(t *testing.T) {
	for _, p := range listPackages(t) {
		from := componentOf(p.ImportPath)
		if from == "" {
			t.Errorf("%s belongs to no component", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			checkImport(t, p.ImportPath, from, imp)
		}
	}
}

func checkImport(t *testing.T, path, from, imp string) {
	t.Helper()
	if strings.HasPrefix(imp, module+"/") {
		to := componentOf(imp)
		if to != from && to != "internal" && !slices.Contains(allowed[from], to) && !slices.Contains(allowed[from], "*") {
			t.Errorf("%s imports %s: %s may import only %v", path, imp, from, allowed[from])
		}
		return
	}
	for prefix, owner := range owners {
		if strings.HasPrefix(imp, prefix) && !slices.Contains(owner.components, from) {
			t.Errorf("%s imports %s: only %v may, because %s", path, imp, owner.components, owner.why)
		}
	}
}

// Nothing may reach a quarantined library by a detour either.
func TestQuarantineHoldsTransitively(t *testing.T) {
	mayReach := map[string][]string{
		"gorm.io/gorm":                    {"registry/store", "cmd/orrery", "bench/rollouts"},
		"github.com/yalue/onnxruntime_go": {"engine/onnx", "cmd/orrery", "bench"},
	}
	for _, p := range listPackages(t) {
		for lib, may := range mayReach {
			if slices.Contains(p.Deps, lib) && !slices.Contains(may, componentOf(p.ImportPath)) {
				t.Errorf("%s reaches %s; only %v may", p.ImportPath, lib, may)
			}
		}
	}
}
