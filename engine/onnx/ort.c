//go:build cgo

#include "ort.h"

#include <dlfcn.h>
#ifdef __linux__
#include <malloc.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The C interface is a table of functions that only grows, so a place in it never changes. The places used here are
// compared with the published header by a test.
enum {
	GetErrorMessage = 2,
	CreateEnv = 3,
	CreateSession = 7,
	Run = 9,
	CreateSessionOptions = 10,
	SetSessionGraphOptimizationLevel = 23,
	SetIntraOpNumThreads = 24,
	SetInterOpNumThreads = 25,
	CreateRunOptions = 39,
	RunOptionsSetTerminate = 46,
	RunOptionsUnsetTerminate = 47,
	CreateTensorAsOrtValue = 48,
	CreateTensorWithDataAsOrtValue = 49,
	GetTensorMutableData = 51,
	GetStringTensorDataLength = 53,
	GetStringTensorContent = 54,
	GetTensorElementType = 60,
	GetDimensionsCount = 61,
	GetDimensions = 62,
	GetTensorShapeElementCount = 64,
	GetTensorTypeAndShape = 65,
	CreateCpuMemoryInfo = 69,
	GetAllocatorWithDefaultOptions = 78,
	ReleaseStatus = 93,
	ReleaseSession = 95,
	ReleaseValue = 96,
	ReleaseRunOptions = 97,
	ReleaseTensorTypeAndShapeInfo = 99,
	ReleaseSessionOptions = 100,
	GetAvailableProviders = 125,
	ReleaseAvailableProviders = 126,
	AddSessionConfigEntry = 130,
	SessionOptionsAppendExecutionProvider_TensorRT_V2 = 170,
	CreateTensorRTProviderOptions = 171,
	UpdateTensorRTProviderOptions = 172,
	ReleaseTensorRTProviderOptions = 174,
	SessionOptionsAppendExecutionProvider_CUDA_V2 = 204,
	CreateCUDAProviderOptions = 205,
	UpdateCUDAProviderOptions = 206,
	ReleaseCUDAProviderOptions = 208,
	SessionOptionsAppendExecutionProvider = 216,
	GetResizedStringTensorElementBuffer = 252,
};

// The version of the interface: a library of ONNX Runtime 1.24 or newer has it.
enum { API_VERSION = 24 };
enum { LOG_ERROR = 3, ENABLE_ALL = 99, ARENA_ALLOCATOR = 1, MEMORY_DEFAULT = 0, STRING = 8 };

typedef void *status;
typedef struct {
	void *const *(*api)(uint32_t version);
	const char *(*version)(void);
} api_base;

static void *const *api;
static void *env, *cpu, *allocator;

#define CALL(name, ...) ((status(*)(__VA_ARGS__))api[name])
#define RELEASE(name, value) ((void (*)(void *))api[name])(value)

static char *message(status s) {
	if (s == NULL) return NULL;
	char *text = strdup(((const char *(*)(status))api[GetErrorMessage])(s));
	RELEASE(ReleaseStatus, s);
	return text;
}

char *orrery_open(const char *library) {
	void *handle = dlopen(library, RTLD_NOW);
	if (handle == NULL) return strdup(dlerror());
	const api_base *(*base)(void) = (const api_base *(*)(void))dlsym(handle, "OrtGetApiBase");
	if (base == NULL) return strdup("the library has no OrtGetApiBase");
	void *const *found = base()->api(API_VERSION);
	if (found == NULL) {
		char text[128];
		snprintf(text, sizeof text, "ONNX Runtime %s is too old: version 1.%d or newer is needed", base()->version(), API_VERSION);
		return strdup(text);
	}
	api = found;
	char *fault = message(CALL(CreateEnv, int, const char *, void **)(LOG_ERROR, "orrery", &env));
	if (fault == NULL) fault = message(CALL(CreateCpuMemoryInfo, int, int, void **)(ARENA_ALLOCATOR, MEMORY_DEFAULT, &cpu));
	if (fault == NULL) fault = message(CALL(GetAllocatorWithDefaultOptions, void **)(&allocator));
	return fault;
}

void orrery_trim(void) {
#ifdef __GLIBC__
	malloc_trim(0);
#endif
}

char *orrery_providers(char **names) {
	char **list;
	int count;
	char *fault = message(CALL(GetAvailableProviders, char ***, int *)(&list, &count));
	if (fault != NULL) return fault;
	size_t size = 1;
	for (int i = 0; i < count; i++) size += strlen(list[i]) + 1;
	*names = calloc(size, 1);
	for (int i = 0; i < count; i++) {
		if (i > 0) strcat(*names, "\n");
		strcat(*names, list[i]);
	}
	return message(CALL(ReleaseAvailableProviders, char **, int)(list, count));
}

