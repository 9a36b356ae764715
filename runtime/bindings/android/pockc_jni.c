/* The natives of org.pockc.Native (Native.java) over the C ABI: what an Android application, or any JVM,
 * calls.
 *
 * A handle is the address of a Model. Tensors are direct ByteBuffers in the byte order of the machine: their
 * memory is read and written in place, nothing is copied to or from the Java heap. Every failure becomes a
 * Java exception with the runtime's own sentence; after one has been thrown, nothing else is called.
 */
#include <jni.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pockc/runtime.h"

#define MAX_TENSORS 64

typedef struct Model {
  pk_program* program;
  pk_session* session;
} Model;

/* One entry's tensors of a role, as pk_session_run wants them. */
typedef struct Tensors {
  int32_t count;
  jstring strings[MAX_TENSORS]; /* owners of `names` */
  const char* names[MAX_TENSORS];
  pk_tensor tensors[MAX_TENSORS];
} Tensors;

static Model* model_of(jlong handle) { return (Model*)(intptr_t)handle; }

static int thrown(JNIEnv* env, const char* type, const char* message) {
  jclass class = (*env)->FindClass(env, type);
  if (class != NULL) (*env)->ThrowNew(env, class, message);
  return 1;
}

static int bad_argument(JNIEnv* env, const char* message) {
  return thrown(env, "java/lang/IllegalArgumentException", message);
}

static int failed(JNIEnv* env, pk_status status) {
  if (status == PK_OK) return 0;
  return thrown(env, "java/lang/IllegalStateException", pk_last_error());
}

/* Null where a string is null, or there is no memory: an exception is pending then. */
static const char* text_of(JNIEnv* env, jstring string) {
  if (string != NULL) return (*env)->GetStringUTFChars(env, string, NULL);
  bad_argument(env, "a string is null");
  return NULL;
}

static uint64_t bytes_of(const pk_tensor* tensor) {
  static const uint64_t kBytes[] = {4, 8, 4, 1, 1}; /* by pk_dtype */
  uint64_t bytes = kBytes[tensor->dtype];
  for (int32_t axis = 0; axis < tensor->rank; ++axis) bytes *= (uint64_t)tensor->dims[axis];
  return bytes;
}

/* Finds a tensor of an entry (of the states, for PK_STATE) by its name; throws where there is none. */
static int find(JNIEnv* env, const Model* model, const char* entry, pk_role role, const char* name,
                pk_tensor* out) {
  const char* found;
  char message[256];
  for (int32_t i = 0; pk_program_tensor(model->program, entry, role, i, &found, out) == PK_OK; ++i) {
    if (strcmp(found, name) == 0) return 0;
  }
  snprintf(message, sizeof(message), "there is no %.100s in %.100s", name,
           role == PK_STATE ? "the states" : entry);
  return bad_argument(env, message);
}

static int set_data(JNIEnv* env, jobject buffer, pk_tensor* tensor) {
  tensor->data = buffer == NULL ? NULL : (*env)->GetDirectBufferAddress(env, buffer);
  if (tensor->data == NULL) return bad_argument(env, "a tensor is no direct ByteBuffer");
  if ((uint64_t)(*env)->GetDirectBufferCapacity(env, buffer) != bytes_of(tensor))
    return bad_argument(env, "a ByteBuffer has not the size of its tensor");
  return 0;
}

static void release(JNIEnv* env, Tensors* tensors) {
  for (int32_t i = 0; i < tensors->count; ++i) {
    (*env)->ReleaseStringUTFChars(env, tensors->strings[i], tensors->names[i]);
    (*env)->DeleteLocalRef(env, tensors->strings[i]);
  }
}

/* Fills `out`, which is to be released whatever the result; non-zero where an exception is pending. */
static int read_tensors(JNIEnv* env, const Model* model, const char* entry, pk_role role, jobjectArray names,
                        jobjectArray buffers, Tensors* out) {
  out->count = 0;
  if (names == NULL || buffers == NULL) return bad_argument(env, "an array is null");
  const jsize count = (*env)->GetArrayLength(env, names);
  if (count > MAX_TENSORS || count != (*env)->GetArrayLength(env, buffers))
    return bad_argument(env, "there must be one buffer per name, and at most 64 of them");
  for (jsize i = 0; i < count; ++i) {
    jstring string = (jstring)(*env)->GetObjectArrayElement(env, names, i);
    const char* name = text_of(env, string);
    if (name == NULL) return 1;
    out->strings[i] = string;
    out->names[i] = name;
    out->count = i + 1;
    if (find(env, model, entry, role, name, &out->tensors[i])) return 1;
    jobject buffer = (*env)->GetObjectArrayElement(env, buffers, i);
    if (set_data(env, buffer, &out->tensors[i])) return 1;
    (*env)->DeleteLocalRef(env, buffer);
  }
  return 0;
}

/* --- org.pockc.Native, in its order --- */

JNIEXPORT jlong JNICALL Java_org_pockc_Native_open(JNIEnv* env, jclass class, jstring path, jint threads) {
  (void)class;
  const char* file = text_of(env, path);
  if (file == NULL) return 0;
  pk_session_options options = {threads, 0};
  Model* model = (Model*)calloc(1, sizeof(Model));
  pk_status status = model == NULL ? PK_OUT_OF_MEMORY : pk_program_load(file, &model->program);
  if (status == PK_OK) status = pk_session_create(model->program, &options, &model->session);
  (*env)->ReleaseStringUTFChars(env, path, file);
  if (!failed(env, status)) return (jlong)(intptr_t)model;
  if (model != NULL) pk_program_free(model->program);
  free(model);
  return 0;
}

