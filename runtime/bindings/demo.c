/* Trains one batch a few times, keeps the result, and goes on from it: the whole life of a program in C.
 *
 *   cc demo.c -Iinclude -Llib -lpockrt -o demo && ./demo model.pock tuned.ckpt
 *
 * The batch is made up, so that this works with any program: every input of float32 is filled with small
 * numbers, every other one with zeros, which are valid labels and token ids.
 */
#include <stdio.h>
#include <string.h>

#include "pockc/runtime.h"

#define MAX_INPUTS 16

/* Every call gives a status; pk_last_error has a sentence about the last failure on this thread. */
static int failed(pk_status status, const char* doing) {
  if (status == PK_OK) return 0;
  fprintf(stderr, "cannot %s: %s\n", doing, pk_last_error());
  return 1;
}

static int64_t elements(const pk_tensor* tensor) {
  int64_t count = 1;
  for (int32_t axis = 0; axis < tensor->rank; ++axis) count *= tensor->dims[axis];
  return count;
}

/* pk_session_input gives a buffer inside the session, so that a batch needs no memory of its own. Its
 * contents are lost in every run: it is filled anew before each one. */
static int fill(pk_session* session, const char* name, pk_tensor* buffer) {
  static const size_t kBytes[] = {4, 8, 4, 1, 1}; /* by pk_dtype */
  if (failed(pk_session_input(session, "train_step", name, buffer), "find an input")) return 1;
  memset(buffer->data, 0, (size_t)elements(buffer) * kBytes[buffer->dtype]);
  if (buffer->dtype != PK_F32) return 0;
  for (int64_t i = 0; i < elements(buffer); ++i) ((float*)buffer->data)[i] = (float)(i % 17) / 17.0f - 0.5f;
  return 0;
}

/* Inputs are matched by name. Of the outputs, the loss alone is asked for: it is a scalar, of rank 0. */
static int train(const pk_program* program, pk_session* session, int steps) {
  const char* names[MAX_INPUTS];
  pk_tensor inputs[MAX_INPUTS];
  int32_t count = 0;
  while (count < MAX_INPUTS &&
         pk_program_tensor(program, "train_step", PK_INPUT, count, &names[count], &inputs[count]) == PK_OK) {
    ++count;
  }
  for (int step = 0; step < steps; ++step) {
    float loss = 0;
    const char* wanted = "loss";
    pk_tensor output = {&loss, PK_F32, 0, {0}};
    for (int32_t i = 0; i < count; ++i) {
      if (fill(session, names[i], &inputs[i])) return 1;
    }
    if (failed(pk_session_run(session, "train_step", names, inputs, count, &wanted, &output, 1), "train"))
      return 1;
    printf("step %d loss %.6f\n", step, (double)loss);
  }
  return 0;
}

int main(int argc, char** argv) {
  pk_program* program = NULL;
  pk_session* session = NULL;
  pk_session_options options = {1, 0}; /* one thread, the fast kernels */
  pk_memory memory;
  if (argc != 3) {
    fprintf(stderr, "usage: demo MODEL.pock CHECKPOINT\n");
    return 2;
  }
  /* The program maps the file; it must live as long as the session over it. The session's arena is the only
   * large allocation: nothing is allocated while it trains. */
  int bad = failed(pk_program_load(argv[1], &program), "load the program") ||
            failed(pk_session_create(program, &options, &session), "create a session") ||
            train(program, session, 5) ||
            /* The checkpoint is written whole or not at all; the text is the caller's own. */
            failed(pk_session_save(session, argv[2], "{\"epoch\": 1}"), "save") ||
            failed(pk_session_load(session, argv[2], NULL), "load the checkpoint") ||
            train(program, session, 1);
  if (!bad && pk_session_memory(session, &memory) == PK_OK)
    printf("arena %llu bytes\n", (unsigned long long)memory.arena_bytes);
  pk_session_free(session); /* both take null */
  pk_program_free(program);
  return bad;
}
