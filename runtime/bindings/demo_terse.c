/* Five steps on zeros, and nothing else: see demo.c for what each call means. */
#include <stdio.h>
#include <string.h>

#include "pockc/runtime.h"

#define CHECK(call)                           \
  if ((call) != PK_OK) {                      \
    fprintf(stderr, "%s\n", pk_last_error()); \
    return 1;                                 \
  }

int main(int argc, char** argv) {
  pk_program* program;
  pk_session* session;
  if (argc != 2) return 2;
  CHECK(pk_program_load(argv[1], &program));
  CHECK(pk_session_create(program, NULL, &session));
  for (int step = 0; step < 5; ++step) {
    const char* names[16];
    pk_tensor inputs[16];
    int32_t n = 0;
    for (; n < 16 && pk_program_tensor(program, "train_step", PK_INPUT, n, &names[n], &inputs[n]) == PK_OK;
         ++n) {
      size_t bytes = inputs[n].dtype == PK_I64 ? 8 : 4;
      CHECK(pk_session_input(session, "train_step", names[n], &inputs[n]));
      for (int i = 0; i < inputs[n].rank; ++i) bytes *= (size_t)inputs[n].dims[i];
      if (inputs[n].dtype <= PK_I32) memset(inputs[n].data, 0, bytes);
    }
    float loss;
    const char* wanted = "loss";
    pk_tensor output = {&loss, PK_F32, 0, {0}};
    CHECK(pk_session_run(session, "train_step", names, inputs, n, &wanted, &output, 1));
    printf("%.6f\n", (double)loss);
  }
  pk_session_free(session);
  pk_program_free(program);
}
