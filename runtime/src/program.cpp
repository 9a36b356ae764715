// The file around the program: header, section table, checksums.
#include "program.h"

#include <algorithm>
#include <cstring>

#include "byte_reader.h"
#include "crc32.h"
#include "error.h"

namespace pockc {
namespace {

constexpr uint8_t kMagic[8] = {0x89, 'P', 'O', 'C', 'K', '\r', '\n', 0x1a};
constexpr uint64_t kHeaderBytes = 64;
constexpr uint64_t kSectionRecordBytes = 24;
constexpr uint32_t kMaxSections = 16;
constexpr uint64_t kMaxFileBytes = 1ull << 40;
constexpr uint64_t kPageBytes = 4096;

enum SectionId : uint32_t { kMetadata = 1, kProgram, kData, kGolden, kHalfArithmetic, kSectionIds };
constexpr const char* kSectionNames[kSectionIds] = {"",     "metadata", "program",
                                                    "data", "golden",   "half arithmetic"};

struct Sections {
  Bytes of[kSectionIds];
};

Status read_header(const char* path, Bytes file, uint32_t* section_count, uint8_t* hash) {
  if (file.size < kHeaderBytes || std::memcmp(file.data, kMagic, sizeof(kMagic)) != 0) {
    return fail(PK_BAD_FILE, "%s is not a .pock file (or the transfer changed its bytes)", path);
  }
  ByteReader reader(file.data + sizeof(kMagic), kHeaderBytes - sizeof(kMagic));
  const uint32_t version = reader.u32();
  *section_count = reader.u32();
  const uint64_t size = reader.u64();
  const uint32_t table_crc = reader.u32();
  const uint32_t header_crc = reader.u32();
  if (crc32(0, file.data, 28) != header_crc)
    return fail(PK_BAD_FILE, "%s: the header's checksum is wrong", path);
  if (version < 1 || version > kFormatVersion) {
    return fail(
        PK_BAD_FILE,
        "%s has format version %u, this runtime reads versions 1 to %u: rebuild the program, or update the "
        "runtime",
        path, version, kFormatVersion);
  }
  if (size > kMaxFileBytes)
    return fail(PK_BAD_FILE, "%s: the header is corrupt: the size is out of range", path);
  if (file.size != size) {
    return fail(PK_BAD_FILE, "%s is %s: it has %llu bytes, its header says %llu", path,
                file.size < size ? "truncated" : "too long", static_cast<unsigned long long>(file.size),
                static_cast<unsigned long long>(size));
  }
  if (*section_count < 1 || *section_count > kMaxSections ||
      file.size - kHeaderBytes < *section_count * kSectionRecordBytes) {
    return fail(PK_BAD_FILE, "%s: the section count is out of range", path);
  }
  if (crc32(0, file.data + kHeaderBytes, *section_count * kSectionRecordBytes) != table_crc) {
    return fail(PK_BAD_FILE, "%s: the section table's checksum is wrong", path);
  }
  std::memcpy(hash, file.data + 32, kHashBytes);
  return PK_OK;
}

// The CRC of a section. Its pages are given back as they are read: a file of weights would be resident as a
// whole otherwise, which may be more than a training step ever touches.
uint32_t checksum(const MappedFile& file, uint64_t offset, uint64_t size) {
  constexpr uint64_t kChunk = uint64_t{8} << 20;
  uint32_t crc = 0;
  for (uint64_t done = 0; done < size; done += kChunk) {
    crc = crc32(crc, file.data() + offset + done, std::min(kChunk, size - done));
    if (size > kChunk) file.drop_pages();
  }
  return crc;
}

Status read_sections(const char* path, const MappedFile& mapped, uint32_t section_count, Sections* sections) {
  const Bytes file{mapped.data(), mapped.size()};
  ByteReader reader(file.data + kHeaderBytes, section_count * kSectionRecordBytes);
  uint64_t previous_end = kHeaderBytes + section_count * kSectionRecordBytes;
  for (uint32_t i = 0; i < section_count; ++i) {
    const uint32_t id = reader.u32();
    const uint32_t crc = reader.u32();
    const uint64_t offset = reader.u64();
    const uint64_t size = reader.u64();
    const uint64_t alignment = id == kData ? kPageBytes : kAlignment;
    // In the order of the table, so that one comparison shows that sections do not overlap.
    if (offset % alignment != 0 || offset < previous_end || offset > file.size || size > file.size - offset) {
      return fail(PK_BAD_FILE, "%s: section %u is out of range", path, i);
    }
    previous_end = offset + size;
    if (id == 0 || id >= kSectionIds) continue;  // of a later minor version: not needed to run the program
    if (sections->of[id].data != nullptr)
      return fail(PK_BAD_FILE, "%s: two %s sections", path, kSectionNames[id]);
    if (checksum(mapped, offset, size) != crc) {
      return fail(PK_BAD_FILE,
                  "%s: the checksum of the %s section is wrong: the file is corrupt, copy it again", path,
                  kSectionNames[id]);
    }
    sections->of[id] = Bytes{file.data + offset, size};
  }
  return PK_OK;
}

}  // namespace

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "int64", "int32", "uint8", "bool",
                                    "bf16",    "q8",    "q4",    "f16",   "b16"};
  return kNames[static_cast<int>(dtype)];
}

