// A session over a small program, through the C ABI.
#ifndef POCKC_TEST_SESSION_FIXTURE_H_
#define POCKC_TEST_SESSION_FIXTURE_H_

#include <string>
#include <vector>

#include "program_writer.h"

namespace pockc::test {

struct Fixture {
  explicit Fixture(const ProgramWriter& writer = mean_program(), int threads = 1) {
    write_file(directory.path("model.pock"), writer.bytes());
    if (pk_program_load(directory.path("model.pock").c_str(), &program) != PK_OK) return;
    const pk_session_options options{threads, 0};
    pk_session_create(program, &options, &session);
  }
  ~Fixture() {
    pk_session_free(session);
    pk_program_free(program);
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  pk_status train(const float* x, float* loss) {
    int64_t labels[2] = {0, 1};
    const char* names[] = {"pixel_values", "labels"};
    const pk_tensor inputs[] = {{const_cast<float*>(x), PK_F32, 2, {2, 4}}, {labels, PK_I64, 1, {2}}};
    const char* output_names[] = {"loss"};
    const pk_tensor outputs[] = {{loss, PK_F32, 0, {}}};
    return pk_session_run(session, "train_step", names, inputs, 2, output_names, outputs, 1);
  }

  pk_status infer(const float* x, float* logits) {
    const char* names[] = {"pixel_values"};
    const pk_tensor inputs[] = {{const_cast<float*>(x), PK_F32, 2, {2, 4}}};
    const char* output_names[] = {"logits"};
    const pk_tensor outputs[] = {{logits, PK_F32, 2, {2, 4}}};
    return pk_session_run(session, "infer", names, inputs, 1, output_names, outputs, 1);
  }

  pk_status read(const char* name, float* out, std::initializer_list<int64_t> dims) {
    pk_tensor tensor{out, PK_F32, static_cast<int32_t>(dims.size()), {}};
    int axis = 0;
    for (const int64_t size : dims) tensor.dims[axis++] = size;
    return pk_session_read_state(session, name, &tensor);
  }

  TemporaryDirectory directory;
  pk_program* program = nullptr;
  pk_session* session = nullptr;
};

}  // namespace pockc::test

#endif  // POCKC_TEST_SESSION_FIXTURE_H_
