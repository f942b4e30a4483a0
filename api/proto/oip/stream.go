package oip

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// maxStreamed bounds the requests of one stream that are under way; the next is read when one has ended.
const maxStreamed = 64

// InferFunc answers one request.
type InferFunc func(context.Context, *inference.ModelInferRequest) (*inference.ModelInferResponse, error)

// Stream answers the requests of a stream as they are done, so that answers may overtake each other; they carry the
// requests' ids. An error belongs to its request and does not end the stream.
func Stream(stream grpc.BidiStreamingServer[inference.ModelInferRequest, inference.ModelStreamInferResponse], infer InferFunc) error {
	var sending sync.Mutex
	var under sync.WaitGroup
	defer under.Wait()
	slots := make(chan struct{}, maxStreamed)
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		slots <- struct{}{}
		under.Go(func() {
			defer func() { <-slots }()
			answer := streamed(stream.Context(), r, infer)
			sending.Lock()
			defer sending.Unlock()
			_ = stream.Send(answer) // the client left: Recv says so
		})
	}
}

func streamed(ctx context.Context, r *inference.ModelInferRequest, infer InferFunc) *inference.ModelStreamInferResponse {
	a, err := infer(ctx, r)
	if err != nil {
		return &inference.ModelStreamInferResponse{
			ErrorMessage:  status.Convert(err).Message(),
			InferResponse: &inference.ModelInferResponse{ModelName: r.GetModelName(), Id: r.GetId()},
		}
	}
	if r.GetParameters()["triton_enable_empty_final_response"].GetBoolParam() {
		setParameter(a, "triton_final_response", &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}})
	}
	return &inference.ModelStreamInferResponse{InferResponse: a}
}

func setParameter(a *inference.ModelInferResponse, name string, v *inference.InferParameter) {
	if a.Parameters == nil {
		a.Parameters = map[string]*inference.InferParameter{}
	}
	a.Parameters[name] = v
}

// SetInt sets an integer parameter of an answer.
func SetInt(a *inference.ModelInferResponse, name string, v int64) {
	setParameter(a, name, &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: v}})
}
