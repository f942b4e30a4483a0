package activities

import (
	"context"

	"go.temporal.io/sdk/activity"

	"github.com/orrery-ml/orrery/registry"
)

// deaths is what heartbeats carry from one attempt of an activity to the next.
type deaths struct {
	Count int  `json:"count"` // attempts that ended without a word: their process died
	Live  bool `json:"live"`  // an attempt is under way
}

// maxDeaths is how often work may take its process with it before it is given up as poison.
const maxDeaths = 3

// survive heartbeats until the returned function is called, and counts the attempts that never called it. It ends in
// Invalid when what was so often fatal that another attempt would only cost another process.
func survive(ctx context.Context, what string) (stop func(), err error) {
	var d deaths
	if activity.HasHeartbeatDetails(ctx) {
		if err := activity.GetHeartbeatDetails(ctx, &d); err != nil {
			return nil, err
		}
	}
	if d.Live {
		d.Count++
	}
	if d.Count >= maxDeaths {
		return nil, registry.Errorf(registry.Invalid, "%s killed its process %d times; it is not tried again", what, d.Count)
	}
	d.Live = true
	activity.RecordHeartbeat(ctx, d)
	quiet := keepAlive(ctx, d)
	return func() {
		quiet()
		d.Live = false
		activity.RecordHeartbeat(ctx, d) // sent when the attempt fails
	}, nil
}
