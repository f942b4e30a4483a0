// Package api is the front door: the control plane's REST API (openapi.yaml is its source), who may do what, the
// problem+json of every fault, and the mounting of the gateway's protocol surface and the console. It decides whether a
// request is allowed and well-formed, inserts runs and starts their workflows; what a run then does is decided in
// package workflows.
package api
