/* pockc runtime: load a compiled training program and run its steps. C ABI.
 *
 * Conventions: every function that can fail returns a pk_status; results come through `out_` parameters,
 * last. Handles are opaque. Strings are UTF-8 and NUL-terminated. Nothing is allocated after
 * pk_session_create, except by pk_session_save and pk_session_load, which use a small buffer of their own.
 *
 * Threads: a pk_program is immutable and may be shared between threads. A pk_session is thread-compatible:
 * one thread at a time. pk_last_error is per thread.
 */
#ifndef POCKC_RUNTIME_H_
#define POCKC_RUNTIME_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PK_API __declspec(dllexport)
#else
#define PK_API __attribute__((visibility("default")))
#endif

typedef enum pk_status {
  PK_OK = 0,
  PK_INVALID_ARGUMENT = 1, /* a value that the caller passed, or that the data holds, is out of range */
  PK_NOT_FOUND = 2,        /* no such file, entry, input, output or state */
  PK_TYPE_MISMATCH = 3,    /* shape or dtype differs from what the program declares */
  PK_BAD_FILE = 4,         /* corrupt, truncated or of an unknown version */
  PK_WRONG_MODEL = 5,      /* a checkpoint of another program */
  PK_UNSUPPORTED = 6,      /* this build or CPU lacks what the program needs */
  PK_OUT_OF_MEMORY = 7,
  PK_IO_ERROR = 8, /* the system refused a read or write: see pk_last_error */
  PK_INTERNAL = 9
} pk_status;

/* Frozen weights may be stored in fewer bytes: they are described, and read, as PK_F32. */
typedef enum pk_dtype { PK_F32 = 0, PK_I64 = 1, PK_I32 = 2, PK_U8 = 3, PK_BOOL = 4 } pk_dtype;

#define PK_MAX_RANK 8

typedef struct pk_tensor {
  void* data; /* borrowed; row-major and dense */
  pk_dtype dtype;
  int32_t rank;
  int64_t dims[PK_MAX_RANK];
} pk_tensor;

typedef struct pk_program pk_program;
typedef struct pk_session pk_session;

typedef struct pk_session_options {
  int32_t threads;      /* 1 or more; at most what the program was planned for */
  int32_t use_ref_only; /* non-zero: plain reference kernels, for tests */
} pk_session_options;

typedef struct pk_memory {
  uint64_t arena_bytes;     /* what pk_session_create allocated for the program: equals the build's figure */
  uint64_t state_bytes;     /* of these, trained parameters, optimizer slots and counters */
  uint64_t mapped_bytes;    /* frozen weights, mapped from the file, not copied */
  uint64_t used_peak_bytes; /* highest arena address that any call of the runs so far touched */
} pk_memory;

/* What a tensor argument is to an entry. */
typedef enum pk_role { PK_INPUT = 0, PK_OUTPUT = 1, PK_STATE = 2 } pk_role;

PK_API const char* pk_version(void);
PK_API const char* pk_status_string(pk_status status);
/* One sentence about the last failure on this thread; valid until the next call on this thread. Never null.
 */
PK_API const char* pk_last_error(void);

/* Maps and checks a .pock file. The caller owns the program and frees it after every session over it. */
PK_API pk_status pk_program_load(const char* path, pk_program** out_program);
PK_API void pk_program_free(pk_program* program);
/* The metadata section: JSON text, owned by the program. */
PK_API const char* pk_program_metadata(const pk_program* program);
/* The index-th input or output of an entry, or the index-th state (entry ignored): its name (owned by the
 * program) and its dtype and shape (user's layout; data null). PK_NOT_FOUND past the end. */
PK_API pk_status pk_program_tensor(const pk_program* program, const char* entry, pk_role role, int32_t index,
                                   const char** out_name, pk_tensor* out_tensor);

/* Allocates the arena (the only large allocation) and sets every state to its initial value. */
PK_API pk_status pk_session_create(const pk_program* program, const pk_session_options* options,
                                   pk_session** out_session);
PK_API void pk_session_free(pk_session* session);
/* Where the next run of an entry reads an input: a buffer inside the arena, owned by the session, for callers
 * that make their batch in place instead of having it copied. Fill it, then give pk_session_run a tensor with
 * this very pointer. Other tensors live in the same bytes during a run of any entry, so that the contents are
 * lost: fill every such input before every run, with no other run in between. Each entry has buffers of its
 * own, and with gradient accumulation "train_step" has two sets of them: ask again before each run. */
PK_API pk_status pk_session_input(pk_session* session, const char* entry, const char* name,
                                  pk_tensor* out_tensor);
/* Runs one entry. `inputs` are copied in first, matched by name, all must be there; one that has the pointer
 * of pk_session_input is in place already, any other pointer into the arena is refused. `outputs` are copied
 * out last, any subset of the entry's outputs. With gradient accumulation, "train_step" takes care of the
 * micro-step. Programs built with a cache for the frozen prefix also have "encode", which runs that alone,
 * and "train_step_encoded" and "eval_step_encoded", which take its outputs as inputs of the same names. */
PK_API pk_status pk_session_run(pk_session* session, const char* entry, const char* const* input_names,
                                const pk_tensor* inputs, int32_t input_count, const char* const* output_names,
                                const pk_tensor* outputs, int32_t output_count);
/* Copies one state out of or into the session, in the user's layout. Frozen states can be read, not written.
 */
PK_API pk_status pk_session_read_state(pk_session* session, const char* name, pk_tensor* out_tensor);
PK_API pk_status pk_session_write_state(pk_session* session, const char* name, const pk_tensor* tensor);
/* Crash-safe safetensors checkpoint of every mutable state. `cursor_json` (may be null) is stored with it and
 * given back by load: the caller's position in its data. After a failed save the previous file is intact. */
PK_API pk_status pk_session_save(pk_session* session, const char* path, const char* cursor_json);
/* `out_cursor_json` (may be null) is owned by the session until its next load. A refused file changes
 * nothing. */
PK_API pk_status pk_session_load(pk_session* session, const char* path, const char** out_cursor_json);
PK_API pk_status pk_session_memory(const pk_session* session, pk_memory* out_memory);

#ifdef __cplusplus
}
#endif

#endif /* POCKC_RUNTIME_H_ */
