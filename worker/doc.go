// Package worker is the serving process: it attaches to servers, holds the versions they name, and answers the Open
// Inference Protocol over gRPC and REST. It decides when a version is fetched, loaded, warmed, drained and dropped:
//
//	COLD -> FETCHING -> LOADING -> WARMING -> READY -> DRAINING -> gone
//	  ^________|___________|__________|  (a fault, kept and retried)
//
// It refuses to decide which version answers a request (the gateway does), and to load anything that is not in the
// registry.
package worker
