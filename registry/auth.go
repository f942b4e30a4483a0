package registry

import (
	"slices"
	"time"
)

// KeyRole is what an API key may do; each role may do all that the ones before it may, but for Approver.
type KeyRole string

// The roles, weakest first; Approver stands beside them and may read and approve.
const (
	Viewer    KeyRole = "viewer"
	Predictor KeyRole = "predictor"
	Developer KeyRole = "developer"
	Deployer  KeyRole = "deployer"
	Admin     KeyRole = "admin"
	Approver  KeyRole = "approver"
)

var roleLadder = []KeyRole{Viewer, Predictor, Developer, Deployer, Admin}

// Valid says whether r is a known role.
func (r KeyRole) Valid() bool { return r == Approver || slices.Contains(roleLadder, r) }

// Allows says whether a key of role r may do what needs the role need.
func (r KeyRole) Allows(need KeyRole) bool {
	if r == need || r == Admin {
		return true
	}
	if r == Approver {
		return need == Viewer
	}
	return slices.Index(roleLadder, r) >= slices.Index(roleLadder, need) && need != Approver
}

// APIKey is an API key without its secret.
type APIKey struct {
	ID        string
	Name      string
	Hash      string // sha256 of the secret, hex; secrets are random and long, so a fast hash is enough
	Role      KeyRole
	Models    []string // models it may touch; empty = all
	CreatedAt time.Time
	CreatedBy string
	RevokedAt time.Time
}

// Covers says whether the key may touch model.
func (k APIKey) Covers(model string) bool {
	return len(k.Models) == 0 || slices.Contains(k.Models, model)
}

// Idempotent is the remembered answer to a request that carried an Idempotency-Key.
type Idempotent struct {
	Actor    string
	Path     string
	Key      string
	BodyHash string
	Status   int // 0 while the first request is still under way
	Location string
	Body     []byte
	Expires  time.Time
}
