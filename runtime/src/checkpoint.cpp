// Checkpoints: every mutable state in a safetensors file, under its own name and in the user's layout.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "crc32.h"
#include "error.h"
#include "json.h"
#include "permuted_view.h"
#include "safetensors.h"
#include "session.h"

namespace pockc {
namespace {

constexpr const char* kFormat = "pockc-checkpoint-1";
constexpr size_t kBufferBytes = 64 * 1024;

std::string hex(const uint8_t* bytes, size_t size) {
  std::string out;
  char pair[3];
  for (size_t i = 0; i < size; ++i) {
    std::snprintf(pair, sizeof(pair), "%02x", bytes[i]);
    out += pair;
  }
  return out;
}

// Calls consume(data, size) for the contents of all views in their order, a buffer at a time.
template <typename Consume>
Status stream(const std::vector<PermutedView>& views, Consume consume) {
  std::vector<unsigned char> buffer(kBufferBytes);
  for (const PermutedView& view : views) {
    const int64_t step = static_cast<int64_t>(kBufferBytes / view.element_size());
    for (int64_t begin = 0; begin < view.elements(); begin += step) {
      const int64_t rest = view.elements() - begin;
      const int64_t count = rest < step ? rest : step;
      view.gather(begin, count, buffer.data());
      POCKC_TRY(consume(buffer.data(), static_cast<size_t>(count) * view.element_size()));
    }
  }
  return PK_OK;
}

Status check_metadata(const char* path, const SafetensorsFile& file, const Program& program) {
  const std::string* format = file.find_metadata("format");
  const std::string* hash = file.find_metadata("model_hash");
  const std::string* crc = file.find_metadata("crc32");
  if (format == nullptr || *format != kFormat || hash == nullptr || crc == nullptr) {
    return fail(PK_BAD_FILE, "%s is not a checkpoint of this version (format %s)", path, kFormat);
  }
  const std::string wanted = hex(program.hash, kHashBytes);
  if (*hash != wanted) {
    return fail(
        PK_WRONG_MODEL,
        "%s is a checkpoint of another program (model hash %.12s, this program's is %.12s): load it into the "
        "program that it was saved from",
        path, hash->c_str(), wanted.c_str());
  }
  if (*crc != std::to_string(crc32(0, file.data.data, file.data.size))) {
    return fail(PK_BAD_FILE, "%s: the checksum of the data is wrong: the file is corrupt", path);
  }
  return PK_OK;
}

Status check_item(const char* path, const StateRecord& state, const Tensor& wanted,
                  const SafetensorsFile::Item* item) {
  if (item == nullptr) return fail(PK_BAD_FILE, "%s lacks the state `%s`", path, state.name.c_str());
  bool same = item->type.dtype == wanted.dtype && item->type.rank == wanted.rank;
  for (int axis = 0; same && axis < wanted.rank; ++axis) same = item->type.dims[axis] == wanted.dims[axis];
  if (same) return PK_OK;
  const ShapeText has(item->type.rank, item->type.dims);
  const ShapeText wants(wanted.rank, wanted.dims);
  return fail(PK_BAD_FILE, "%s: state `%s` is %s%s, the program wants %s%s", path, state.name.c_str(),
              dtype_name(item->type.dtype), has.text, dtype_name(wanted.dtype), wants.text);
}

// The counter of micro-steps, 0 to `accumulation` - 1.
bool parse_micro_step(const std::string* text, uint32_t accumulation, uint32_t* out) {
  if (text == nullptr || text->empty() || text->size() > 9) return false;
  for (const char c : *text) {
    if (c < '0' || c > '9') return false;
  }
  *out = static_cast<uint32_t>(std::strtoul(text->c_str(), nullptr, 10));
  return *out < accumulation;
}

}  // namespace

Status Session::save(const char* path, const char* cursor_json) const {
  const std::string cursor = cursor_json == nullptr ? "null" : cursor_json;
  Json unused;
  if (!parse_json(cursor.data(), cursor.size(), &unused)) {
    return fail(PK_INVALID_ARGUMENT, "the cursor is not JSON");
  }
  std::vector<SafetensorsFile::Item> items;
  std::vector<PermutedView> views;
  // Wide elements first, so that every tensor is aligned in the file.
  for (const size_t size : {8, 4, 1}) {
    for (const StateRecord& state : program_->states) {
      const TensorRecord& tensor = program_->tensors[state.tensor];
      if (!state.is_mutable || dtype_size(tensor.type.dtype) != size) continue;
      items.push_back(SafetensorsFile::Item{state.name, state.original_type(tensor.type), tensor.bytes});
      views.emplace_back(state, tensors_[state.tensor]);
    }
  }
  uint32_t crc = 0;
  POCKC_TRY(stream(views, [&](const void* data, size_t size) {
    crc = crc32(crc, data, size);
    return PK_OK;
  }));
  const std::string header = safetensors_header({{"format", kFormat},
                                                 {"model_hash", hex(program_->hash, kHashBytes)},
                                                 {"crc32", std::to_string(crc)},
                                                 {"micro_step", std::to_string(micro_step_)},
                                                 {"cursor", cursor}},
                                                items);
  AtomicWriter writer(*file_system_);
  POCKC_TRY(writer.open(path));
  POCKC_TRY(writer.write(header.data(), header.size()));
  POCKC_TRY(stream(views, [&](const void* data, size_t size) { return writer.write(data, size); }));
  return writer.commit();
}

Status Session::load(const char* path) {
  MappedFile mapping;
  POCKC_TRY(mapping.open(path));
  return load_bytes(path, Bytes{mapping.data(), mapping.size()});
}

Status Session::load_bytes(const char* path, Bytes bytes) {
  SafetensorsFile file;
  POCKC_TRY(read_safetensors(path, bytes, &file));
  POCKC_TRY(check_metadata(path, file, *program_));
  uint32_t micro_step = 0;
  const std::string* cursor = file.find_metadata("cursor");
  if (cursor == nullptr ||
      !parse_micro_step(file.find_metadata("micro_step"), program_->accumulation, &micro_step)) {
    return fail(PK_BAD_FILE, "%s: the position in the training run is missing or out of range", path);
  }
  for (const StateRecord& state : program_->states) {
    if (!state.is_mutable) continue;
    const Tensor wanted = state.original_type(program_->tensors[state.tensor].type);
    POCKC_TRY(check_item(path, state, wanted, file.find(state.name)));
  }
  // Nothing can fail from here on.
  for (const StateRecord& state : program_->states) {
    if (!state.is_mutable) continue;
    const PermutedView view(state, tensors_[state.tensor]);
    view.scatter(0, view.elements(), file.find(state.name)->type.data);
  }
  micro_step_ = micro_step;
  cursor_ = *cursor;
  return PK_OK;
}

}  // namespace pockc