JNIEXPORT void JNICALL Java_org_pockc_Native_close(JNIEnv* env, jclass class, jlong handle) {
  (void)env, (void)class;
  Model* model = model_of(handle);
  pk_session_free(model->session); /* before its program */
  pk_program_free(model->program);
  free(model);
}

JNIEXPORT jstring JNICALL Java_org_pockc_Native_metadata(JNIEnv* env, jclass class, jlong handle) {
  (void)class;
  return (*env)->NewStringUTF(env, pk_program_metadata(model_of(handle)->program));
}

JNIEXPORT jstring JNICALL Java_org_pockc_Native_name(JNIEnv* env, jclass class, jlong handle, jstring entry,
                                                     jint role, jint index) {
  (void)class;
  const char* name = NULL;
  pk_tensor tensor;
  const char* of = text_of(env, entry);
  if (of == NULL) return NULL;
  pk_status status = pk_program_tensor(model_of(handle)->program, of, (pk_role)role, index, &name, &tensor);
  (*env)->ReleaseStringUTFChars(env, entry, of);
  return status == PK_OK ? (*env)->NewStringUTF(env, name) : NULL;
}

JNIEXPORT jlongArray JNICALL Java_org_pockc_Native_type(JNIEnv* env, jclass class, jlong handle,
                                                        jstring entry, jint role, jint index) {
  (void)class;
  const char* name = NULL;
  pk_tensor tensor;
  jlong numbers[1 + PK_MAX_RANK];
  const char* of = text_of(env, entry);
  if (of == NULL) return NULL;
  pk_status status = pk_program_tensor(model_of(handle)->program, of, (pk_role)role, index, &name, &tensor);
  (*env)->ReleaseStringUTFChars(env, entry, of);
  if (failed(env, status)) return NULL;
  numbers[0] = tensor.dtype;
  for (int32_t axis = 0; axis < tensor.rank; ++axis) numbers[1 + axis] = tensor.dims[axis];
  jlongArray result = (*env)->NewLongArray(env, 1 + tensor.rank);
  if (result != NULL) (*env)->SetLongArrayRegion(env, result, 0, 1 + tensor.rank, numbers);
  return result;
}

JNIEXPORT void JNICALL Java_org_pockc_Native_run(JNIEnv* env, jclass class, jlong handle, jstring entry,
                                                 jobjectArray input_names, jobjectArray inputs,
                                                 jobjectArray output_names, jobjectArray outputs) {
  (void)class;
  const Model* model = model_of(handle);
  Tensors in, out;
  const char* of = text_of(env, entry);
  if (of == NULL) return;
  in.count = out.count = 0;
  if (!read_tensors(env, model, of, PK_INPUT, input_names, inputs, &in) &&
      !read_tensors(env, model, of, PK_OUTPUT, output_names, outputs, &out)) {
    failed(env, pk_session_run(model->session, of, in.names, in.tensors, in.count, out.names, out.tensors,
                               out.count));
  }
  release(env, &in); /* these calls are allowed while an exception is pending */
  release(env, &out);
  (*env)->ReleaseStringUTFChars(env, entry, of);
}

JNIEXPORT void JNICALL Java_org_pockc_Native_readState(JNIEnv* env, jclass class, jlong handle, jstring name,
                                                       jobject buffer) {
  (void)class;
  const Model* model = model_of(handle);
  pk_tensor tensor;
  const char* state = text_of(env, name);
  if (state == NULL) return;
  if (!find(env, model, "", PK_STATE, state, &tensor) && !set_data(env, buffer, &tensor))
    failed(env, pk_session_read_state(model->session, state, &tensor));
  (*env)->ReleaseStringUTFChars(env, name, state);
}

JNIEXPORT void JNICALL Java_org_pockc_Native_save(JNIEnv* env, jclass class, jlong handle, jstring path,
                                                  jstring cursor) {
  (void)class;
  const char* file = text_of(env, path);
  if (file == NULL) return;
  const char* json = cursor == NULL ? NULL : (*env)->GetStringUTFChars(env, cursor, NULL);
  if (cursor == NULL || json != NULL) failed(env, pk_session_save(model_of(handle)->session, file, json));
  if (json != NULL) (*env)->ReleaseStringUTFChars(env, cursor, json);
  (*env)->ReleaseStringUTFChars(env, path, file);
}

JNIEXPORT jstring JNICALL Java_org_pockc_Native_load(JNIEnv* env, jclass class, jlong handle, jstring path) {
  (void)class;
  const char* cursor = NULL;
  const char* file = text_of(env, path);
  if (file == NULL) return NULL;
  const int bad = failed(env, pk_session_load(model_of(handle)->session, file, &cursor));
  (*env)->ReleaseStringUTFChars(env, path, file);
  return bad || cursor == NULL ? NULL : (*env)->NewStringUTF(env, cursor);
}

JNIEXPORT jlong JNICALL Java_org_pockc_Native_arenaBytes(JNIEnv* env, jclass class, jlong handle) {
  (void)class;
  pk_memory memory;
  if (failed(env, pk_session_memory(model_of(handle)->session, &memory))) return 0;
  return (jlong)memory.arena_bytes;
}
