// Package build says which Orrery this is.
package build

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"sync"
)

// Version returns the module's version, or the commit it was built from, or "dev".
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "dev"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	return "dev"
}

// ID names this build for worker versioning: the commit's time, so that later builds sort after earlier ones, and a
// digest of the program, so that two builds that differ never share a name.
var ID = sync.OnceValue(func() string {
	at := "00000000T000000"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" { // RFC 3339, in UTC
				at = strings.NewReplacer("-", "", ":", "", "Z", "").Replace(s.Value)
			}
		}
	}
	return at + "-" + programDigest()
})

// programDigest returns the first digits of the running program's SHA-256, or its version when it cannot be read.
func programDigest() string {
	path, err := os.Executable()
	if err != nil {
		return Version()
	}
	f, err := os.Open(path)
	if err != nil {
		return Version()
	}
	defer func() { _ = f.Close() }() // opened for reading
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return Version()
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}
