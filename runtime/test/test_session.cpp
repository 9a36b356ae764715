// Sessions over the C ABI: running, memory, states, messages.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "allocation_counter.h"
#include "check.h"
#include "program_writer.h"
#include "session.h"
#include "session_fixture.h"

using namespace pockc;
using namespace pockc::test;

TEST("a step computes the loss and updates the weight") {
  Fixture fixture;
  const float x[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  float loss = 0;
  REQUIRE(fixture.train(x, &loss) == PK_OK);
  CHECK(loss == 14.0f);  // 0 + 1 + 4 + 9
  float weight[4];
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  const float wanted[4] = {1, 1.75f, 2.5f, 3.25f};
  CHECK(std::memcmp(weight, wanted, sizeof(wanted)) == 0);
  int64_t step = 0;
  pk_tensor tensor{&step, PK_I64, 0, {}};
  REQUIRE(pk_session_read_state(fixture.session, "pockc.step", &tensor) == PK_OK);
  CHECK(step == 1);
}

TEST("nothing is allocated after creation, and the arena is as large as the program says") {
  ProgramWriter writer = mean_program();
  writer.transient(DType::kF32, {1 << 18});
  largest_allocation = 0;
  Fixture fixture(writer);
  REQUIRE(fixture.session != nullptr);
  pk_memory memory;
  REQUIRE(pk_session_memory(fixture.session, &memory) == PK_OK);
  CHECK(memory.arena_bytes == writer.arena_bytes && memory.state_bytes == writer.state_bytes);
  CHECK(largest_allocation == writer.arena_bytes);
  const float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float loss = 0, logits[8], weight[4];
  const int64_t before = allocation_count;
  for (int step = 0; step < 5; ++step) {
    fixture.train(x, &loss);
    fixture.infer(x, logits);
    fixture.read("weight", weight, {4});
    pk_tensor bad{weight, PK_F32, 1, {3}};
    pk_session_write_state(fixture.session, "weight", &bad);  // failing does not allocate either
  }
  CHECK(allocation_count == before);
}

TEST("the used peak is what the calls touched") {
  ProgramWriter writer = mean_program();
  const uint64_t used = writer.arena_bytes;
  writer.transient(DType::kF32, {1000});  // planned, never touched
  Fixture fixture(writer);
  pk_memory memory;
  REQUIRE(pk_session_memory(fixture.session, &memory) == PK_OK);
  CHECK(memory.used_peak_bytes == 0);
  CHECK(memory.mapped_bytes == 16 + 8 + 8 + 16);  // the frozen weight and the constants
  const float x[8] = {};
  float loss;
  fixture.train(x, &loss);
  REQUIRE(pk_session_memory(fixture.session, &memory) == PK_OK);
  // The last touched tensor is the row of f32[1,4] at the end.
  CHECK(memory.used_peak_bytes == used - 64 + 16);
}

TEST("states are read and written in the user's layout") {
  Fixture fixture;
  float table[6];
  REQUIRE(fixture.read("table", table, {3, 2}) == PK_OK);
  for (int i = 0; i < 6; ++i) CHECK(table[i] == static_cast<float>(i));
  float changed[6] = {6, 7, 8, 9, 10, 11};
  pk_tensor tensor{changed, PK_F32, 2, {3, 2}};
  REQUIRE(pk_session_write_state(fixture.session, "table", &tensor) == PK_OK);
  REQUIRE(fixture.read("table", table, {3, 2}) == PK_OK);
  CHECK(std::memcmp(table, changed, sizeof(table)) == 0);
  float frozen[4];
  REQUIRE(fixture.read("frozen", frozen, {4}) == PK_OK);
  CHECK(frozen[0] == 9 && frozen[3] == 6);
  pk_tensor refused{frozen, PK_F32, 1, {4}};
  CHECK(pk_session_write_state(fixture.session, "frozen", &refused) == PK_INVALID_ARGUMENT);
  CHECK(pk_session_write_state(fixture.session, "nothing", &refused) == PK_NOT_FOUND);
}

TEST("an input that is made in place gives the bits of one that is copied") {
  for (const uint32_t accumulation : {1u, 3u}) {
    Fixture copied(mean_program(accumulation)), placed(mean_program(accumulation));
    const char* names[] = {"pixel_values", "labels"};
    const char* output_names[] = {"loss"};
    int64_t labels[2] = {0, 1};
    for (int step = 0; step < 7; ++step) {
      float x[8], wanted = 0, loss = -1;
      for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(step * i % 5);
      REQUIRE(copied.train(x, &wanted) == PK_OK);
      pk_tensor inputs[] = {{}, {labels, PK_I64, 1, {2}}};
      REQUIRE(pk_session_input(placed.session, "train_step", "pixel_values", &inputs[0]) == PK_OK);
      REQUIRE(inputs[0].dtype == PK_F32 && inputs[0].rank == 2);
      REQUIRE(inputs[0].dims[0] == 2 && inputs[0].dims[1] == 4);
      std::memcpy(inputs[0].data, x, sizeof(x));
      const pk_tensor output{&loss, PK_F32, 0, {}};
      REQUIRE(pk_session_run(placed.session, "train_step", names, inputs, 2, output_names, &output, 1) ==
              PK_OK);
      CHECK(loss == wanted);
    }
    float a[4], b[4];
    REQUIRE(copied.read("weight", a, {4}) == PK_OK && placed.read("weight", b, {4}) == PK_OK);
    CHECK(std::memcmp(a, b, sizeof(a)) == 0);
  }
}

TEST("the buffer of an input is that of its entry, and no other place in the arena is taken") {
  Fixture fixture;
  pk_tensor train, again, infer;
  REQUIRE(pk_session_input(fixture.session, "train_step", "pixel_values", &train) == PK_OK);
  REQUIRE(pk_session_input(fixture.session, "train_step", "pixel_values", &again) == PK_OK);
  REQUIRE(pk_session_input(fixture.session, "infer", "pixel_values", &infer) == PK_OK);
  CHECK(train.data == again.data && train.data != nullptr);
  pk_tensor none;
  CHECK(pk_session_input(fixture.session, "dance", "pixel_values", &none) == PK_NOT_FOUND);
  CHECK(pk_session_input(fixture.session, "train_step", "pixels", &none) == PK_NOT_FOUND);
  CHECK(contains(pk_last_error(), "entry `train_step` has no input `pixels`"));
  CHECK(pk_session_input(fixture.session, "infer", "labels", &none) == PK_NOT_FOUND);
  CHECK(pk_session_input(fixture.session, "train_step", "weight", &none) == PK_NOT_FOUND);  // a state
  CHECK(pk_session_input(nullptr, "infer", "pixel_values", &none) == PK_INVALID_ARGUMENT);
  CHECK(pk_session_input(fixture.session, nullptr, "pixel_values", &none) == PK_INVALID_ARGUMENT);
  CHECK(pk_session_input(fixture.session, "infer", nullptr, &none) == PK_INVALID_ARGUMENT);
  CHECK(pk_session_input(fixture.session, "infer", "pixel_values", nullptr) == PK_INVALID_ARGUMENT);
  const char* names[] = {"pixel_values"};
  infer.data = static_cast<float*>(infer.data) + 1;
  CHECK(pk_session_run(fixture.session, "infer", names, &infer, 1, nullptr, nullptr, 0) ==
        PK_INVALID_ARGUMENT);
  CHECK(contains(pk_last_error(), "ask pk_session_input before each run"));
}

TEST("with accumulation the buffer follows the micro-step") {
  Fixture fixture(mean_program(2));
  pk_tensor none;
  CHECK(pk_session_input(fixture.session, "accumulate", "pixel_values", &none) == PK_INVALID_ARGUMENT);
  CHECK(contains(pk_last_error(), "run `train_step`"));
}

TEST("wrong arguments are refused with the shapes in the message") {
  Fixture fixture;
  float x[32] = {};
  int64_t labels[4] = {};
  const char* names[] = {"pixel_values", "labels"};
  pk_tensor inputs[] = {{x, PK_F32, 2, {4, 4}}, {labels, PK_I64, 1, {2}}};
  const auto run = [&](const char* entry, int32_t count) {
    return pk_session_run(fixture.session, entry, names, inputs, count, nullptr, nullptr, 0);
  };
  CHECK(run("train_step", 2) == PK_TYPE_MISMATCH);
  CHECK(std::string(pk_last_error()) ==
        "input `pixel_values` has shape [4,4], the program wants [2,4]; rebuild with "
        "--batch-size 4 or pad the batch");
  inputs[0].dims[0] = 2;
  inputs[0].dtype = PK_I32;
  CHECK(run("train_step", 2) == PK_TYPE_MISMATCH);
  CHECK(std::string(pk_last_error()) == "input `pixel_values` has dtype int32, the program wants float32");
  inputs[0].dtype = PK_F32;
  CHECK(run("train_step", 1) == PK_INVALID_ARGUMENT);
  CHECK(contains(pk_last_error(), "`labels`") && contains(pk_last_error(), "missing"));
  CHECK(run("dance", 2) == PK_NOT_FOUND);
  inputs[0].data = nullptr;
  CHECK(run("train_step", 2) == PK_INVALID_ARGUMENT);
  inputs[0].data = x;
  names[1] = "lables";
  CHECK(run("train_step", 2) == PK_NOT_FOUND);
  names[1] = "pixel_values";
  inputs[1] = inputs[0];
  CHECK(run("train_step", 2) == PK_INVALID_ARGUMENT);
  names[1] = nullptr;
  CHECK(run("train_step", 2) == PK_INVALID_ARGUMENT);
  CHECK(pk_session_run(nullptr, "train_step", nullptr, nullptr, 0, nullptr, nullptr, 0) ==
        PK_INVALID_ARGUMENT);
  CHECK(pk_status_string(static_cast<pk_status>(99)) != nullptr);
}

TEST("more threads than planned are refused") {
  Fixture fixture;
  pk_session_options options{3, 0};
  pk_session* session = nullptr;
  CHECK(pk_session_create(fixture.program, &options, &session) == PK_INVALID_ARGUMENT);
  CHECK(contains(pk_last_error(), "1 to 2"));
}

TEST("gradient accumulation steps once per group") {
  Fixture fixture(mean_program(3));
  const float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  float loss, weight[4];
  for (int micro = 0; micro < 2; ++micro) REQUIRE(fixture.train(x, &loss) == PK_OK);
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  CHECK(weight[3] == 4.0f);
  REQUIRE(fixture.train(x, &loss) == PK_OK);
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  CHECK(weight[3] == 1.0f);  // 4 - 0.25 * (4 + 4 + 4)
  float sum[4];
  REQUIRE(fixture.read("weight.accumulated", sum, {4}) == PK_OK);
  CHECK(sum[3] == 0.0f);
}

TEST("a shut gate ends the entry: the loss is there, and what comes behind keeps its state") {
  ProgramWriter writer = mean_program();
  const uint32_t finite = writer.transient(DType::kBool, {}), one = writer.transient(DType::kF32, {});
  std::vector<WrittenCall>& calls = writer.entries[0].calls;
  const auto sgd = calls.end() - 2;
  const uint32_t gradient = sgd->inputs[1];
  calls.insert(sgd, {writer.call("all_finite", {gradient}, {finite}), writer.call("gate", {finite}, {one})});
  Fixture fixture(writer);
  REQUIRE(fixture.session != nullptr);
  const float infinity = std::numeric_limits<float>::infinity();
  const float bad[8] = {0, 0, infinity, 0, 0, 0, 0, 0}, good[8] = {};
  float loss = 0, weight[4];
  int64_t step = -1;
  pk_tensor step_tensor{&step, PK_I64, 0, {}};
  REQUIRE(fixture.train(bad, &loss) == PK_OK);
  CHECK(loss == infinity);
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  REQUIRE(pk_session_read_state(fixture.session, "pockc.step", &step_tensor) == PK_OK);
  CHECK(weight[0] == 1.0f && weight[2] == 3.0f && step == 0);
  REQUIRE(fixture.train(good, &loss) == PK_OK);
  REQUIRE(fixture.read("weight", weight, {4}) == PK_OK);
  REQUIRE(pk_session_read_state(fixture.session, "pockc.step", &step_tensor) == PK_OK);
  CHECK(weight[0] == 0.75f && step == 1);
}

TEST("the pool covers every index once, whatever its size") {
  for (const int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (const int64_t count : {0, 1, 5, 64, 1000}) {
      for (const int64_t grain : {1, 16, 5000}) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(count));
        pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int thread) {
          CHECK(thread >= 0 && thread < threads && begin % grain == 0);
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        for (const std::atomic<int>& hit : hits) CHECK(hit == 1);
      }
    }
  }
}

TEST("no job of the pool is lost, whether its threads look out for it or sleep") {
  for (const int threads : {2, 3, 7}) {
    ThreadPool pool(threads);
    int64_t sum = 0;
    std::vector<int64_t> each(static_cast<size_t>(threads));
    for (int job = 0; job < 3000; ++job) {
      pool.parallel_for(threads, 1, [&](int64_t begin, int64_t end, int thread) {
        each[static_cast<size_t>(thread)] = end - begin;
      });
      for (int64_t& done : each) sum += done, done = 0;
      if (job % 100 == 99)
        std::this_thread::sleep_for(std::chrono::microseconds(300));  // all of them fall asleep
    }
    CHECK(sum == 3000 * threads);
  }
}

TEST("the kernel lists hold a check and a run for every op, and only instruction sets of this CPU") {
  CHECK(find_reference("add") != nullptr && find_reference("add")->check != nullptr);
  CHECK(find_reference("no_such_op") == nullptr);
  CHECK(find_simd("no_such_op") == nullptr);
  CHECK(find_simd("matmul", "no_such_isa") == nullptr);
  CHECK(best_isa() != nullptr);
  CHECK(what_cpu_lacks() == nullptr);
}

int main() { return run_tests(); }
