// pockc for C++17 applications: the C interface of runtime.h with owners instead of handles. Header-only.
//
// Ownership. Program and Session free what they hold; both move and do not copy. A Session keeps a pointer to
// its Program's contents: the Program must outlive it (moving the Program is fine, destroying it is not).
// Tensors are views: they own nothing, and what they point to must live until the call returns.
//
// Threads. A Program may be shared between threads. A Session is for one thread at a time: guard it, or make
// one per thread, each with an arena of its own.
//
// Errors. No exceptions: what can fail returns a Result or a Status, whose message is a copy and stays valid.
#ifndef POCKC_BINDINGS_POCKC_HPP_
#define POCKC_BINDINGS_POCKC_HPP_

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "pockc/runtime.h"

namespace pockc::api {

// Success, or a code with one sentence.
class Status {
 public:
  Status() = default;
  static Status of(pk_status code) {
    Status status;
    status.code_ = code;
    if (code != PK_OK) status.message_ = pk_last_error();
    return status;
  }
  bool ok() const { return code_ == PK_OK; }
  pk_status code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  pk_status code_ = PK_OK;
  std::string message_;
};

// A value where the status is ok; asking for it elsewhere is the caller's mistake.
template <typename T>
class Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) {}
  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  T& value() { return value_; }

 private:
  Status status_;
  T value_{};
};

inline pk_tensor tensor(void* data, pk_dtype dtype, std::initializer_list<int64_t> dims) {
  pk_tensor view{};
  view.data = data;
  view.dtype = dtype;
  for (int64_t size : dims) {
    if (view.rank < PK_MAX_RANK) view.dims[view.rank++] = size;
  }
  return view;
}
inline pk_tensor tensor(float* data, std::initializer_list<int64_t> dims) {
  return tensor(data, PK_F32, dims);
}
inline pk_tensor tensor(int64_t* data, std::initializer_list<int64_t> dims) {
  return tensor(data, PK_I64, dims);
}

// A tensor with the name that the program knows it by; the name is borrowed.
struct Named {
  const char* name;
  pk_tensor tensor;
};

class Program {
 public:
  Program() = default;
  ~Program() { pk_program_free(handle_); }
  Program(Program&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Program& operator=(Program&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  static Result<Program> load(const char* path) {
    Program program;
    const Status status = Status::of(pk_program_load(path, &program.handle_));
    if (!status.ok()) return status;
    return program;
  }
  // JSON text, owned by the program.
  const char* metadata() const { return pk_program_metadata(handle_); }
  // Inputs, outputs (of an entry) or states, in order; names are owned by the program, data is null.
  std::vector<Named> tensors(pk_role role, const char* entry = nullptr) const {
    std::vector<Named> found;
    Named next{};
    for (int32_t i = 0; pk_program_tensor(handle_, entry, role, i, &next.name, &next.tensor) == PK_OK; ++i) {
      found.push_back(next);
    }
    return found;
  }
  const pk_program* handle() const { return handle_; }

 private:
  pk_program* handle_ = nullptr;
};

class Session {
 public:
  Session() = default;
  ~Session() { pk_session_free(handle_); }
  Session(Session&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Session& operator=(Session&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  // The one large allocation. `program` must outlive the session.
  static Result<Session> create(const Program& program, int threads = 1) {
    Session session;
    const pk_session_options options{threads, 0};
    const Status status = Status::of(pk_session_create(program.handle(), &options, &session.handle_));
    if (!status.ok()) return status;
    return session;
  }

  // Every input of the entry, any of its outputs: data is copied in before, and out after.
  Status run(const char* entry, std::initializer_list<Named> inputs, std::initializer_list<Named> outputs) {
    constexpr size_t kMost = 32;
    const char* names[2][kMost];
    pk_tensor tensors[2][kMost];
    if (inputs.size() > kMost || outputs.size() > kMost) return Status::of(PK_INVALID_ARGUMENT);
    int side = 0;
    for (const auto* list : {&inputs, &outputs}) {
      size_t i = 0;
      for (const Named& each : *list) {
        names[side][i] = each.name;
        tensors[side][i++] = each.tensor;
      }
      ++side;
    }
    return Status::of(pk_session_run(handle_, entry, names[0], tensors[0],
                                     static_cast<int32_t>(inputs.size()), names[1], tensors[1],
                                     static_cast<int32_t>(outputs.size())));
  }
  // One step of training; the loss of the batch.
  Result<float> train_step(std::initializer_list<Named> inputs) {
    float loss = 0;
    const Status status = run("train_step", inputs, {{"loss", tensor(&loss, {})}});
    if (!status.ok()) return status;
    return loss;
  }
  // A buffer inside the session that the next run of this entry reads: see pk_session_input.
  Result<pk_tensor> input(const char* entry, const char* name) {
    pk_tensor buffer{};
    const Status status = Status::of(pk_session_input(handle_, entry, name, &buffer));
    if (!status.ok()) return status;
    return buffer;
  }
  Status read_state(const char* name, pk_tensor* to) {
    return Status::of(pk_session_read_state(handle_, name, to));
  }
  Status write_state(const char* name, const pk_tensor& from) {
    return Status::of(pk_session_write_state(handle_, name, &from));
  }
  // Crash-safe; `cursor_json` is the caller's own, given back by load.
  Status save(const char* path, const char* cursor_json = nullptr) {
    return Status::of(pk_session_save(handle_, path, cursor_json));
  }
  Result<std::string> load(const char* path) {
    const char* cursor = nullptr;
    const Status status = Status::of(pk_session_load(handle_, path, &cursor));
    if (!status.ok()) return status;
    return std::string(cursor == nullptr ? "" : cursor);
  }
  pk_memory memory() const {
    pk_memory memory{};
    pk_session_memory(handle_, &memory);
    return memory;
  }

 private:
  pk_session* handle_ = nullptr;
};

}  // namespace pockc::api

#endif  // POCKC_BINDINGS_POCKC_HPP_
