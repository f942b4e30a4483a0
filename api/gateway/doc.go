// Package gateway is the data plane: it follows the registry's feed, picks an arm and a worker for every request,
// forwards, mirrors, counts what happened in sealed strata and records traffic. It decides which version answers;
// it refuses to decide what the route should be. It keeps answering from memory, and restarts from its last route on
// disk, while the registry is away.
//
//	snapshot --> table (one atomic pointer) <-- events, applied in order, acknowledged in the gateway's lease
//	request  --> arm (weighted rendezvous of the sticky key) --> worker (less loaded of two) --> stratum
package gateway
