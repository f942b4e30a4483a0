// Package store keeps the registry in SQLite or PostgreSQL through GORM with versioned migrations. It decides how a
// change becomes one transaction: every change writes its event in the same transaction, and the event's number comes
// from a counter row that stays locked until commit, so the order of numbers is the order of commits. It refuses to
// decide what a valid change is; that is package registry.
package store
