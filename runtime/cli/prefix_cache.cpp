#include "prefix_cache.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32.h"
#include "error.h"

namespace pockc::cli {
namespace {

// Fowler, Noll and Vo's hash of 64 bits.
class Fingerprint {
 public:
  void add(uint64_t value) {
    for (int shift = 0; shift < 64; shift += 8) mix(static_cast<uint8_t>(value >> shift));
  }
  void add(const std::string& text) {
    add(text.size());
    for (const char c : text) mix(static_cast<uint8_t>(c));
  }
  uint64_t value() const { return hash_; }

 private:
  void mix(uint8_t byte) { hash_ = (hash_ ^ byte) * 0x100000001B3ull; }
  uint64_t hash_ = 0xCBF29CE484222325ull;
};

// A tensor by its type and, where it is in the file, its contents: where it lies changes with every build.
void add_operand(const Program& program, const TensorRecord& tensor, Fingerprint* out) {
  out->add(static_cast<uint64_t>(tensor.type.dtype));
  out->add(static_cast<uint64_t>(tensor.type.rank));
  for (int axis = 0; axis < tensor.type.rank; ++axis) out->add(static_cast<uint64_t>(tensor.type.dims[axis]));
  if (tensor.storage == Storage::kData)
    out->add(crc32(0, program.data.data + tensor.offset, static_cast<size_t>(tensor.bytes)));
}

// All that an entry computes: calls, the tensors that they read and write, and which of them are the same.
void add_entry(const Program& program, const EntryRecord& entry, Fingerprint* out) {
  std::vector<uint32_t> numbers(program.tensors.size(), 0);
  uint32_t known = 0;
  const auto add_tensor = [&](uint32_t tensor) {
    if (numbers[tensor] == 0) {
      numbers[tensor] = ++known;
      add_operand(program, program.tensors[tensor], out);
    }
    out->add(numbers[tensor]);
  };
  for (const Argument& input : entry.inputs) {
    out->add(input.name);
    add_tensor(input.tensor);
  }
  for (const CallRecord& call : entry.calls) {
    out->add(program.strings[call.op]);
    for (const uint32_t tensor : entry.inputs_of(call)) add_tensor(tensor);
    for (const uint32_t tensor : entry.outputs_of(call)) add_tensor(tensor);
    for (const int64_t value : Span<int64_t>(entry.ints, call.ints)) out->add(static_cast<uint64_t>(value));
    for (const double value : Span<double>(entry.floats, call.floats)) {
      uint64_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      out->add(bits);
    }
  }
  for (const Argument& output : entry.outputs) add_tensor(output.tensor);
}

// Whether training changes what the entry reads: then nothing of it can be kept.
bool reads_states(const Program& program, const EntryRecord& entry) {
  return std::any_of(entry.operands.begin(), entry.operands.end(), [&](uint32_t index) {
    const TensorRecord& tensor = program.tensors[index];
    return tensor.storage == Storage::kArena && tensor.offset < program.state_bytes;
  });
}

}  // namespace

const EntryRecord* encoded_entry(const Program& program, const EntryRecord& entry) {
  return program.find_entry((entry.name + "_encoded").c_str());
}

uint64_t PrefixCache::fingerprint(const Program& program) const {
  Fingerprint print;
  print.add(std::string(pk_version()));
  print.add(std::string(best_isa()));  // numbers differ where there is no fused multiply-add
  const char* products = half_arithmetic(program.half_arithmetic);
  print.add(std::string(products == nullptr ? "" : products));
  print.add(static_cast<uint64_t>(how_));
  add_entry(program, *entry_, &print);
  print.add(inputs_.digest());
  program.file.drop_pages();
  return print.value();
}

void PrefixCache::add_field(const Output& output) {
  const DType dtype = static_cast<DType>(output.tensor.dtype);
  int64_t elements = 1;
  for (int axis = 0; axis < output.tensor.rank; ++axis) elements *= output.tensor.dims[axis];
  elements /= inputs_.batch_size();
  const uint64_t bytes = stored_bytes(how_, dtype, elements);
  fields_.push_back(Field{dtype, elements, record_bytes_, bytes});
  record_bytes_ += bytes;
}

Status PrefixCache::open(const std::string& path, const std::string& data, const Model& model,
                         uint64_t* room) {
  entry_ = model.entry("encode");
  if (entry_ == nullptr) return PK_NOT_FOUND;
  if (reads_states(model.program, *entry_))
    return fail(PK_BAD_FILE, "`encode` of this program reads what training changes: it cannot be cached");
  POCKC_TRY(inputs_.open(data, model.program, *entry_));
  for (const Argument& argument : entry_->outputs) {
    outputs_.emplace_back(model.program, argument);
    const pk_tensor& tensor = outputs_.back().tensor;
    if (tensor.rank == 0 || tensor.dims[0] % inputs_.batch_size() != 0)
      return fail(PK_BAD_FILE, "output `%s` of `encode` is not per sample", outputs_.back().name);
    add_field(outputs_.back());
  }
  batch_.resize(record_bytes_ * static_cast<size_t>(inputs_.batch_size()));
  fresh_.resize(batch_.size());
  POCKC_TRY(file_.open(path, {fingerprint(model.program), inputs_.samples(), record_bytes_}, *room));
  *room -= file_.most_bytes();
  return PK_OK;
}

bool PrefixCache::take_fresh(int64_t sample, uint8_t* record) const {
  const auto found = std::find(fresh_samples_.begin(), fresh_samples_.end(), sample);
  if (found == fresh_samples_.end()) return false;
  std::memcpy(record, fresh_.data() + record_bytes_ * static_cast<size_t>(found - fresh_samples_.begin()),
              record_bytes_);
  return true;
}

// Samples are encoded in the order in which they are wanted, so that whenever one is missing all that were
// encoded ahead have been used: their memory can be taken for the next ones.
Status PrefixCache::fetch(const int64_t* indices, int64_t ahead, Session* session) {
  const int64_t batch = inputs_.batch_size();
  std::vector<int64_t> missing;
  const auto add_missing = [&](int64_t sample) {
    if (std::find(missing.begin(), missing.end(), sample) == missing.end()) missing.push_back(sample);
  };
  for (int64_t i = 0; i < batch; ++i) {
    if (take_fresh(indices[i], batch_record(i))) continue;
    if (file_.read(indices[i], batch_record(i))) {
      ++read_;
    } else {
      add_missing(indices[i]);
    }
  }
  if (missing.empty()) return PK_OK;
  const size_t needed = missing.size();
  for (int64_t i = batch; i < ahead && static_cast<int64_t>(missing.size()) < batch; ++i) {
    if (!file_.has(indices[i])) add_missing(indices[i]);
  }
  fresh_samples_ = missing;
  POCKC_TRY(encode(session));
  missing.resize(needed);
  for (int64_t i = 0; i < batch; ++i) {
    if (std::find(missing.begin(), missing.end(), indices[i]) != missing.end())
      take_fresh(indices[i], batch_record(i));
  }
  return PK_OK;
}

// The fresh samples; a batch that they do not fill has the first of them again.
Status PrefixCache::encode(Session* session) {
  std::vector<int64_t> indices = fresh_samples_;
  indices.resize(static_cast<size_t>(inputs_.batch_size()), fresh_samples_[0]);
  std::vector<const char*> names;
  std::vector<pk_tensor> tensors;
  for (const Output& output : outputs_) {
    names.push_back(output.name);
    tensors.push_back(output.tensor);
  }
  // Until the run is done these are records of nothing.
  std::vector<int64_t> samples;
  samples.swap(fresh_samples_);
  POCKC_TRY(inputs_.gather(indices.data(), session));
  POCKC_TRY(session->run(entry_->name.c_str(), inputs_.names(), inputs_.tensors(), inputs_.count(),
                         names.data(), tensors.data(), static_cast<int32_t>(tensors.size())));
  for (size_t i = 0; i < samples.size(); ++i) {
    uint8_t* record = fresh_.data() + record_bytes_ * i;
    for (size_t k = 0; k < fields_.size(); ++k) {
      const Field& field = fields_[k];
      const size_t bytes = static_cast<size_t>(field.elements) * dtype_size(field.dtype);
      store(how_, field.dtype, field.elements, static_cast<const uint8_t*>(tensors[k].data) + bytes * i,
            record + field.offset);
    }
    file_.write(samples[i], record);
  }
  encoded_ += static_cast<int64_t>(samples.size());
  fresh_samples_.swap(samples);
  return PK_OK;
}

int PrefixCache::find(const std::string& name, const Tensor& type) const {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const pk_tensor& tensor = outputs_[i].tensor;
    if (name != outputs_[i].name || static_cast<DType>(tensor.dtype) != type.dtype ||
        tensor.rank != type.rank)
      continue;
    if (std::equal(type.dims, type.dims + type.rank, tensor.dims)) return static_cast<int>(i);
  }
  return -1;
}

