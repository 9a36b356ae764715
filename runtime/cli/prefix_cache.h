// The frozen prefix, computed once per sample: what the entry `encode` makes of the samples of a data file.
#ifndef POCKC_CLI_PREFIX_CACHE_H_
#define POCKC_CLI_PREFIX_CACHE_H_

#include <memory>
#include <string>
#include <vector>

#include "cache_file.h"
#include "commands.h"
#include "dataset.h"
#include "record_format.h"

namespace pockc::cli {

// Of one data file. Values are the same whether a sample was read or encoded just now: what is kept in fewer
// bits is rounded before it is first used.
class PrefixCache {
 public:
  PrefixCache(const FileSystem& system, CacheDType how) : how_(how), file_(system) {}

  // `room` is what the file may take; what it may grow to is taken off.
  Status open(const std::string& path, const std::string& data, const Model& model, uint64_t* room);
  const Dataset& inputs() const { return inputs_; }

  // Makes a batch of encodings ready. `ahead`: as many indices, the batch included, are those of batches to
  // come; where the batch leaves room in a run of `encode`, their samples are encoded along.
  Status fetch(const int64_t* indices, int64_t ahead, Session* session);
  // The number of the output of `encode` with that name and type, or -1.
  int find(const std::string& name, const Tensor& type) const;
  // Copies that output of the batch.
  void copy(int output, void* to) const;

  int64_t encoded() const { return encoded_; }  // samples
  int64_t read() const { return read_; }
  uint64_t written_bytes() const { return file_.written_bytes(); }

 private:
  struct Field {
    DType dtype;
    int64_t elements;  // of a sample
    uint64_t offset;   // in a record
    uint64_t bytes;
  };

  void add_field(const Output& output);
  uint64_t fingerprint(const Program& program) const;
  bool take_fresh(int64_t sample, uint8_t* record) const;
  Status encode(Session* session);
  uint8_t* batch_record(int64_t position) {
    return batch_.data() + record_bytes_ * static_cast<size_t>(position);
  }

  CacheDType how_;
  CacheFile file_;
  const EntryRecord* entry_ = nullptr;
  Dataset inputs_;
  std::vector<Output> outputs_;
  std::vector<Field> fields_;
  uint64_t record_bytes_ = 0;
  std::vector<uint8_t> batch_;          // records of the batch
  std::vector<uint8_t> fresh_;          // records of the last run of `encode`
  std::vector<int64_t> fresh_samples_;  // their samples
  int64_t encoded_ = 0, read_ = 0;
};

// The caches of a run: one per data file, all in one directory, together within the limit.
class PrefixCaches {
 public:
  // Does nothing without --cache-prefix.
  Status open(const Options& options, const Model& model);
  // Binds `data` to the samples at `path` for an entry, or, with a cache of the name `name`, for what starts
  // from the frozen prefix. `*entry` is that entry then.
  Status bind(const char* name, const std::string& path, const Model& model, const EntryRecord** entry,
              Dataset* data);
  void describe(JsonObject* report) const;

 private:
  const Options* options_ = nullptr;  // null: no cache
  CacheDType how_ = CacheDType::kF32;
  uint64_t room_ = 0;
  std::vector<std::unique_ptr<PrefixCache>> caches_;
};

// `eval_step_encoded` for `eval_step`, or null where the program lacks it.
const EntryRecord* encoded_entry(const Program& program, const EntryRecord& entry);

}  // namespace pockc::cli

#endif  // POCKC_CLI_PREFIX_CACHE_H_
