package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// overGRPC calls a server with raw tensors.
func overGRPC(address string, m model) (caller, func(), error) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		return nil, nil, err
	}
	client := inference.NewGRPCInferenceServiceClient(conn)
	request := &inference.ModelInferRequest{
		ModelName: m.name, RawInputContents: [][]byte{m.data(1)},
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: m.input, Shape: append([]int64{1}, m.row...)}},
	}
	return func(ctx context.Context) error {
		a, err := client.ModelInfer(ctx, request)
		if err == nil && len(a.GetRawOutputContents()) != 1 {
			err = errors.New("an answer without a tensor")
		}
		return err
	}, func() { _ = conn.Close() }, nil
}

// web is the client of all HTTP calls: it keeps enough connections for every caller.
var web = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1024, DisableCompression: true}, Timeout: 30 * time.Second}

// overHTTP posts a body.
func overHTTP(url string, body []byte, header map[string]string) caller {
	return func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return err
		}
		for k, v := range header {
			r.Header.Set(k, v)
		}
		a, err := web.Do(r)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, a.Body)
		err = errors.Join(err, a.Body.Close())
		if err == nil && a.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s", a.Status)
		}
		return err
	}
}

// overBinary calls the REST surface with the binary extension.
func overBinary(base string, m model) caller {
	data := m.data(1)
	head, _ := json.Marshal(map[string]any{ // plain values always marshal
		"inputs":     []any{map[string]any{"name": "x", "datatype": m.input, "shape": append([]int64{1}, m.row...), "parameters": map[string]int{"binary_data_size": len(data)}}},
		"parameters": map[string]bool{"binary_data_output": true},
	})
	return overHTTP(base+"/v2/models/"+m.name+"/infer", append(head, data...), map[string]string{"Inference-Header-Content-Length": strconv.Itoa(len(head))})
}

// values reads a model's input as numbers.
func values(m model) []any {
	data := m.data(1)
	var out []any
	for i := 0; i < len(data); {
		if m.input == "INT64" {
			out = append(out, int64(binary.LittleEndian.Uint64(data[i:]))) //nolint:gosec // small
			i += 8
			continue
		}
		out = append(out, math.Float32frombits(binary.LittleEndian.Uint32(data[i:])))
		i += 4
	}
	return out
}

// jsonBody is a request of the protocol in JSON.
func jsonBody(m model) []byte {
	body, _ := json.Marshal(map[string]any{ // plain values always marshal
		"inputs": []any{map[string]any{"name": "x", "datatype": m.input, "shape": append([]int64{1}, m.row...), "data": values(m)}},
	})
	return body
}

func overJSON(base string, m model) caller {
	return overHTTP(base+"/v2/models/"+m.name+"/infer", jsonBody(m), map[string]string{"Content-Type": "application/json"})
}
