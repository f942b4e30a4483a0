package oip

import (
	"context"
	"strconv"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/orrery-ml/orrery/api/proto/inference"
)

// NoSharedMemory is a service that refuses shared memory: there are no regions, none can be registered, and to forget
// those that are not there is no error.
type NoSharedMemory struct {
	inference.UnimplementedGRPCInferenceServiceServer
}

// SystemSharedMemoryStatus implements the protocol.
func (NoSharedMemory) SystemSharedMemoryStatus(context.Context, *inference.SystemSharedMemoryStatusRequest) (*inference.SystemSharedMemoryStatusResponse, error) {
	return &inference.SystemSharedMemoryStatusResponse{}, nil
}

// SystemSharedMemoryRegister implements the protocol.
func (NoSharedMemory) SystemSharedMemoryRegister(context.Context, *inference.SystemSharedMemoryRegisterRequest) (*inference.SystemSharedMemoryRegisterResponse, error) {
	return nil, ErrSharedMemory
}

// SystemSharedMemoryUnregister implements the protocol.
func (NoSharedMemory) SystemSharedMemoryUnregister(context.Context, *inference.SystemSharedMemoryUnregisterRequest) (*inference.SystemSharedMemoryUnregisterResponse, error) {
	return &inference.SystemSharedMemoryUnregisterResponse{}, nil
}

// CudaSharedMemoryStatus implements the protocol.
func (NoSharedMemory) CudaSharedMemoryStatus(context.Context, *inference.CudaSharedMemoryStatusRequest) (*inference.CudaSharedMemoryStatusResponse, error) {
	return &inference.CudaSharedMemoryStatusResponse{}, nil
}

// CudaSharedMemoryRegister implements the protocol.
func (NoSharedMemory) CudaSharedMemoryRegister(context.Context, *inference.CudaSharedMemoryRegisterRequest) (*inference.CudaSharedMemoryRegisterResponse, error) {
	return nil, ErrSharedMemory
}

// CudaSharedMemoryUnregister implements the protocol.
func (NoSharedMemory) CudaSharedMemoryUnregister(context.Context, *inference.CudaSharedMemoryUnregisterRequest) (*inference.CudaSharedMemoryUnregisterResponse, error) {
	return &inference.CudaSharedMemoryUnregisterResponse{}, nil
}

// Extensions are the protocol's extensions that Orrery has, by the names Triton reports.
var Extensions = []string{"model_repository", "schedule_policy", "model_configuration", "binary_tensor_data", "parameters", "statistics"}

// Serving is how a version is served, as far as the protocol's model configuration can say it.
type Serving struct {
	Batched         bool // dimension 0 of every tensor is the batch
	MaxBatch        int
	MaxDelayMicros  int64
	Runners         int
	Provider        string
	Cached          bool
	PriorityLevels  int
	DefaultPriority int
	Parameters      map[string]string
}

// Config describes a version, whose metadata is given, in the words of Triton's model configuration: where it is batched
// the batch dimension is left out of the shapes.
func Config(m *inference.ModelMetadataResponse, s Serving) *inference.ModelConfig {
	kind := inference.ModelInstanceGroup_KIND_CPU
	if s.Provider == "cuda" || s.Provider == "tensorrt" {
		kind = inference.ModelInstanceGroup_KIND_GPU
	}
	c := &inference.ModelConfig{
		Name: m.GetName(), Platform: m.GetPlatform(), Backend: "onnxruntime",
		InstanceGroup:          []*inference.ModelInstanceGroup{{Name: m.GetName(), Count: int32(s.Runners), Kind: kind}}, //nolint:gosec // at most 256
		ModelTransactionPolicy: &inference.ModelTransactionPolicy{}, ResponseCache: &inference.ModelResponseCache{Enable: s.Cached},
		Parameters: map[string]*inference.ModelParameter{},
	}
	for k, v := range s.Parameters {
		c.Parameters[k] = &inference.ModelParameter{StringValue: v}
	}
	if s.Batched {
		c.MaxBatchSize = int32(s.MaxBatch) //nolint:gosec // at most 65536
		c.DynamicBatching = &inference.ModelDynamicBatching{
			MaxQueueDelayMicroseconds: uint64(s.MaxDelayMicros),                                                  //nolint:gosec // not negative
			PriorityLevels:            uint64(s.PriorityLevels), DefaultPriorityLevel: uint64(s.DefaultPriority), //nolint:gosec // small
		}
	}
	for _, t := range m.GetInputs() {
		c.Input = append(c.Input, &inference.ModelInput{Name: t.GetName(), DataType: dataType(t.GetDatatype()), Dims: dims(t, s.Batched)})
	}
	for _, t := range m.GetOutputs() {
		c.Output = append(c.Output, &inference.ModelOutput{Name: t.GetName(), DataType: dataType(t.GetDatatype()), Dims: dims(t, s.Batched)})
	}
	return c
}

