#include "dataset.h"

#include <cinttypes>
#include <cmath>
#include <cstring>

#include "error.h"
#include "prefix_cache.h"

namespace pockc::cli {
namespace {

template <typename From, typename To>
void convert(const uint8_t* from, int64_t count, void* to) {
  To* out = static_cast<To*>(to);
  for (int64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(From)), sizeof(From));
    out[i] = static_cast<To>(value);
  }
}

using Convert = void (*)(const uint8_t* from, int64_t count, void* to);

// How an array becomes an input, or null when it cannot without a loss that the user should decide on.
Convert find_conversion(NumpyType from, DType to) {
  static const struct {
    NumpyType from;
    DType to;
    Convert convert;
  } kConversions[] = {
      {NumpyType::kF32, DType::kF32, convert<float, float>},
      {NumpyType::kF64, DType::kF32, convert<double, float>},
      {NumpyType::kU8, DType::kF32, convert<uint8_t, float>},
      {NumpyType::kI64, DType::kI64, convert<int64_t, int64_t>},
      {NumpyType::kI32, DType::kI64, convert<int32_t, int64_t>},
      {NumpyType::kU8, DType::kI64, convert<uint8_t, int64_t>},
      {NumpyType::kI32, DType::kI32, convert<int32_t, int32_t>},
      {NumpyType::kU8, DType::kU8, convert<uint8_t, uint8_t>},
      {NumpyType::kBool, DType::kBool, convert<uint8_t, uint8_t>},
  };
  for (const auto& row : kConversions) {
    if (row.from == from && row.to == to) return row.convert;
  }
  return nullptr;
}

}  // namespace