void PrefixCache::copy(int output, void* to) const {
  const Field& field = fields_[static_cast<size_t>(output)];
  const size_t bytes = static_cast<size_t>(field.elements) * dtype_size(field.dtype);
  for (size_t i = 0; i < static_cast<size_t>(inputs_.batch_size()); ++i) {
    restore(how_, field.dtype, field.elements, batch_.data() + record_bytes_ * i + field.offset,
            static_cast<uint8_t*>(to) + bytes * i);
  }
}

Status PrefixCaches::open(const Options& options, const Model& model) {
  if (options.cache_prefix.empty()) return PK_OK;
  if (model.program.find_entry("encode") == nullptr ||
      model.program.find_entry("train_step_encoded") == nullptr)
    return fail(PK_UNSUPPORTED,
                "this program cannot start behind its frozen prefix: build it with --cache-prefix");
  if (mkdir(options.cache_prefix.c_str(), 0755) != 0 && errno != EEXIST)
    return fail(PK_IO_ERROR, "cannot make the directory %s: %s", options.cache_prefix.c_str(),
                std::strerror(errno));
  options_ = &options;
  room_ = options.cache_bytes;
  how_ = options.cache_dtype == "f16"    ? CacheDType::kF16
         : options.cache_dtype == "int8" ? CacheDType::kInt8
                                         : CacheDType::kF32;
  return PK_OK;
}

Status PrefixCaches::bind(const char* name, const std::string& path, const Model& model,
                          const EntryRecord** entry, Dataset* data) {
  const EntryRecord* behind = options_ == nullptr ? nullptr : encoded_entry(model.program, **entry);
  if (behind == nullptr) return data->open(path, model.program, **entry);
  const std::string file = options_->cache_prefix + "/" + name + ".cache";
  caches_.emplace_back(new PrefixCache(*options_->file_system, how_));
  POCKC_TRY(caches_.back()->open(file, path, model, &room_));
  *entry = behind;
  return data->start_behind(caches_.back().get(), model.program, *behind);
}

void PrefixCaches::describe(JsonObject* report) const {
  if (options_ == nullptr) return;
  int64_t encoded = 0, read = 0;
  uint64_t written = 0;
  for (const auto& cache : caches_) {
    encoded += cache->encoded();
    read += cache->read();
    written += cache->written_bytes();
  }
  report->add("cache_encoded_samples", encoded).add("cache_read_samples", read);
  report->add("cache_written_bytes", static_cast<int64_t>(written));
}

}  // namespace pockc::cli