char *orrery_options_new(int threads, void **options) {
	char *fault = message(CALL(CreateSessionOptions, void **)(options));
	if (fault != NULL) return fault;
	fault = message(CALL(SetIntraOpNumThreads, void *, int)(*options, threads));
	if (fault == NULL) fault = message(CALL(SetInterOpNumThreads, void *, int)(*options, 1));
	if (fault == NULL) fault = message(CALL(SetSessionGraphOptimizationLevel, void *, int)(*options, ENABLE_ALL));
	// A thread that spins while it waits takes the core from other sessions.
	if (fault == NULL) fault = message(CALL(AddSessionConfigEntry, void *, const char *, const char *)(*options, "session.intra_op.allow_spinning", "0"));
	if (fault != NULL) orrery_options_free(*options);
	return fault;
}

void orrery_options_free(void *options) { RELEASE(ReleaseSessionOptions, options); }

// own adds a provider that has options of its own kind.
static char *own(void *options, orrery_settings s, int create, int update, int append, int release) {
	void *settings;
	char *fault = message(CALL(create, void **)(&settings));
	if (fault != NULL) return fault;
	if (s.count > 0) fault = message(CALL(update, void *, const char *const *, const char *const *, size_t)(settings, s.keys, s.values, s.count));
	if (fault == NULL) fault = message(CALL(append, void *, const void *)(options, settings));
	RELEASE(release, settings);
	return fault;
}

char *orrery_options_provider(void *options, const char *name, orrery_settings s) {
	if (strcmp(name, "cuda") == 0)
		return own(options, s, CreateCUDAProviderOptions, UpdateCUDAProviderOptions, SessionOptionsAppendExecutionProvider_CUDA_V2, ReleaseCUDAProviderOptions);
	if (strcmp(name, "tensorrt") == 0)
		return own(options, s, CreateTensorRTProviderOptions, UpdateTensorRTProviderOptions, SessionOptionsAppendExecutionProvider_TensorRT_V2, ReleaseTensorRTProviderOptions);
	return message(CALL(SessionOptionsAppendExecutionProvider, void *, const char *, const char *const *, const char *const *, size_t)(options, name, s.keys, s.values, s.count));
}

char *orrery_session_new(const char *path, void *options, void **session) {
	return message(CALL(CreateSession, void *, const char *, void *, void **)(env, path, options, session));
}

void orrery_session_free(void *session) { RELEASE(ReleaseSession, session); }

char *orrery_frame_new(int inputs, const char *const *input_names, int outputs, const char *const *output_names, orrery_frame **frame) {
	orrery_frame *f = calloc(1, sizeof *f);
	f->inputs = inputs;
	f->outputs = outputs;
	f->input_names = input_names;
	f->output_names = output_names;
	f->in = calloc(inputs, sizeof *f->in);
	f->out = calloc(outputs, sizeof *f->out);
	f->in_values = calloc(inputs, sizeof *f->in_values);
	f->out_values = calloc(outputs, sizeof *f->out_values);
	char *fault = message(CALL(CreateRunOptions, void **)(&f->options));
	if (fault != NULL) {
		orrery_frame_free(f);
		return fault;
	}
	*frame = f;
	return NULL;
}

static void release(void **values, int count) {
	for (int i = 0; i < count; i++) {
		if (values[i] != NULL) RELEASE(ReleaseValue, values[i]);
		values[i] = NULL;
	}
}

void orrery_frame_clear(orrery_frame *f) { release(f->out_values, f->outputs); }

void orrery_frame_free(orrery_frame *f) {
	release(f->in_values, f->inputs);
	release(f->out_values, f->outputs);
	if (f->options != NULL) RELEASE(ReleaseRunOptions, f->options);
	free(f->in);
	free(f->out);
	free(f->in_values);
	free(f->out_values);
	free(f);
}

// view makes a value of the caller's memory.
static char *view(orrery_tensor *t, void **value) {
	static char nothing[1]; // a tensor without elements still wants a pointer
	void *data = t->data == 0 ? nothing : (void *)t->data;
	return message(CALL(CreateTensorWithDataAsOrtValue, void *, void *, size_t, const int64_t *, size_t, int, void **)(cpu, data, t->bytes, t->dims, t->rank, t->type, value));
}

