package oip

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/bytedance/sonic"
	"google.golang.org/grpc/status"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// HeaderLength is the header of the binary extension: the length of the JSON part of a body.
const HeaderLength = "Inference-Header-Content-Length"

type restParameters map[string]json.RawMessage

type restTensor struct {
	Name       string          `json:"name"`
	Shape      []int64         `json:"shape"`
	Datatype   string          `json:"datatype"`
	Parameters restParameters  `json:"parameters,omitempty"`
	Data       json.RawMessage `json:"data,omitempty"`
}

type restOutput struct {
	Name       string         `json:"name"`
	Parameters restParameters `json:"parameters,omitempty"`
}

type restRequest struct {
	ID         string         `json:"id"`
	Parameters restParameters `json:"parameters"`
	Inputs     []restTensor   `json:"inputs"`
	Outputs    []restOutput   `json:"outputs"`
}

// fastJSON reads requests: most of a body are numbers that are only passed over here, and read where their datatype is
// known. Like encoding/json it refuses what is not JSON, inside values that are passed over too.
var fastJSON = sonic.Config{ValidateString: true, CopyString: true}.Froze()

// errTooLarge says that a body is over the limit, before or after decompression.
var errTooLarge = errors.New("the body is larger than this server takes")

// readBody reads a body of at most limit bytes, decompressed when it says so.
func readBody(r *http.Request, limit int64) ([]byte, error) {
	var body io.Reader = r.Body
	switch encoding := r.Header.Get("Content-Encoding"); encoding {
	case "", "identity":
	case "gzip":
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, fmt.Errorf("gzip body: %w", err)
		}
		body = z
	case "deflate":
		z, err := zlib.NewReader(r.Body)
		if err != nil {
			return nil, fmt.Errorf("deflate body: %w", err)
		}
		body = z
	default:
		return nil, fmt.Errorf("content-encoding %q: want gzip or deflate", encoding)
	}
	if r.ContentLength > limit {
		return nil, errTooLarge
	}
	var into bytes.Buffer
	if r.ContentLength > 0 && body == io.Reader(r.Body) {
		into.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	_, err := into.ReadFrom(io.LimitReader(body, limit+1))
	raw := into.Bytes()
	if err != nil {
		return nil, fmt.Errorf("read body: %w", err)
	}
	if int64(len(raw)) > limit {
		return nil, errTooLarge
	}
	return raw, nil
}

// decodeRequest reads a request in JSON, with binary tensors behind it when the header says where they begin.
func decodeRequest(body []byte, headerLength string) (*inference.ModelInferRequest, error) {
	head, tail := body, []byte(nil)
	if headerLength != "" {
		n, err := strconv.Atoi(headerLength)
		if err != nil || n <= 0 || n > len(body) {
			return nil, fmt.Errorf("inference header size should be in range (0, %d), got %q", len(body), headerLength)
		}
		head, tail = body[:n], body[n:]
	}
	var r restRequest
	if err := fastJSON.Unmarshal(head, &r); err != nil {
		return nil, fmt.Errorf("request body is no JSON of an inference request: %w", err)
	}
	if len(r.Inputs) == 0 {
		return nil, errors.New("the request has no inputs")
	}
	out := &inference.ModelInferRequest{Id: r.ID}
	var err error
	if out.Parameters, err = r.Parameters.proto(); err != nil {
		return nil, err
	}
	for _, in := range r.Inputs {
		if _, shared := in.Parameters["shared_memory_region"]; shared {
			return nil, fmt.Errorf("input %q: %s", in.Name, status.Convert(ErrSharedMemory).Message())
		}
		if tail, err = addInput(out, in, tail); err != nil {
			return nil, fmt.Errorf("input %q: %w", in.Name, err)
		}
	}
	if len(tail) > 0 {
		return nil, fmt.Errorf("%d bytes of binary data belong to no input", len(tail))
	}
	for _, o := range r.Outputs {
		p, err := o.Parameters.proto()
		if err != nil {
			return nil, fmt.Errorf("output %q: %w", o.Name, err)
		}
		out.Outputs = append(out.Outputs, &inference.ModelInferRequest_InferRequestedOutputTensor{Name: o.Name, Parameters: p})
	}
	return out, nil
}