uint64_t splitmix64(uint64_t* state) {
  uint64_t z = (*state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void shuffle(uint64_t seed, uint64_t epoch, std::vector<int64_t>* order) {
  uint64_t state = seed;
  state = splitmix64(&state) + epoch;
  for (size_t i = 0; i < order->size(); ++i) (*order)[i] = static_cast<int64_t>(i);
  // Fisher-Yates; the modulo's bias is below 2^-30 for any number of samples that fits into memory.
  for (size_t i = order->size(); i > 1; --i) std::swap((*order)[i - 1], (*order)[splitmix64(&state) % i]);
}

Status Dataset::open(const std::string& path, const Program& program, const EntryRecord& entry) {
  const auto file = std::make_shared<Npz>();
  POCKC_TRY(file->open(path));
  file_ = file;
  return bind(program, entry);
}

Status Dataset::share(const Dataset& other, const Program& program, const EntryRecord& entry) {
  file_ = other.file_;
  cache_ = other.cache_;
  batch_ = other.batch_;
  return bind(program, entry);
}

Status Dataset::start_behind(PrefixCache* cache, const Program& program, const EntryRecord& entry) {
  file_ = cache->inputs().file_;
  cache_ = cache;
  batch_ = cache->inputs().batch_;
  samples_ = cache->inputs().samples_;
  return bind(program, entry);
}

Status Dataset::bind(const Program& program, const EntryRecord& entry) {
  entry_ = entry.name.c_str();
  for (const Argument& input : entry.inputs) {
    const Tensor& type = program.tensors[input.tensor].type;
    if (type.rank == 0 || batch_ != 0) continue;
    batch_ = type.dims[0];
  }
  columns_.reserve(entry.inputs.size());
  for (const Argument& input : entry.inputs) POCKC_TRY(add_column(program, entry, input));
  if (samples_ == 0) return fail(PK_INVALID_ARGUMENT, "%s holds no samples", file_->path().c_str());
  return PK_OK;
}

std::string Dataset::wanted(const Program& program, const EntryRecord& entry) const {
  std::string text;
  for (const Argument& input : entry.inputs) {
    if (encoding_of(program, input) >= 0) continue;
    const Tensor& type = program.tensors[input.tensor].type;
    text += (text.empty() ? "" : ", ") + input.name + " " + dtype_name(type.dtype) +
            ShapeText(type.rank, type.dims).text;
  }
  text += " (first axis: the batch of " + std::to_string(batch_) + "); the file has ";
  if (file_->arrays().empty()) text += "no arrays";
  for (size_t i = 0; i < file_->arrays().size(); ++i) {
    text += (i == 0 ? "" : ", ") + file_->arrays()[i].name + " " + file_->arrays()[i].describe();
  }
  return text;
}

Status Dataset::check_shape(const NumpyArray& array, const Tensor& type, bool per_sample,
                            const EntryRecord& entry) const {
  bool same = static_cast<int32_t>(array.shape.size()) == type.rank;
  for (int axis = per_sample ? 1 : 0; same && axis < type.rank; ++axis)
    same = array.shape[axis] == type.dims[axis];
  if (same) return PK_OK;
  std::string want = ShapeText(type.rank, type.dims).text;
  if (per_sample) want = "[samples" + (type.rank == 1 ? "]" : want.substr(want.find(',')));
  const std::string has = array.describe();
  return fail(PK_TYPE_MISMATCH, "%s: `%s` has shape %s, `%s` of this program wants %s", file_->path().c_str(),
              array.name.c_str(), has.substr(has.find('[')).c_str(), entry.name.c_str(), want.c_str());
}

Status Dataset::add_column(const Program& program, const EntryRecord& entry, const Argument& input) {
  const Tensor& type = program.tensors[input.tensor].type;
  const int encoding = encoding_of(program, input);
  if (encoding >= 0) {
    push_column(Column{nullptr, true, type.elements() / batch_, {}, encoding}, type, input);
    return PK_OK;
  }
  const char* path = file_->path().c_str();
  const NumpyArray* array = file_->find(input.name);
  if (array == nullptr) {
    return fail(PK_NOT_FOUND, "%s has no array `%s`; the program wants %s", path, input.name.c_str(),
                wanted(program, entry).c_str());
  }
  const bool per_sample = type.rank > 0 && type.dims[0] == batch_;
  POCKC_TRY(check_shape(*array, type, per_sample, entry));
  if (find_conversion(array->type, type.dtype) == nullptr) {
    return fail(PK_TYPE_MISMATCH,
                "%s: `%s` has dtype %s, the program wants %s: convert it with .astype(\"%s\")", path,
                array->name.c_str(), numpy_type_name(array->type), dtype_name(type.dtype),
                dtype_name(type.dtype));
  }
  if (per_sample && samples_ != 0 && array->shape[0] != samples_) {
    return fail(PK_TYPE_MISMATCH, "%s: `%s` has %" PRId64 " samples, the arrays before it have %" PRId64,
                path, array->name.c_str(), array->shape[0], samples_);
  }
  if (per_sample) samples_ = array->shape[0];
  push_column(Column{array, per_sample, per_sample ? type.elements() / batch_ : type.elements(), {}, -1},
              type, input);
  return PK_OK;
}

void Dataset::push_column(Column column, const Tensor& type, const Argument& input) {
  if (type.dtype != DType::kF32)
    column.buffer.resize(static_cast<size_t>(type.elements()) * dtype_size(type.dtype) / 8 + 1);
  columns_.push_back(std::move(column));
  pk_tensor tensor{columns_.back().buffer.data(), static_cast<pk_dtype>(type.dtype), type.rank, {}};
  std::memcpy(tensor.dims, type.dims, sizeof(tensor.dims));
  tensors_.push_back(tensor);
  names_.push_back(input.name.c_str());
}

int Dataset::encoding_of(const Program& program, const Argument& input) const {
  return cache_ == nullptr ? -1 : cache_->find(input.name, program.tensors[input.tensor].type);
}

std::string Dataset::digest() const {
  std::string text;
  for (const Column& column : columns_) {
    if (column.array == nullptr) continue;
    text +=
        column.array->name + " " + column.array->describe() + " " + std::to_string(column.array->crc) + "\n";
  }
  return text;
}

Status Dataset::check_finite(const Column& column, const float* values, int64_t sample) const {
  for (int64_t i = 0; i < column.elements; ++i) {
    if (std::isfinite(values[i])) continue;
    const char* what = std::isnan(values[i]) ? "NaN" : "an infinite value";
    return fail(PK_INVALID_ARGUMENT, "%s: `%s` holds %s in sample %" PRId64 ": clean the data",
                file_->path().c_str(), column.array->name.c_str(), what, sample);
  }
  return PK_OK;
}

Status Dataset::gather(const int64_t* indices, Session* session, int64_t ahead) {
  if (cache_ != nullptr) POCKC_TRY(cache_->fetch(indices, ahead, session));
  for (size_t c = 0; c < columns_.size(); ++c) {
    Column& column = columns_[c];
    const DType dtype = static_cast<DType>(tensors_[c].dtype);
    if (dtype == DType::kF32) POCKC_TRY(session->input(entry_, names_[c], &tensors_[c]));
    if (column.array == nullptr) {
      cache_->copy(column.encoding, tensors_[c].data);
      continue;
    }
    const Convert convert = find_conversion(column.array->type, dtype);
    const int64_t sample_bytes = column.elements * static_cast<int64_t>(numpy_type_size(column.array->type));
    const int64_t step = column.elements * static_cast<int64_t>(dtype_size(dtype));
    uint8_t* out = static_cast<uint8_t*>(tensors_[c].data);
    for (int64_t i = 0; i < (column.per_sample ? batch_ : 1); ++i, out += step) {
      const int64_t sample = column.per_sample ? indices[i] : 0;
      convert(column.array->data + sample * sample_bytes, column.elements, out);
      if (dtype == DType::kF32) POCKC_TRY(check_finite(column, reinterpret_cast<const float*>(out), sample));
    }
  }
  return PK_OK;
}

const int64_t* Dataset::integers(const char* name) const {
  for (size_t c = 0; c < columns_.size(); ++c) {
    if (std::strcmp(names_[c], name) == 0 && tensors_[c].dtype == PK_I64)
      return static_cast<const int64_t*>(tensors_[c].data);
  }
  return nullptr;
}

}  // namespace pockc::cli
