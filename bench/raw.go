package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"google.golang.org/grpc"

	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/engine/onnx"
	"github.com/orrery-ml/orrery/registry"
)

// rawResult is what the loop without a server measured, by rows of a run.
type rawResult struct {
	Rows   int     `json:"rows"`
	Rate   float64 `json:"rate"`   // rows a second of a bare session
	Engine float64 `json:"engine"` // rows a second through the engine, callers in the same process
	P50    int64   `json:"p50_us"` // of a run
}

// raw measures sessions in this process: ONNX Runtime alone, which is 100 %, and through the engine.
func raw(ctx context.Context, library, path string, rows int, length time.Duration) (rawResult, error) {
	runtime, err := onnx.Start(library)
	if err != nil {
		return rawResult{}, err
	}
	signature, err := runtime.Inspect(path)
	if err != nil {
		return rawResult{}, err
	}
	session, err := runtime.Open(path, signature, engine.Options{Threads: 1})
	if err != nil {
		return rawResult{}, err
	}
	inputs := engine.Probe(signature, int64(rows))
	out := rawResult{Rows: rows}
	run := func(ctx context.Context) error {
		_, err := session.Run(ctx, inputs)
		return err
	}
	r := closedLoop(ctx, run, 1, length/4, length)
	out.Rate, out.P50 = r.rate()*float64(rows), r.quantile(0.5).Microseconds()
	device := engine.NewDevice(1)
	c := registry.DefaultServingConfig()
	m := engine.NewModel(device, session, c, nil)
	one := engine.Probe(signature, 1)
	r = closedLoop(ctx, func(ctx context.Context) error {
		_, _, err := m.Infer(ctx, engine.Request{Inputs: one})
		return err
	}, 16, length/4, length)
	out.Engine = r.rate()
	err = m.Close(ctx)
	device.Close()
	return out, err
}

// raw runs raw in a process of its own on the server's core.
func (b *benchmark) raw(ctx context.Context, m model, rows int) (rawResult, error) {
	path := filepath.Join(b.dir, m.name+"-raw.onnx")
	if err := os.WriteFile(path, m.file, 0o600); err != nil {
		return rawResult{}, err
	}
	args := pinned(b.self, "-raw", path, "-rows", strconv.Itoa(rows), "-library", b.library, "-length", b.length.String())
	cmd := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // ourselves
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err != nil {
		return rawResult{}, err
	}
	var out rawResult
	return out, json.Unmarshal(text, &out)
}

// echoService answers with the bytes that it was sent.
type echoService struct {
	inference.UnimplementedGRPCInferenceServiceServer
}

// ModelInfer implements the protocol.
func (echoService) ModelInfer(_ context.Context, r *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	return &inference.ModelInferResponse{
		ModelName: r.GetModelName(), RawOutputContents: r.GetRawInputContents(),
		Outputs: []*inference.ModelInferResponse_InferOutputTensor{{Name: "y", Datatype: "FP32", Shape: r.GetInputs()[0].GetShape()}},
	}, nil
}

// echo serves until it is killed.
func echo(ctx context.Context, listen string) error {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", listen)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	inference.RegisterGRPCInferenceServiceServer(s, echoService{})
	return s.Serve(l)
}
