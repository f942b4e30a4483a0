// Package activities holds every side effect a workflow needs. Each activity is idempotent: what it writes is keyed by
// {run id}/{step}, so a repeat finds its own work done. Long ones heartbeat and resume. It decides how a thing is done
// and which faults are worth a retry; what is done next is decided in package workflows.
package activities