Tensor StateRecord::original_type(const Tensor& stored) const {
  Tensor type = stored;
  type.data = nullptr;
  if (is_compact(stored.dtype)) type.dtype = DType::kF32;
  for (int axis = 0; axis < permutation_rank; ++axis) type.dims[permutation[axis]] = stored.dims[axis];
  return type;
}

const EntryRecord* Program::find_entry(const char* name) const {
  for (const EntryRecord& entry : entries) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

const StateRecord* Program::find_state(const char* name) const {
  for (const StateRecord& state : states) {
    if (state.name == name) return &state;
  }
  return nullptr;
}

const char* Program::metadata_text() const {
  std::call_once(metadata_copied_, [this] {
    metadata_copy_.assign(reinterpret_cast<const char*>(metadata.data), metadata.size);
  });
  return metadata_copy_.c_str();
}

namespace {

// Of the section that asks for arithmetic of 16-bit numbers, as FORMAT.md has it.
DType products_of(Bytes section) {
  uint32_t number = 0;
  if (section.data != nullptr && section.size == sizeof(number))
    std::memcpy(&number, section.data, sizeof(number));
  return number == 1 ? DType::kF16 : number == 2 ? DType::kB16 : DType::kF32;
}

}  // namespace

Status load_program(const char* path, Program* program) {
  POCKC_TRY(program->file.open(path));
  return read_program(path, program);
}

Status read_program(const char* path, Program* program) {
  const Bytes file{program->file.data(), program->file.size()};
  uint32_t section_count = 0;
  POCKC_TRY(read_header(path, file, &section_count, program->hash));
  Sections sections;
  POCKC_TRY(read_sections(path, program->file, section_count, &sections));
  if (sections.of[kProgram].data == nullptr) return fail(PK_BAD_FILE, "%s has no program section", path);
  const Bytes metadata = sections.of[kMetadata];
  if (metadata.data != nullptr) {
    if (std::memchr(metadata.data, 0, metadata.size) != nullptr) {
      return fail(PK_BAD_FILE, "%s: the metadata section is not JSON text", path);
    }
    program->metadata = metadata;
  }
  program->data = sections.of[kData];
  program->golden = sections.of[kGolden];
  program->half_arithmetic = products_of(sections.of[kHalfArithmetic]);
  POCKC_TRY(read_program_section(sections.of[kProgram], program));
  POCKC_TRY(check_program(*program));
  program->file.drop_pages();  // the checks have read more than training touches
  return PK_OK;
}

}  // namespace pockc
