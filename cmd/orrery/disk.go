package main

import "syscall"

// freeBytes returns the space left where path is, 0 when that cannot be told.
func freeBytes(path string) uint64 {
	var s syscall.Statfs_t
	if err := syscall.Statfs(path, &s); err != nil {
		return 0
	}
	return s.Bavail * uint64(s.Bsize) //nolint:gosec // block sizes are positive
}
