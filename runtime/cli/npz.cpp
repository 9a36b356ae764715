#include "npz.h"

#include <cinttypes>
#include <cstdlib>
#include <cstring>
#include <new>

#include "crc32.h"
#include "error.h"
#include "inflate.h"

namespace pockc::cli {
namespace {

constexpr uint32_t kEndSignature = 0x06054b50, kEnd64LocatorSignature = 0x07064b50,
                   kEnd64Signature = 0x06064b50;
constexpr uint32_t kMemberSignature = 0x02014b50, kLocalSignature = 0x04034b50;
constexpr uint64_t kEndBytes = 22, kEnd64LocatorBytes = 20, kEnd64Bytes = 56, kMemberBytes = 46,
                   kLocalBytes = 30;
constexpr uint64_t kMaxArrayBytes = 1ull << 40;

template <typename T>
T load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

struct Directory {
  uint64_t offset = 0;
  uint64_t size = 0;
  uint64_t count = 0;
};

// The end record is the last thing in the file but for a comment of up to 65535 bytes.
bool find_directory(Bytes file, Directory* out) {
  if (file.size < kEndBytes) return false;
  const uint64_t first = file.size > kEndBytes + 0xFFFF ? file.size - kEndBytes - 0xFFFF : 0;
  uint64_t at = file.size - kEndBytes;
  while (load<uint32_t>(file.data + at) != kEndSignature) {
    if (at == first) return false;
    --at;
  }
  const uint8_t* end = file.data + at;
  *out = Directory{load<uint32_t>(end + 16), load<uint32_t>(end + 12), load<uint16_t>(end + 10)};
  const bool has_locator =
      at >= kEnd64LocatorBytes && load<uint32_t>(end - kEnd64LocatorBytes) == kEnd64LocatorSignature;
  if (has_locator) {
    const uint64_t record = load<uint64_t>(end - kEnd64LocatorBytes + 8);
    if (record > file.size || file.size - record < kEnd64Bytes) return false;
    const uint8_t* end64 = file.data + record;
    if (load<uint32_t>(end64) != kEnd64Signature) return false;
    *out = Directory{load<uint64_t>(end64 + 48), load<uint64_t>(end64 + 40), load<uint64_t>(end64 + 32)};
  }
  return out->offset <= file.size && out->size <= file.size - out->offset;
}

// The text between `key':` and the next item of the header's dictionary.
bool header_value(const std::string& header, const char* key, std::string* out) {
  const std::string quoted = std::string("'") + key + "'";
  const size_t at = header.find(quoted);
  if (at == std::string::npos) return false;
  size_t begin = header.find_first_not_of(" :", at + quoted.size());
  if (begin == std::string::npos) return false;
  const char close = header[begin] == '(' ? ')' : header[begin] == '\'' ? '\'' : ',';
  const size_t end = header.find(close, begin + 1);
  if (end == std::string::npos) return false;
  *out = header.substr(begin, end - begin);
  return true;
}

bool parse_shape(const std::string& text, std::vector<int64_t>* shape) {
  const char* next = text.c_str() + 1;  // after the parenthesis
  while (*next != '\0') {
    if (*next == ' ' || *next == ',') {
      ++next;
      continue;
    }
    if (*next < '0' || *next > '9' || shape->size() == kMaxRank) return false;
    char* end = nullptr;
    const long long size = std::strtoll(next, &end, 10);
    if (size < 0 || static_cast<uint64_t>(size) > kMaxArrayBytes) return false;
    shape->push_back(size);
    next = end;
  }
  return true;
}

bool parse_type(const std::string& text, NumpyType* type) {
  static const struct {
    const char* name;
    NumpyType type;
  } kTypes[] = {{"<f4", NumpyType::kF32}, {"<f8", NumpyType::kF64}, {"<i8", NumpyType::kI64},
                {"<i4", NumpyType::kI32}, {"|u1", NumpyType::kU8},  {"|b1", NumpyType::kBool}};
  for (const auto& row : kTypes) {
    if (text != row.name) continue;
    *type = row.type;
    return true;
  }
  return false;
}

}  // namespace

struct Npz::Member {
  std::string name;
  uint16_t flags;
  uint16_t method;  // 0 stored, 8 deflate
  uint32_t crc;
  uint64_t packed_size;
  uint64_t size;
  uint64_t local_offset;

