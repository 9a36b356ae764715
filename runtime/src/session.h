// A program with memory: one arena, calls bound to kernels.
#ifndef POCKC_SRC_SESSION_H_
#define POCKC_SRC_SESSION_H_

#include <string>
#include <vector>

#include "program.h"

namespace pockc {

struct SessionSettings {
  int threads = 1;
  bool reference_only = false;
  const char* isa = nullptr;  // an instruction set of the registry; null: the best. For tests
};

// Told of every call of a run, for profiles: by the thread that runs the session.
class CallObserver {
 public:
  virtual void before(const EntryRecord& entry, size_t index) = 0;
  virtual void after(const EntryRecord& entry, size_t index) = 0;

 protected:
  ~CallObserver() = default;
};

class Session {
 public:
  Session() = default;
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Binds every call, allocates the arena, sets every state. Once per object.
  Status create(const Program& program, const SessionSettings& settings);

  Status run(const char* entry, const char* const* input_names, const pk_tensor* inputs, int32_t input_count,
             const char* const* output_names, const pk_tensor* outputs, int32_t output_count);
  Status input(const char* entry, const char* name, pk_tensor* out);
  Status read_state(const char* name, pk_tensor* out) const;
  Status write_state(const char* name, const pk_tensor& tensor);
  Status save(const char* path, const char* cursor_json) const;
  Status load(const char* path);
  // The same from memory; `what` names it in messages.
  Status load_bytes(const char* what, Bytes bytes);
  pk_memory memory() const;
  // Sets every state as `create` did.
  void reset();
  // Whether all values of a mutable float32 state are finite; true for other dtypes.
  bool is_finite(const StateRecord& state) const;

  const Program& program() const { return *program_; }
  const std::string& cursor() const { return cursor_; }
  uint32_t micro_step() const { return micro_step_; }
  // Null: none. It must outlive the runs that follow.
  void set_observer(CallObserver* observer) { observer_ = observer; }
  // For tests that make the disk fail; the table must outlive the session.
  void set_file_system(const FileSystem& system) { file_system_ = &system; }

 private:
  // Of the call with the same index in the record. There are thousands: what a kernel gets is put together
  // from the record right before it runs.
  struct BoundCall {
    RunFunction run = nullptr;
    uint64_t end = 0;  // highest arena address that the call touches
  };
  struct BoundEntry {
    const EntryRecord* record = nullptr;
    std::vector<BoundCall> calls;
    std::vector<const Tensor*> operands;  // those of the record, of all calls
  };

  Status bind_entry(const EntryRecord& record, const SessionSettings& settings, BoundEntry* entry);
  Status bind_call(const SessionSettings& settings, const CallRecord& record, const Call& call,
                   BoundCall* bound) const;
  uint64_t highest_address(const EntryRecord& entry, const CallRecord& call) const;
  Call call_of(const BoundEntry& entry, const CallRecord& record) const;
  Status allocate();
  void* address(const TensorRecord& tensor) const;

  Status select_entry(const char* name, const BoundEntry** entry) const;
  bool in_arena(const void* data) const;
  Status check_input(const EntryRecord& entry, const char* name, const pk_tensor& given) const;
  Status copy_inputs(const EntryRecord& entry, const char* const* names, const pk_tensor* tensors,
                     int32_t count);
  Status check_outputs(const EntryRecord& entry, const char* const* names, const pk_tensor* tensors,
                       int32_t count) const;
  Status run_calls(const BoundEntry& entry);
  Status run_observed(const BoundEntry& entry, size_t index) const;
  void touch(uint64_t end) { used_peak_ = end > used_peak_ ? end : used_peak_; }
  const char* text(uint32_t index) const { return program_->strings[index].c_str(); }
  void set_initial_states();
  uint64_t count_mapped_bytes() const;

  const Program* program_ = nullptr;
  ThreadPool* pool_ = nullptr;
  unsigned char* arena_ = nullptr;
  std::vector<Tensor> tensors_;  // those of the program, with data from `allocate` on
  std::vector<BoundEntry> entries_;
  uint32_t micro_step_ = 0;  // micro-steps done towards the next optimizer step
  uint64_t used_peak_ = 0;
  uint64_t mapped_bytes_ = 0;
  const FileSystem* file_system_ = &posix_file_system();
  std::string cursor_;
  CallObserver* observer_ = nullptr;
};

// `[8,3,96,96]`, into a caller's buffer.
struct ShapeText {
  explicit ShapeText(int32_t rank, const int64_t* dims);
  char text[PK_MAX_RANK * 22 + 3];
};

}  // namespace pockc

#endif  // POCKC_SRC_SESSION_H_
