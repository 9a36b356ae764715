// CRC-32 with zlib's polynomial.
#ifndef POCKC_SRC_CRC32_H_
#define POCKC_SRC_CRC32_H_

#include <cstddef>
#include <cstdint>

namespace pockc {

// The CRC of `size` bytes that follow bytes whose CRC is `previous` (0: none).
uint32_t crc32(uint32_t previous, const void* data, size_t size);

}  // namespace pockc

#endif  // POCKC_SRC_CRC32_H_