  // 64-bit values stand in an extra field where the 32-bit ones are all ones.
  bool read_extra(const uint8_t* extra, size_t size_left) {
    uint64_t* const wanted[] = {&size, &packed_size, &local_offset};
    while (size_left >= 4) {
      const uint16_t id = load<uint16_t>(extra);
      const uint16_t length = load<uint16_t>(extra + 2);
      if (length > size_left - 4) return false;
      if (id == 1) {
        size_t used = 0;
        for (uint64_t* value : wanted) {
          if (*value != 0xFFFFFFFF) continue;
          if (length - used < 8) return false;
          *value = load<uint64_t>(extra + 4 + used);
          used += 8;
        }
      }
      extra += 4 + length;
      size_left -= 4u + length;
    }
    return true;
  }
};

const char* numpy_type_name(NumpyType type) {
  static const char* const kNames[] = {"float32", "float64", "int64", "int32", "uint8", "bool"};
  return kNames[static_cast<int>(type)];
}

size_t numpy_type_size(NumpyType type) {
  static const size_t kSizes[] = {4, 8, 8, 4, 1, 1};
  return kSizes[static_cast<int>(type)];
}

std::string NumpyArray::describe() const {
  std::string text = std::string(numpy_type_name(type)) + "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ",") + std::to_string(shape[i]);
  return text + "]";
}

const NumpyArray* Npz::find(const std::string& name) const {
  for (const NumpyArray& array : arrays_) {
    if (array.name == name) return &array;
  }
  return nullptr;
}

Status Npz::open(const std::string& path) {
  path_ = path;
  POCKC_TRY(file_.open(path.c_str()));
  return read();
}

Status Npz::open_bytes(const std::string& what, Bytes bytes) {
  path_ = what;
  file_.borrow(bytes.data, bytes.size);
  return read();
}

Status Npz::read() {
  std::vector<Member> members;
  POCKC_TRY(read_directory(&members));
  for (const Member& member : members) {
    Bytes bytes;
    POCKC_TRY(locate(member, &bytes));
    if (member.method != 0) POCKC_TRY(expand(member, bytes, &bytes));
    if (crc32(0, bytes.data, bytes.size) != member.crc) {
      return fail(PK_BAD_FILE, "%s: the checksum of `%s` is wrong: the file is corrupt", path_.c_str(),
                  member.name.c_str());
    }
    POCKC_TRY(read_array(member, bytes));
  }
  file_.drop_pages();
  return PK_OK;
}

Status Npz::read_directory(std::vector<Member>* members) const {
  Directory directory;
  if (!find_directory(Bytes{file_.data(), file_.size()}, &directory)) {
    return fail(PK_BAD_FILE, "%s is cut off or not an .npz file: write it with numpy.savez", path_.c_str());
  }
  const uint8_t* next = file_.data() + directory.offset;
  uint64_t left = directory.size;
  for (uint64_t i = 0; i < directory.count; ++i) {
    if (left < kMemberBytes || load<uint32_t>(next) != kMemberSignature) {
      return fail(PK_BAD_FILE, "%s: the archive's directory is corrupt", path_.c_str());
    }
    const size_t name_size = load<uint16_t>(next + 28), extra_size = load<uint16_t>(next + 30);
    const size_t total = kMemberBytes + name_size + extra_size + load<uint16_t>(next + 32);
    Member member{};
    if (total <= left) {
      member.name.assign(reinterpret_cast<const char*>(next) + kMemberBytes, name_size);
      member.flags = load<uint16_t>(next + 8);
      member.method = load<uint16_t>(next + 10);
      member.crc = load<uint32_t>(next + 16);
      member.packed_size = load<uint32_t>(next + 20);
      member.size = load<uint32_t>(next + 24);
      member.local_offset = load<uint32_t>(next + 42);
    }
    if (total > left || !member.read_extra(next + kMemberBytes + name_size, extra_size)) {
      return fail(PK_BAD_FILE, "%s: the archive's directory is corrupt", path_.c_str());
    }
    next += total;
    left -= total;
    members->push_back(std::move(member));
  }
  return PK_OK;
}

// The packed bytes of a member: behind its local header, whose name and extra field may have other lengths.
Status Npz::locate(const Member& member, Bytes* out) const {
  const char* name = member.name.c_str();
  if ((member.flags & 1) != 0 || (member.method != 0 && member.method != 8)) {
    return fail(PK_BAD_FILE, "%s: `%s` is encrypted or packed in an unknown way: write it with numpy.savez",
                path_.c_str(), name);
  }
  const uint64_t size = file_.size();
  if (member.local_offset > size || size - member.local_offset < kLocalBytes) {
    return fail(PK_BAD_FILE, "%s: `%s` is cut off", path_.c_str(), name);
  }
  const uint8_t* local = file_.data() + member.local_offset;
  const uint64_t head = kLocalBytes + load<uint16_t>(local + 26) + load<uint16_t>(local + 28);
  const uint64_t left = size - member.local_offset;
  const bool bad_size = member.method == 0 && member.packed_size != member.size;
  if (load<uint32_t>(local) != kLocalSignature || head > left || member.packed_size > left - head ||
      bad_size) {
    return fail(PK_BAD_FILE, "%s: `%s` is cut off", path_.c_str(), name);
  }
  *out = Bytes{local + head, member.packed_size};
  return PK_OK;
}

Status Npz::expand(const Member& member, Bytes packed, Bytes* out) {
  const char* name = member.name.c_str();
  // Deflate cannot expand by more than a factor of 1032: a larger claim is a lie, not worth its memory.
  if (member.size / 1032 > packed.size) return fail(PK_BAD_FILE, "%s: `%s` is corrupt", path_.c_str(), name);
  std::unique_ptr<uint8_t[]> bytes(new (std::nothrow) uint8_t[member.size + 1]);
  if (bytes == nullptr) {
    return fail(PK_OUT_OF_MEMORY,
                "%s: no memory to unpack `%s` (%" PRIu64
                " bytes): write it with numpy.savez, which "
                "does not compress and needs none",
                path_.c_str(), name, member.size);
  }
  if (!inflate(packed.data, packed.size, bytes.get(), member.size)) {
    return fail(PK_BAD_FILE, "%s: `%s` cannot be unpacked: the file is corrupt", path_.c_str(), name);
  }
  *out = Bytes{bytes.get(), member.size};
  expanded_.push_back(std::move(bytes));
  return PK_OK;
}

Status Npz::read_array(const Member& member, Bytes bytes) {
  static const char kSuffix[] = ".npy";
  NumpyArray array;
  array.name = member.name;
  if (array.name.size() <= 4 || array.name.compare(array.name.size() - 4, 4, kSuffix) != 0) return PK_OK;
  array.name.resize(array.name.size() - 4);
  const char* name = array.name.c_str();
  const bool is_npy = bytes.size >= 12 && std::memcmp(bytes.data, "\x93NUMPY", 6) == 0;
  const int version = is_npy ? bytes.data[6] : 0;
  const uint64_t head = version == 1 ? 10 : 12;
  const uint64_t length = !is_npy        ? 0
                          : version == 1 ? load<uint16_t>(bytes.data + 8)
                                         : load<uint32_t>(bytes.data + 8);
  if (!is_npy || version < 1 || version > 3 || length > bytes.size - head) {
    return fail(PK_BAD_FILE, "%s: `%s` is not a NumPy array", path_.c_str(), name);
  }
  const std::string header(reinterpret_cast<const char*>(bytes.data + head), length);
  std::string type, order, shape;
  if (!header_value(header, "descr", &type) || !header_value(header, "fortran_order", &order) ||
      !header_value(header, "shape", &shape) || shape[0] != '(' || !parse_shape(shape, &array.shape)) {
    return fail(PK_BAD_FILE, "%s: the header of `%s` cannot be read", path_.c_str(), name);
  }
  if (!parse_type(type.substr(1), &array.type)) {
    return fail(PK_TYPE_MISMATCH,
                "%s: `%s` has NumPy dtype %s'; float32, float64, int64, int32, uint8 and bool "
                "(little-endian) are read",
                path_.c_str(), name, type.c_str());
  }
  if (order != "False") {
    return fail(PK_TYPE_MISMATCH, "%s: `%s` is in Fortran order: save numpy.ascontiguousarray of it",
                path_.c_str(), name);
  }
  array.bytes = numpy_type_size(array.type);
  for (const int64_t size : array.shape) {
    if (__builtin_mul_overflow(array.bytes, static_cast<uint64_t>(size), &array.bytes))
      array.bytes = kMaxArrayBytes * 2;
    if (array.bytes > kMaxArrayBytes) return fail(PK_BAD_FILE, "%s: `%s` is too large", path_.c_str(), name);
  }
  if (array.bytes != bytes.size - head - length) {
    return fail(PK_BAD_FILE, "%s: `%s` has %" PRIu64 " bytes of data, its header promises %" PRIu64,
                path_.c_str(), name, bytes.size - head - length, array.bytes);
  }
  array.data = bytes.data + head + length;
  array.crc = member.crc;
  arrays_.push_back(std::move(array));
  return PK_OK;
}

}  // namespace pockc::cli
