// Writing .npz files.
#include "crc32.h"
#include "error.h"
#include "npz.h"

namespace pockc::cli {
namespace {

template <typename T>
void put(std::string* out, T value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(T));
}

std::string npy_header(const NumpyArray& array) {
  static const char* const kTypes[] = {"<f4", "<f8", "<i8", "<i4", "|u1", "|b1"};
  std::string text = std::string("{'descr': '") + kTypes[static_cast<int>(array.type)] +
                     "', 'fortran_order': False, 'shape': (";
  for (const int64_t size : array.shape) text += std::to_string(size) + ",";
  text += "), }";
  text.append(63 - (10 + text.size()) % 64, ' ');
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  put<uint16_t>(&header, static_cast<uint16_t>(text.size()));
  return header + text;
}

struct MemberRecord {
  std::string name;
  uint32_t crc;
  uint32_t size;
  uint32_t offset;
};

// The fields that the local header and the directory share: version 2.0, stored, dated 1980-01-01.
void put_common(std::string* out, const MemberRecord& member) {
  put<uint16_t>(out, 20);
  put<uint16_t>(out, 0);
  put<uint16_t>(out, 0);
  put<uint16_t>(out, 0);
  put<uint16_t>(out, 0x21);
  put<uint32_t>(out, member.crc);
  put<uint32_t>(out, member.size);
  put<uint32_t>(out, member.size);
  put<uint16_t>(out, static_cast<uint16_t>(member.name.size()));
  put<uint16_t>(out, 0);
}

std::string directory(const std::vector<MemberRecord>& members, uint32_t offset) {
  std::string out;
  for (const MemberRecord& member : members) {
    put<uint32_t>(&out, 0x02014b50);
    put<uint16_t>(&out, 20);
    put_common(&out, member);
    put<uint16_t>(&out, 0);  // comment
    put<uint16_t>(&out, 0);  // disk
    put<uint16_t>(&out, 0);
    put<uint32_t>(&out, 0);
    put<uint32_t>(&out, member.offset);
    out += member.name;
  }
  const uint32_t size = static_cast<uint32_t>(out.size());
  put<uint32_t>(&out, 0x06054b50);
  put<uint32_t>(&out, 0);
  put<uint16_t>(&out, static_cast<uint16_t>(members.size()));
  put<uint16_t>(&out, static_cast<uint16_t>(members.size()));
  put<uint32_t>(&out, size);
  put<uint32_t>(&out, offset);
  put<uint16_t>(&out, 0);
  return out;
}

}  // namespace

Status write_npz(const std::string& path, const std::vector<NumpyArray>& arrays) {
  uint64_t total = 0;
  for (const NumpyArray& array : arrays) total += array.bytes + 1024;
  if (total > 0xFFFFFFFFull) {
    return fail(PK_INVALID_ARGUMENT, "%s would be larger than 4 GiB: give fewer samples at a time",
                path.c_str());
  }
  AtomicWriter writer(posix_file_system());
  POCKC_TRY(writer.open(path.c_str()));
  std::vector<MemberRecord> members;
  uint64_t offset = 0;
  for (const NumpyArray& array : arrays) {
    const std::string header = npy_header(array);
    const uint32_t crc = crc32(crc32(0, header.data(), header.size()), array.data, array.bytes);
    members.push_back(MemberRecord{array.name + ".npy", crc,
                                   static_cast<uint32_t>(header.size() + array.bytes),
                                   static_cast<uint32_t>(offset)});
    std::string local;
    put<uint32_t>(&local, 0x04034b50);
    put_common(&local, members.back());
    local += members.back().name + header;
    POCKC_TRY(writer.write(local.data(), local.size()));
    POCKC_TRY(writer.write(array.data, array.bytes));
    offset += local.size() + array.bytes;
  }
  const std::string tail = directory(members, static_cast<uint32_t>(offset));
  POCKC_TRY(writer.write(tail.data(), tail.size()));
  return writer.commit();
}

}  // namespace pockc::cli
