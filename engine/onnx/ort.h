// The part of ONNX Runtime's C interface that Orrery uses. The library is opened at run time, so nothing is linked.
// Functions that can fail return NULL, or a message that the caller frees.
#ifndef ORRERY_ORT_H
#define ORRERY_ORT_H

#include <stddef.h>
#include <stdint.h>

enum { ORRERY_MAX_RANK = 16 };

// A tensor in memory of the caller. Strings lie as on the wire: a 4-byte little-endian length before each.
typedef struct {
	uintptr_t data; // an address, not a pointer: Go must not see what an earlier run left here; 0 for an output that ONNX Runtime allocates
	size_t bytes;
	int32_t type; // ONNXTensorElementDataType
	int32_t rank;
	int64_t dims[ORRERY_MAX_RANK];
} orrery_tensor;

// What one run needs; it serves one run at a time and is used again.
typedef struct {
	int inputs, outputs;
	const char *const *input_names, *const *output_names;
	orrery_tensor *in, *out;
	void **in_values, **out_values; // OrtValue
	void *options;                  // OrtRunOptions
} orrery_frame;

// A setting of an execution provider.
typedef struct {
	const char **keys, **values;
	size_t count;
} orrery_settings;

char *orrery_open(const char *library);
void orrery_trim(void);
char *orrery_providers(char **names); // one a line
char *orrery_options_new(int threads, void **options);
char *orrery_options_provider(void *options, const char *name, orrery_settings settings);
void orrery_options_free(void *options);
char *orrery_session_new(const char *path, void *options, void **session);
void orrery_session_free(void *session);
char *orrery_frame_new(int inputs, const char *const *input_names, int outputs, const char *const *output_names, orrery_frame **frame);
char *orrery_frame_run(orrery_frame *frame, void *session);
char *orrery_frame_terminate(orrery_frame *frame);
char *orrery_frame_unterminate(orrery_frame *frame);
char *orrery_frame_output(orrery_frame *frame, int i, orrery_tensor *out); // shape and type; bytes are those of strings on the wire, else elements
char *orrery_frame_copy(orrery_frame *frame, int i, void *to, size_t bytes);
char *orrery_frame_strings(orrery_frame *frame, int i, void *wire, size_t bytes);
void orrery_frame_clear(orrery_frame *frame);
void orrery_frame_free(orrery_frame *frame);

#endif
