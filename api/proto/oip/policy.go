package oip

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// integer reads an integer parameter, however it came: tritonclient sends priorities unsigned and timeouts signed.
func integer(ps map[string]*inference.InferParameter, name string) (n int64, ok bool, err error) {
	p, ok := ps[name]
	if !ok {
		return 0, false, nil
	}
	switch v := p.GetParameterChoice().(type) {
	case *inference.InferParameter_Int64Param:
		n = v.Int64Param
	case *inference.InferParameter_Uint64Param:
		if v.Uint64Param > math.MaxInt64 {
			return 0, true, fmt.Errorf("parameter %q is too large: %d", name, v.Uint64Param)
		}
		n = int64(v.Uint64Param)
	default:
		return 0, true, fmt.Errorf("parameter %q: want an integer", name)
	}
	if n < 0 {
		return 0, true, fmt.Errorf("parameter %q is negative: %d", name, n)
	}
	return n, true, nil
}

// PriorityParameter is the request parameter that carries its priority.
const PriorityParameter = "priority"

// Priority returns the request's priority: 1 goes first, 0 is the default.
func Priority(r *inference.ModelInferRequest) (int, error) {
	n, _, err := integer(r.GetParameters(), PriorityParameter)
	return int(min(n, math.MaxInt32)), err
}

// WithDeadline returns a context that ends at the earliest of: ctx's deadline, the request's parameter timeout (in
// microseconds; it may only shorten), and, when there is neither, after otherwise.
func WithDeadline(ctx context.Context, r *inference.ModelInferRequest, otherwise time.Duration) (context.Context, context.CancelFunc, error) {
	micros, given, err := integer(r.GetParameters(), "timeout")
	if err != nil {
		return nil, nil, err
	}
	_, has := ctx.Deadline()
	switch {
	case given && micros > 0:
		ctx, cancel := context.WithTimeout(ctx, time.Duration(min(micros, math.MaxInt64/1000))*time.Microsecond)
		return ctx, cancel, nil
	case has:
		return ctx, func() {}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, otherwise)
	return ctx, cancel, nil
}

// TimingHeader asks for the timing of a request; it comes back as parameters, and over REST as Server-Timing.
const TimingHeader = "x-orrery-timing"

// The parameters that carry the timing of a request, in microseconds but for the batch's rows.
const (
	QueueTime  = "orrery_queue_us"
	InputTime  = "orrery_input_us"
	InferTime  = "orrery_infer_us"
	OutputTime = "orrery_output_us"
	BatchRows  = "orrery_batch_rows"
)

// WantsTiming says whether the caller asked for the timing.
func WantsTiming(ctx context.Context) bool {
	return len(metadata.ValueFromIncomingContext(ctx, TimingHeader)) > 0
}

// serverTiming is the Server-Timing header of an answer, "" when it carries no timing. Its durations are milliseconds.
func serverTiming(a *inference.ModelInferResponse) string {
	var parts []string
	for _, name := range []string{QueueTime, InputTime, InferTime, OutputTime} {
		if p, ok := a.GetParameters()[name]; ok {
			short := strings.TrimSuffix(strings.TrimPrefix(name, "orrery_"), "_us")
			parts = append(parts, short+";dur="+strconv.FormatFloat(float64(p.GetInt64Param())/1000, 'f', 3, 64))
		}
	}
	if p, ok := a.GetParameters()[BatchRows]; ok {
		parts = append(parts, fmt.Sprintf("batch;desc=\"%d rows\"", p.GetInt64Param()))
	}
	return strings.Join(parts, ", ")
}
