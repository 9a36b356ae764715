// The reader of .npz archives, stored and compressed.
#include <cstring>

#include "crc32.h"
#include "fuzz.h"
#include "inflate.h"
#include "npz.h"
#include "program_writer.h"

namespace pockc::fuzz {
namespace {

void open_and_read(Bytes bytes) {
  cli::Npz npz;
  if (npz.open_bytes("a.npz", bytes) != PK_OK) return;
  uint32_t sum = 0;
  for (const cli::NumpyArray& array : npz.arrays()) {
    sum = crc32(sum, array.data, array.bytes);
    sum += static_cast<uint32_t>(array.describe().size());
  }
  volatile uint32_t sink = sum;
  static_cast<void>(sink);
}

// Gives every stored member that can be found the checksum of its bytes.
void repair(PageCopy* file) {
  uint8_t* data = file->data();
  for (size_t at = 0; at + 46 <= file->size(); ++at) {
    if (get<uint32_t>(data + at) != 0x02014b50 || get<uint16_t>(data + at + 10) != 0) continue;
    const uint64_t size = get<uint32_t>(data + at + 24), local = get<uint32_t>(data + at + 42);
    if (local > file->size() || file->size() - local < 30) continue;
    const uint64_t begin = local + 30 + get<uint16_t>(data + local + 26) + get<uint16_t>(data + local + 28);
    if (begin > file->size() || size > file->size() - begin) continue;
    put(data + at + 16, crc32(0, data + begin, size));
  }
}

}  // namespace

std::vector<std::string> fuzz_seeds() {
  test::TemporaryDirectory directory;
  const float x[6] = {1, 2, 3, 4, 5, 6};
  const int64_t labels[3] = {0, 1, 2};
  const cli::NumpyArray a{"x", cli::NumpyType::kF32, {3, 2}, reinterpret_cast<const uint8_t*>(x), 24};
  const cli::NumpyArray b{"labels", cli::NumpyType::kI64, {3}, reinterpret_cast<const uint8_t*>(labels), 24};
  const std::string path = directory.path("a.npz");
  if (cli::write_npz(path, {a, b}) != PK_OK) return {};
  return {test::read_file(path)};
}

Focus fuzz_focus(const std::string& input) { return Focus{0, input.size()}; }

}  // namespace pockc::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  pockc::fuzz::PageCopy file(data, size);
  pockc::fuzz::open_and_read(file.bytes());
  pockc::fuzz::repair(&file);
  pockc::fuzz::open_and_read(file.bytes());
  // And the packed bytes alone, whatever the archive says of them.
  uint8_t out[512];
  pockc::cli::inflate(data, size, out, sizeof(out));
  return 0;
}
