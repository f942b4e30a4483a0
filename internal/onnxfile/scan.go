package onnxfile

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"

	"google.golang.org/protobuf/encoding/protowire"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// Info is what a model file claims.
type Info struct {
	IRVersion int64
	Opsets    map[string]int64 // by domain; "" is ai.onnx
	Producer  string
	Nodes     int
	External  []string // files that hold tensors, relative to the model file, sorted
	Metadata  map[string]string
}

// ErrNotONNX says that a file is no ONNX model: not protobuf, cut short, or without a graph.
var ErrNotONNX = errors.New("not an ONNX model")

// ScanFile maps a file into memory and scans it.
func ScanFile(path string) (Info, error) {
	f, err := os.Open(path)
	if err != nil {
		return Info{}, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	stat, err := f.Stat()
	if err != nil {
		return Info{}, err
	}
	if stat.Size() == 0 {
		return Info{}, fmt.Errorf("%w: the file is empty", ErrNotONNX)
	}
	raw, err := syscall.Mmap(int(f.Fd()), 0, int(stat.Size()), syscall.PROT_READ, syscall.MAP_PRIVATE)
	if err != nil {
		return Info{}, fmt.Errorf("map %s: %w", path, err)
	}
	defer func() { _ = syscall.Munmap(raw) }() // a mapping of our own
	return Scan(raw)
}

// Scan reads the outline of a model. It ends in ErrNotONNX.
func Scan(raw []byte) (Info, error) {
	info := Info{Opsets: map[string]int64{}, Metadata: map[string]string{}}
	external := map[string]bool{}
	graphs := 0
	err := each(raw, func(field protowire.Number, v []byte, n uint64) error {
		switch field {
		case 1:
			info.IRVersion = int64(n) //nolint:gosec // small
		case 2:
			info.Producer = string(v)
		case 7:
			graphs++
			return scanGraph(v, &info, external, 0)
		case 8:
			domain, version := "", int64(0)
			err := each(v, func(field protowire.Number, v []byte, n uint64) error {
				switch field {
				case 1:
					domain = string(v)
				case 2:
					version = int64(n) //nolint:gosec // small
				default:
				}
				return nil
			})
			info.Opsets[domain] = version
			return err
		case 14:
			key, value, err := entry(v)
			info.Metadata[key] = value
			return err
		default:
		}
		return nil
	})
	if err != nil {
		return Info{}, fmt.Errorf("%w: %w", ErrNotONNX, err)
	}
	if graphs != 1 || info.IRVersion == 0 || len(info.Opsets) == 0 {
		return Info{}, fmt.Errorf("%w: it has %d graphs, IR version %d and %d opsets", ErrNotONNX, graphs, info.IRVersion, len(info.Opsets))
	}
	info.External = sortedKeys(external)
	return info, nil
}

// maxDepth bounds nested graphs (If, Loop), so that a hostile file cannot exhaust the stack.
const maxDepth = 32

func scanGraph(raw []byte, info *Info, external map[string]bool, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("graphs are nested more than %d deep", maxDepth)
	}
	return each(raw, func(field protowire.Number, v []byte, _ uint64) error {
		switch field {
		case 1:
			info.Nodes++
			return each(v, func(field protowire.Number, v []byte, _ uint64) error {
				if field != 5 {
					return nil
				}
				return scanAttribute(v, info, external, depth)
			})
		case 5:
			return scanTensor(v, external)
		default:
		}
		return nil
	})
}

func scanAttribute(raw []byte, info *Info, external map[string]bool, depth int) error {
	return each(raw, func(field protowire.Number, v []byte, _ uint64) error {
		switch field {
		case 5, 10:
			return scanTensor(v, external)
		case 6, 11:
			return scanGraph(v, info, external, depth+1)
		default:
		}
		return nil
	})
}

func scanTensor(raw []byte, external map[string]bool) error {
	return each(raw, func(field protowire.Number, v []byte, _ uint64) error {
		if field != 13 {
			return nil
		}
		key, value, err := entry(v)
		if key == "location" {
			external[value] = true
		}
		return err
	})
}

func entry(raw []byte) (key, value string, err error) {
	err = each(raw, func(field protowire.Number, v []byte, _ uint64) error {
		switch field {
		case 1:
			key = string(v)
		case 2:
			value = string(v)
		default:
		}
		return nil
	})
	return key, value, err
}

// each calls f with every field of a message: v for length-delimited ones, n for varints.
func each(raw []byte, f func(field protowire.Number, v []byte, n uint64) error) error {
	for len(raw) > 0 {
		field, typ, size := protowire.ConsumeTag(raw)
		if size < 0 {
			return protowire.ParseError(size)
		}
		raw = raw[size:]
		var v []byte
		var n uint64
		switch typ {
		case protowire.BytesType:
			v, size = protowire.ConsumeBytes(raw)
		case protowire.VarintType:
			n, size = protowire.ConsumeVarint(raw)
		default:
			size = protowire.ConsumeFieldValue(field, typ, raw)
		}
		if size < 0 {
			return protowire.ParseError(size)
		}
		raw = raw[size:]
		if err := f(field, v, n); err != nil {
			return err
		}
	}
	return nil
}
