// Samples from an .npz file as batches of an entry's inputs.
#ifndef POCKC_CLI_DATASET_H_
#define POCKC_CLI_DATASET_H_

#include <memory>
#include <string>
#include <vector>

#include "npz.h"
#include "session.h"

namespace pockc::cli {

class PrefixCache;

class Dataset {
 public:
  // Finds one array per input of the entry, by name. The first axis of an array counts samples, the other
  // axes are the input's but for its batch. Inputs whose first axis is not the batch are given whole, the
  // same for every batch. Converted while batches are made: float64 and uint8 to float32; int32 and uint8 to
  // int64.
  Status open(const std::string& path, const Program& program, const EntryRecord& entry);
  // The same over the file of another data set, which is then in memory once, and over its cache, if it has
  // one.
  Status share(const Dataset& other, const Program& program, const EntryRecord& entry);
  // The same over the file of a cache, which gives what the entry wants beside that: outputs of `encode`.
  Status start_behind(PrefixCache* cache, const Program& program, const EntryRecord& entry);

  int64_t samples() const { return samples_; }
  int64_t batch_size() const { return batch_; }
  const PrefixCache* cache() const { return cache_; }
  // Of the contents of the arrays: equal for equal ones.
  std::string digest() const;

  // Makes the batch of these samples, for the next run of the entry and no other: floats in the session's own
  // memory, so that there is no second batch; integers, which are small and read again after the run, here.
  // NaN and infinite values are an error that names the sample. `ahead`: how many indices there are, those of
  // later batches included, which a cache may make use of; 0: those of this batch.
  Status gather(const int64_t* indices, Session* session, int64_t ahead = 0);

  // The batch, as pk_session_run takes it.
  const char* const* names() const { return names_.data(); }
  const pk_tensor* tensors() const { return tensors_.data(); }
  int32_t count() const { return static_cast<int32_t>(tensors_.size()); }
  // The input's values in the batch, or null when there is none of this name and dtype.
  const int64_t* integers(const char* name) const;

 private:
  struct Column {
    const NumpyArray* array;  // null: from the cache
    bool per_sample;
    int64_t elements;              // of one sample, or of the whole array
    std::vector<uint64_t> buffer;  // the batch of integers; 8-byte elements for their alignment
    int encoding;                  // which of the cache
  };

  Status bind(const Program& program, const EntryRecord& entry);
  Status add_column(const Program& program, const EntryRecord& entry, const Argument& input);
  void push_column(Column column, const Tensor& type, const Argument& input);
  int encoding_of(const Program& program, const Argument& input) const;
  Status check_shape(const NumpyArray& array, const Tensor& type, bool per_sample,
                     const EntryRecord& entry) const;
  Status check_finite(const Column& column, const float* values, int64_t sample) const;
  std::string wanted(const Program& program, const EntryRecord& entry) const;

  std::shared_ptr<const Npz> file_;
  PrefixCache* cache_ = nullptr;
  const char* entry_ = nullptr;
  std::vector<Column> columns_;
  std::vector<const char*> names_;
  std::vector<pk_tensor> tensors_;
  int64_t samples_ = 0;
  int64_t batch_ = 0;
};

// The order of samples in an epoch: a permutation that depends on the seed and the epoch alone.
void shuffle(uint64_t seed, uint64_t epoch, std::vector<int64_t>* order);

// Sebastiano Vigna's splitmix64: the next of a sequence of 64-bit values.
uint64_t splitmix64(uint64_t* state);

}  // namespace pockc::cli

#endif  // POCKC_CLI_DATASET_H_