func dataType(datatype string) inference.DataType {
	if datatype == "BYTES" {
		return inference.DataType_TYPE_STRING
	}
	return inference.DataType(inference.DataType_value["TYPE_"+datatype])
}

func dims(t *inference.ModelMetadataResponse_TensorMetadata, batched bool) []int64 {
	if batched && len(t.GetShape()) > 0 {
		return t.GetShape()[1:]
	}
	return t.GetShape()
}

// AddStatistics adds what another worker says of the same version.
func AddStatistics(into, from *inference.ModelStatistics) {
	into.LastInference = max(into.GetLastInference(), from.GetLastInference())
	into.InferenceCount += from.GetInferenceCount()
	into.ExecutionCount += from.GetExecutionCount()
	addFields(into.GetInferenceStats().ProtoReflect(), from.GetInferenceStats().ProtoReflect())
	into.MemoryUsage = append(into.MemoryUsage, from.GetMemoryUsage()...)
	for _, b := range from.GetBatchStats() {
		known := false
		for _, o := range into.GetBatchStats() {
			if known = o.GetBatchSize() == b.GetBatchSize(); known {
				addFields(o.ProtoReflect(), b.ProtoReflect())
				break
			}
		}
		if !known {
			into.BatchStats = append(into.BatchStats, b)
		}
	}
}

// addFields adds every StatisticDuration of a message to that of another.
func addFields(into, from protoreflect.Message) {
	from.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		d, ok := v.Interface().(protoreflect.Message)
		if !ok {
			return true
		}
		if add, ok := d.Interface().(*inference.StatisticDuration); ok {
			sum := into.Mutable(f).Message().Interface().(*inference.StatisticDuration) //nolint:forcetypeassert // the same field
			sum.Count += add.GetCount()
			sum.Ns += add.GetNs()
		}
		return true
	})
}

// plain turns a message into maps with the protocol's names and every field, numbers as numbers: protobuf's own JSON
// writes 64-bit integers as strings, which the protocol's clients do not take.
func plain(m protoreflect.Message) map[string]any {
	out := map[string]any{}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		v := m.Get(f)
		switch {
		case f.IsMap():
			entries := map[string]any{}
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				entries[k.String()] = plainValue(f.MapValue(), v)
				return true
			})
			out[string(f.Name())] = entries
		case f.IsList():
			list := make([]any, v.List().Len())
			for n := range list {
				list[n] = plainValue(f, v.List().Get(n))
			}
			out[string(f.Name())] = list
		case f.Kind() == protoreflect.MessageKind && !m.Has(f):
		default:
			out[string(f.Name())] = plainValue(f, v)
		}
	}
	return out
}

func plainValue(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return plain(v.Message())
	case protoreflect.EnumKind:
		if e := f.Enum().Values().ByNumber(v.Enum()); e != nil {
			return string(e.Name())
		}
		return strconv.Itoa(int(v.Enum()))
	default:
		return v.Interface()
	}
}