// rawRequest makes a request of a body that is the only input of the model, and nothing else: one row, with the one free
// dimension that is left made to fit. Every answer is binary.
func (h *handler) rawRequest(r *http.Request, body []byte) (*inference.ModelInferRequest, error) {
	m, err := h.service.ModelMetadata(r.Context(), &inference.ModelMetadataRequest{Name: r.PathValue("model"), Version: r.PathValue("version")})
	if err != nil {
		return nil, err
	}
	if len(m.GetInputs()) != 1 {
		return nil, fmt.Errorf("a raw binary request needs a model with one input; this one has %d", len(m.GetInputs()))
	}
	in := m.GetInputs()[0]
	if in.GetDatatype() == "BYTES" {
		body = AppendBytes(nil, body)
	}
	shape, err := rawShape(in, len(body))
	if err != nil {
		return nil, err
	}
	if err := CheckRaw(in.GetName(), in.GetDatatype(), shape, body); err != nil {
		return nil, err
	}
	yes := &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: true}}
	return &inference.ModelInferRequest{
		Inputs:           []*inference.ModelInferRequest_InferInputTensor{{Name: in.GetName(), Datatype: in.GetDatatype(), Shape: shape}},
		RawInputContents: [][]byte{body}, Parameters: map[string]*inference.InferParameter{"binary_data_output": yes},
	}, nil
}

func rawShape(in *inference.ModelMetadataResponse_TensorMetadata, size int) ([]int64, error) {
	shape := append([]int64{}, in.GetShape()...)
	if len(shape) > 0 && shape[0] < 0 {
		shape[0] = 1
	}
	free, fixed := -1, int64(1)
	for i, d := range shape {
		switch {
		case d >= 0:
			fixed *= max(d, 1)
		case free >= 0:
			return nil, fmt.Errorf("a raw binary request needs an input with one free dimension at most, beside the rows; %q is %v", in.GetName(), in.GetShape())
		default:
			free = i
		}
	}
	if free >= 0 {
		width := int64(sizes[in.GetDatatype()])
		if width == 0 {
			return nil, fmt.Errorf("a raw binary request carries one string, and %q is %v", in.GetName(), in.GetShape())
		}
		shape[free] = int64(size) / (width * fixed)
	}
	return shape, nil
}

// addInput appends one input and returns what is left of the binary tail.
func addInput(out *inference.ModelInferRequest, in restTensor, tail []byte) ([]byte, error) {
	params, err := in.Parameters.proto()
	if err != nil {
		return tail, err
	}
	var raw []byte
	if size, ok := params["binary_data_size"]; ok {
		n := size.GetInt64Param()
		if n < 0 || n > int64(len(tail)) {
			return tail, fmt.Errorf("binary_data_size is %d, but %d bytes are left", n, len(tail))
		}
		raw, tail = tail[:n:n], tail[n:]
		delete(params, "binary_data_size")
	} else if raw, err = rawFromJSON(in.Datatype, in.Data); err != nil {
		return tail, err
	}
	if err := CheckRaw(in.Name, in.Datatype, in.Shape, raw); err != nil {
		return tail, err
	}
	out.Inputs = append(out.Inputs, &inference.ModelInferRequest_InferInputTensor{
		Name: in.Name, Datatype: in.Datatype, Shape: in.Shape, Parameters: params,
	})
	out.RawInputContents = append(out.RawInputContents, raw)
	return tail, nil
}

func (p restParameters) proto() (map[string]*inference.InferParameter, error) {
	if len(p) == 0 {
		return nil, nil //nolint:nilnil // no parameters
	}
	out := make(map[string]*inference.InferParameter, len(p))
	for name, raw := range p {
		v, err := parameter(raw)
		if err != nil {
			return nil, fmt.Errorf("parameter %q: %w", name, err)
		}
		out[name] = v
	}
	return out, nil
}

func parameter(raw json.RawMessage) (*inference.InferParameter, error) {
	var b bool
	if json.Unmarshal(raw, &b) == nil {
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_BoolParam{BoolParam: b}}, nil
	}
	var n int64
	if json.Unmarshal(raw, &n) == nil {
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: n}}, nil
	}
	var f float64
	if json.Unmarshal(raw, &f) == nil {
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_DoubleParam{DoubleParam: f}}, nil
	}
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: s}}, nil
	}
	return nil, fmt.Errorf("%s: want a boolean, number or string", raw)
}

func parameterValue(p *inference.InferParameter) any {
	switch v := p.GetParameterChoice().(type) {
	case *inference.InferParameter_BoolParam:
		return v.BoolParam
	case *inference.InferParameter_Int64Param:
		return v.Int64Param
	case *inference.InferParameter_StringParam:
		return v.StringParam
	case *inference.InferParameter_DoubleParam:
		return v.DoubleParam
	case *inference.InferParameter_Uint64Param:
		return v.Uint64Param
	}
	return nil
}