// strings makes a value of strings on the wire. Elements may hold any byte.
static char *strings(orrery_tensor *t, void **value) {
	char *fault = message(CALL(CreateTensorAsOrtValue, void *, const int64_t *, size_t, int, void **)(allocator, t->dims, t->rank, STRING, value));
	const unsigned char *at = (const unsigned char *)t->data, *end = at + t->bytes;
	for (size_t i = 0; fault == NULL && at < end; i++) {
		if (end - at < 4) return strdup("a string ends in the middle of its length");
		size_t size = (size_t)at[0] | (size_t)at[1] << 8 | (size_t)at[2] << 16 | (size_t)at[3] << 24;
		at += 4;
		if ((size_t)(end - at) < size) return strdup("a string is shorter than its length says");
		char *buffer;
		fault = message(CALL(GetResizedStringTensorElementBuffer, void *, size_t, size_t, char **)(*value, i, size, &buffer));
		if (fault == NULL) memcpy(buffer, at, size);
		at += size;
	}
	return fault;
}

char *orrery_frame_run(orrery_frame *f, void *session) {
	char *fault = NULL;
	for (int i = 0; fault == NULL && i < f->inputs; i++)
		fault = f->in[i].type == STRING ? strings(&f->in[i], &f->in_values[i]) : view(&f->in[i], &f->in_values[i]);
	for (int i = 0; fault == NULL && i < f->outputs; i++)
		if (f->out[i].data != 0) fault = view(&f->out[i], &f->out_values[i]);
	if (fault == NULL)
		fault = message(CALL(Run, void *, const void *, const char *const *, void *const *, size_t, const char *const *, size_t, void **)(
			session, f->options, f->input_names, f->in_values, f->inputs, f->output_names, f->outputs, f->out_values));
	release(f->in_values, f->inputs);
	return fault;
}

char *orrery_frame_terminate(orrery_frame *f) { return message(CALL(RunOptionsSetTerminate, void *)(f->options)); }
char *orrery_frame_unterminate(orrery_frame *f) { return message(CALL(RunOptionsUnsetTerminate, void *)(f->options)); }

char *orrery_frame_output(orrery_frame *f, int i, orrery_tensor *out) {
	void *info;
	size_t rank, count;
	int type;
	char *fault = message(CALL(GetTensorTypeAndShape, const void *, void **)(f->out_values[i], &info));
	if (fault != NULL) return fault;
	fault = message(CALL(GetTensorElementType, const void *, int *)(info, &type));
	if (fault == NULL) fault = message(CALL(GetDimensionsCount, const void *, size_t *)(info, &rank));
	if (fault == NULL && rank > ORRERY_MAX_RANK) fault = strdup("the tensor has too many dimensions");
	if (fault == NULL) fault = message(CALL(GetDimensions, const void *, int64_t *, size_t)(info, out->dims, rank));
	if (fault == NULL) fault = message(CALL(GetTensorShapeElementCount, const void *, size_t *)(info, &count));
	RELEASE(ReleaseTensorTypeAndShapeInfo, info);
	if (fault != NULL) return fault;
	out->type = type;
	out->rank = (int32_t)rank;
	out->bytes = count;
	out->data = 0;
	if (type != STRING) return NULL;
	size_t text;
	fault = message(CALL(GetStringTensorDataLength, const void *, size_t *)(f->out_values[i], &text));
	out->bytes = text + 4 * count;
	return fault;
}

char *orrery_frame_copy(orrery_frame *f, int i, void *to, size_t bytes) {
	void *from;
	char *fault = message(CALL(GetTensorMutableData, void *, void **)(f->out_values[i], &from));
	if (fault == NULL && bytes > 0) memcpy(to, from, bytes);
	return fault;
}

char *orrery_frame_strings(orrery_frame *f, int i, void *wire, size_t bytes) {
	orrery_tensor t;
	char *fault = orrery_frame_output(f, i, &t);
	if (fault != NULL) return fault;
	size_t count = 1;
	for (int d = 0; d < t.rank; d++) count *= t.dims[d];
	size_t text = bytes - 4 * count;
	char *all = malloc(text + 1);
	size_t *offsets = malloc((count + 1) * sizeof *offsets);
	fault = message(CALL(GetStringTensorContent, const void *, void *, size_t, size_t *, size_t)(f->out_values[i], all, text, offsets, count));
	unsigned char *at = wire;
	for (size_t e = 0; fault == NULL && e < count; e++) {
		size_t size = (e + 1 < count ? offsets[e + 1] : text) - offsets[e];
		at[0] = size & 0xff;
		at[1] = size >> 8 & 0xff;
		at[2] = size >> 16 & 0xff;
		at[3] = size >> 24 & 0xff;
		memcpy(at + 4, all + offsets[e], size);
		at += 4 + size;
	}
	free(all);
	free(offsets);
	return fault;
}
