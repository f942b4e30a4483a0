// Package registry is the domain of Orrery: models, versions, aliases, routes, runs, events, leases and the
// evidence decisions are made on. It decides what a valid change is and which error code a fault has. It uses the
// standard library alone and refuses to know how anything is stored, served or scheduled; registry/store and
// registry/artifact implement the interfaces declared here.
package registry
