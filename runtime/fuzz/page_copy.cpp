#include <cstdlib>
#include <cstring>

#include "fuzz.h"

namespace pockc::fuzz {

PageCopy::PageCopy(const uint8_t* data, size_t size) : data_(nullptr), size_(size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, size == 0 ? 1 : size) != 0) std::abort();
  data_ = static_cast<uint8_t*>(memory);
  if (size > 0) std::memcpy(data_, data, size);
}

PageCopy::~PageCopy() { std::free(data_); }

}  // namespace pockc::fuzz
