package oip

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/binary"
	"encoding/json"
	"math"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// checkDecoded holds for every request that a decoder lets through: each input has exactly the bytes its shape says.
func checkDecoded(t *testing.T, r *inference.ModelInferRequest) {
	t.Helper()
	raws, err := RawInputs(r)
	if err != nil {
		return
	}
	require.Len(t, raws, len(r.GetInputs()))
	for i, in := range r.GetInputs() {
		n, err := Elements(in.GetShape())
		require.NoError(t, err)
		if size := sizes[in.GetDatatype()]; size > 0 {
			require.Len(t, raws[i], int(n)*size)
			continue
		}
		require.Len(t, SplitBytes(raws[i]), int(n))
	}
}

// FuzzREST feeds bodies, as JSON, with binary tensors behind it, and compressed.
func FuzzREST(f *testing.F) {
	whole := `{"id":"a","parameters":{"priority":1,"x":"y","z":1.5},"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[[1,2.5e3]]},{"name":"s","shape":[2],"datatype":"BYTES","data":["a\n","\u00fc"]}],"outputs":[{"name":"y","parameters":{"binary_data":true}}]}`
	head := `{"inputs":[{"name":"x","shape":[2],"datatype":"FP16","parameters":{"binary_data_size":4}}]}`
	for _, seed := range []struct{ body, length string }{
		{whole, ""},
		{head + "\x01\x02\x03\x04", strconv.Itoa(len(head))},
		{head, strconv.Itoa(len(head))},
		{strings.Replace(whole, "[1,2]", "[-1,2]", 1), ""},
		{strings.Replace(whole, "[1,2]", "[4611686018427387904,4]", 1), ""},
		{strings.Replace(whole, "2.5e3", "1e999", 1), ""},
		{`{"inputs":[{"name":"x","shape":[],"datatype":"INT64","data":9223372036854775807}]}`, ""},
		{`{"inputs":[{"name":"x","shape":[0],"datatype":"BOOL","data":[]}]}`, ""},
		{`{"inputs":[{"name":"x","shape":[1],"datatype":"UINT8","data":[256]}]}`, ""},
		{"{}", "-5"},
		{"{}", "99999999999999999999"},
		{"", ""},
	} {
		f.Add([]byte(seed.body), seed.length)
	}
	f.Fuzz(func(t *testing.T, body []byte, length string) {
		r, err := decodeRequest(body, length)
		if err != nil {
			require.NotEmpty(t, err.Error())
			return
		}
		head := body
		if n, err := strconv.Atoi(length); err == nil {
			head = body[:n]
		}
		require.True(t, json.Valid(head), "what is no JSON is refused: %q", head)
		checkDecoded(t, r)
		_, _ = Priority(r)
		if _, cancel, err := WithDeadline(t.Context(), r, 1); err == nil {
			cancel()
		}
	})
}

// FuzzGRPC feeds messages with raw and typed contents.
func FuzzGRPC(f *testing.F) {
	for _, r := range []*inference.ModelInferRequest{
		{Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "FP32", Shape: []int64{2}}}, RawInputContents: [][]byte{make([]byte, 8)}},
		{Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "INT8", Shape: []int64{1}, Contents: &inference.InferTensorContents{IntContents: []int32{-129}}}}},
		{Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "BYTES", Shape: []int64{-1, math.MaxInt64}, Contents: &inference.InferTensorContents{BytesContents: [][]byte{nil, {0}}}}}},
		{Inputs: []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "BYTES", Shape: []int64{1}}}, RawInputContents: [][]byte{{255, 255, 255, 255}}},
	} {
		raw, err := proto.Marshal(r)
		require.NoError(f, err)
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var r inference.ModelInferRequest
		if proto.Unmarshal(raw, &r) == nil {
			checkDecoded(t, &r)
		}
	})
}

// FuzzBytes holds the walkers of BYTES against each other.
func FuzzBytes(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 'a', 0, 0, 0, 0})
	f.Add([]byte{255, 255, 255, 255})
	f.Add([]byte{1, 2})
	f.Fuzz(func(t *testing.T, raw []byte) {
		n := countBytes(raw)
		if n < 0 {
			return
		}
		var again []byte
		elements := SplitBytes(raw)
		for _, e := range elements {
			again = AppendBytes(again, e)
		}
		require.Len(t, elements, int(n))
		require.True(t, bytes.Equal(raw, again))
	})
}

// FuzzJSONNumbers holds the writer of JSON against its reader: what is written is read back bit for bit.
func FuzzJSONNumbers(f *testing.F) {
	f.Add(math.Float64bits(0.1))
	f.Add(uint64(1 << 63))
	f.Add(uint64(math.MaxUint64))
	f.Fuzz(func(t *testing.T, bits uint64) {
		raw := binary.LittleEndian.AppendUint64(nil, bits)
		for datatype, size := range sizes {
			if size == 0 || datatype == "FP16" || datatype == "BF16" || datatype == "BOOL" {
				continue
			}
			written, err := appendJSON(nil, datatype, raw)
			if err != nil { // NaN and Inf
				require.True(t, strings.HasPrefix(datatype, "FP"))
				continue
			}
			require.True(t, json.Valid(written), "%s", written)
			read, err := rawFromJSON(datatype, written)
			require.NoError(t, err, "%s", written)
			require.Equal(t, raw, read, "%s of %s", written, datatype)
		}
	})
}

// bomb is a service that takes no inference, to see what reaches it.
type bomb struct {
	inference.UnimplementedGRPCInferenceServiceServer

	reached bool
}

func (b *bomb) ModelInfer(context.Context, *inference.ModelInferRequest) (*inference.ModelInferResponse, error) {
	b.reached = true
	return nil, status.Error(codes.Internal, "reached")
}

// Bodies over the limit are cut there, however small they travel.
func TestHandler_CutsBodiesAtTheLimit(t *testing.T) {
	t.Parallel()
	var zipped, deflated bytes.Buffer
	g, z := gzip.NewWriter(&zipped), zlib.NewWriter(&deflated)
	zeros := make([]byte, 1<<20)
	for range 100 {
		_, err := g.Write(zeros)
		require.NoError(t, err)
		_, err = z.Write(zeros)
		require.NoError(t, err)
	}
	require.NoError(t, g.Close())
	require.NoError(t, z.Close())
	for name, c := range map[string]struct {
		body     []byte
		encoding string
		status   int
	}{
		"plain":         {make([]byte, 2<<20), "", http.StatusRequestEntityTooLarge},
		"gzip bomb":     {zipped.Bytes(), "gzip", http.StatusRequestEntityTooLarge},
		"zlib bomb":     {deflated.Bytes(), "deflate", http.StatusRequestEntityTooLarge},
		"no gzip":       {[]byte("hello"), "gzip", http.StatusBadRequest},
		"cut gzip":      {zipped.Bytes()[:zipped.Len()/2], "gzip", http.StatusRequestEntityTooLarge},
		"unknown":       {[]byte("hello"), "br", http.StatusBadRequest},
		"half a tensor": {[]byte(`{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1]}]}`), "", http.StatusBadRequest},
	} {
		service := &bomb{}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v2/models/m/infer", bytes.NewReader(c.body))
		r.Header.Set("Content-Encoding", c.encoding)
		w := httptest.NewRecorder()
		Handler(service, 1<<20).ServeHTTP(w, r)
		require.Equal(t, c.status, w.Code, name)
		require.False(t, service.reached, name)
		var e struct{ Error string }
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &e), name)
		require.NotEmpty(t, e.Error, name)
	}
}