func parameterValues(ps map[string]*inference.InferParameter) map[string]any {
	if len(ps) == 0 {
		return nil
	}
	out := make(map[string]any, len(ps))
	for k, p := range ps {
		out[k] = parameterValue(p)
	}
	return out
}

// encodeResponse writes an answer: the JSON part, and the binary tensors that the request asked for.
func encodeResponse(q *inference.ModelInferRequest, a *inference.ModelInferResponse) (head []byte, tail [][]byte, err error) {
	type output struct {
		Name       string          `json:"name"`
		Datatype   string          `json:"datatype"`
		Shape      []int64         `json:"shape"`
		Parameters map[string]any  `json:"parameters,omitempty"`
		Data       json.RawMessage `json:"data,omitempty"`
	}
	outputs := make([]output, 0, len(a.GetOutputs()))
	for i, o := range a.GetOutputs() {
		if i >= len(a.GetRawOutputContents()) {
			return nil, nil, fmt.Errorf("output %q came without contents", o.GetName())
		}
		raw := a.GetRawOutputContents()[i]
		out := output{Name: o.GetName(), Datatype: o.GetDatatype(), Shape: o.GetShape(), Parameters: parameterValues(o.GetParameters())}
		if wantsBinary(q, o.GetName()) {
			if out.Parameters == nil {
				out.Parameters = map[string]any{}
			}
			out.Parameters["binary_data_size"] = len(raw)
			tail = append(tail, raw)
		} else if out.Data, err = appendJSON(nil, o.GetDatatype(), raw); err != nil {
			return nil, nil, fmt.Errorf("output %q: %w", o.GetName(), err)
		}
		outputs = append(outputs, out)
	}
	head, err = json.Marshal(struct {
		ModelName    string         `json:"model_name"`
		ModelVersion string         `json:"model_version,omitempty"`
		ID           string         `json:"id,omitempty"`
		Parameters   map[string]any `json:"parameters,omitempty"`
		Outputs      []output       `json:"outputs"`
	}{a.GetModelName(), a.GetModelVersion(), a.GetId(), parameterValues(a.GetParameters()), outputs})
	if err == nil && len(tail) > 0 {
		head = append(head, strings.Repeat(" ", (8-len(head)%8)%8)...) // so that the tensors begin aligned
	}
	return head, tail, err
}

func wantsBinary(q *inference.ModelInferRequest, output string) bool {
	for _, o := range q.GetOutputs() {
		if p, ok := o.GetParameters()["binary_data"]; ok && o.GetName() == output {
			return p.GetBoolParam()
		}
	}
	return q.GetParameters()["binary_data_output"].GetBoolParam()
}

// accepts says whether an Accept-Encoding names an encoding without refusing it.
func accepts(header, encoding string) bool {
	for part := range strings.SplitSeq(header, ",") {
		name, quality, _ := strings.Cut(strings.TrimSpace(part), ";")
		if name == encoding {
			q, err := strconv.ParseFloat(strings.TrimPrefix(strings.TrimSpace(quality), "q="), 64)
			return err != nil || q > 0
		}
	}
	return false
}

// writeBody sends head and tail, compressed when the client asked for it.
func writeBody(w http.ResponseWriter, r *http.Request, head []byte, tail [][]byte) error {
	w.Header().Set("Content-Type", "application/json")
	binaryBytes := 0
	for _, t := range tail {
		binaryBytes += len(t)
	}
	if binaryBytes > 0 {
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set(HeaderLength, strconv.Itoa(len(head)))
	}
	var zip io.WriteCloser
	switch accepted := r.Header.Get("Accept-Encoding"); {
	case accepts(accepted, "gzip"):
		w.Header().Set("Content-Encoding", "gzip")
		zip = gzip.NewWriter(w)
	case accepts(accepted, "deflate"):
		w.Header().Set("Content-Encoding", "deflate")
		zip = zlib.NewWriter(w)
	default:
		w.Header().Set("Content-Length", strconv.Itoa(len(head)+binaryBytes))
		_, err := w.Write(head)
		for _, t := range tail {
			if err == nil {
				_, err = w.Write(t)
			}
		}
		return err
	}
	_, err := zip.Write(head)
	for _, t := range tail {
		if err == nil {
			_, err = zip.Write(t)
		}
	}
	return errors.Join(err, zip.Close())
}
