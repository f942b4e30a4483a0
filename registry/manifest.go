package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"path"
	"regexp"
	"slices"
	"strings"
)

var sha256Hex = regexp.MustCompile(`^[0-9a-f]{64}$`)

// File is one uploaded file of a version.
type File struct {
	Path   string `json:"path"` // slash-separated, relative, inside the version's directory
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // lower-case hex
}

// Manifest lists the files of a version, sorted by path.
type Manifest struct {
	Files []File `json:"files"`
}

// NewManifest sorts and checks files. It ends in Invalid when the list is empty, a path leaves the directory or is
// there twice, a digest is malformed, or no .onnx file is among them.
func NewManifest(files []File) (Manifest, error) {
	m := Manifest{Files: slices.SortedFunc(slices.Values(files), func(a, b File) int { return strings.Compare(a.Path, b.Path) })}
	if len(files) == 0 {
		return Manifest{}, Errorf(Invalid, "a version needs at least one file")
	}
	for i, f := range m.Files {
		switch {
		case CheckRelativePath(f.Path) != nil:
			return Manifest{}, CheckRelativePath(f.Path)
		case i > 0 && m.Files[i-1].Path == f.Path:
			return Manifest{}, Errorf(Invalid, "file %q is listed twice", f.Path)
		case f.Size < 0:
			return Manifest{}, Errorf(Invalid, "file %q: size %d is negative", f.Path, f.Size)
		case CheckDigest(f.SHA256) != nil:
			return Manifest{}, Errorf(Invalid, "file %q: %w", f.Path, CheckDigest(f.SHA256))
		}
	}
	if _, err := m.Entry(); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// CheckDigest returns an Invalid error unless s is a sha256 in lower-case hex.
func CheckDigest(s string) error {
	if !sha256Hex.MatchString(s) {
		return Errorf(Invalid, "sha256 %q: want 64 lower-case hex digits", s)
	}
	return nil
}

// CheckRelativePath returns an Invalid error unless p is clean, relative, slash-separated and stays inside its directory.
func CheckRelativePath(p string) error {
	if p == "" || len(p) > 512 || path.IsAbs(p) || path.Clean(p) != p || p == "." || p == ".." ||
		strings.HasPrefix(p, "../") || strings.ContainsAny(p, "\\\x00:") {
		return Errorf(Invalid, "path %q: want a clean relative path inside the directory", p)
	}
	return nil
}

// Entry returns the path of the model file: model.onnx, or the only .onnx file at the top. It ends in Invalid when
// there is none or the choice is not clear.
func (m Manifest) Entry() (string, error) {
	var found []string
	for _, f := range m.Files {
		if f.Path == "model.onnx" {
			return f.Path, nil
		}
		if strings.HasSuffix(f.Path, ".onnx") && !strings.Contains(f.Path, "/") {
			found = append(found, f.Path)
		}
	}
	switch len(found) {
	case 0:
		return "", Errorf(Invalid, "no .onnx file at the top of the upload")
	case 1:
		return found[0], nil
	}
	return "", Errorf(Invalid, "several .onnx files (%s): name one of them model.onnx", strings.Join(found, ", "))
}

// Digest returns the sha256 of the manifest's canonical JSON: the identity of the artifact.
func (m Manifest) Digest() string {
	raw, err := json.Marshal(m)
	if err != nil { // strings and integers always marshal
		return ""
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// Size returns the bytes of all files.
func (m Manifest) Size() int64 {
	var n int64
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}
