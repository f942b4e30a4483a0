// Package toolpath finds the programs and libraries that set-up puts into .tools: it decides where to look and says
// what to install when a thing is nowhere. It starts nothing.
package toolpath

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Find returns the path of a program: beside the running binary, in .tools/bin of the working directory or of a
// directory above it, or on PATH.
func Find(name string) (string, error) {
	tried := searched("bin")
	for _, dir := range tried {
		if p := filepath.Join(dir, name); executable(p) {
			return p, nil
		}
	}
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	return "", fmt.Errorf("%s not found in %s or PATH: run `make setup`", name, strings.Join(tried, ", "))
}

// Postgres returns the directory of PostgreSQL's server programs: .tools/postgres/bin, beside `postgres` on PATH, or
// the newest of Debian's.
func Postgres() (string, error) {
	for _, dir := range searched("postgres/bin") {
		if executable(filepath.Join(dir, "initdb")) {
			return dir, nil
		}
	}
	debian, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", err
	}
	slices.Reverse(debian)
	if p, err := exec.LookPath("initdb"); err == nil {
		debian = append(debian, filepath.Dir(p))
	}
	for _, dir := range debian {
		if executable(filepath.Join(dir, "initdb")) {
			return dir, nil
		}
	}
	return "", errors.New("PostgreSQL's initdb not found in .tools/postgres/bin, /usr/lib/postgresql or PATH: run `make setup`")
}

// OnnxRuntime returns the path of the ONNX Runtime library: explicit when not empty, else beside the binary, in
// .tools/onnxruntime, or in the system's library directories. The error names every place that was tried.
func OnnxRuntime(explicit string) (string, error) {
	if explicit != "" {
		if _, err := os.Stat(explicit); err != nil {
			return "", fmt.Errorf("ONNX Runtime library: ORRERY_ONNXRUNTIME_LIB: %w", err)
		}
		return explicit, nil
	}
	name := "libonnxruntime.so"
	if runtime.GOOS == "darwin" {
		name = "libonnxruntime.dylib"
	}
	dirs := append(searched("onnxruntime"), "/usr/local/lib", "/usr/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/opt/onnxruntime/lib")
	for _, dir := range dirs {
		found, err := filepath.Glob(filepath.Join(dir, name+"*"))
		if err == nil && len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("ONNX Runtime library %s (1.24 or newer) not found: looked at ORRERY_ONNXRUNTIME_LIB and in %s; run `make setup`, or install it and set ORRERY_ONNXRUNTIME_LIB",
		name, strings.Join(dirs, ", "))
}

// searched lists the directory of the binary and .tools/sub of the working directory and the ones above it.
func searched(sub string) []string {
	var dirs []string
	if exe, err := os.Executable(); err == nil {
		dirs = append(dirs, filepath.Dir(exe))
	}
	wd, err := os.Getwd()
	if err != nil {
		return dirs
	}
	for {
		if _, err := os.Stat(filepath.Join(wd, ".tools")); err == nil {
			dirs = append(dirs, filepath.Join(wd, ".tools", sub))
		}
		if wd == filepath.Dir(wd) {
			return dirs
		}
		wd = filepath.Dir(wd)
	}
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
