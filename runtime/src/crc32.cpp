#include "crc32.h"

#include <cstring>

namespace pockc {
namespace {

// Eight tables: table[k][b] is the CRC of byte b followed by k zero bytes, so eight bytes are folded at once.
struct Tables {
  uint32_t table[8][256];

  constexpr Tables() : table() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320u : 0u);
      table[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k) {
      for (uint32_t byte = 0; byte < 256; ++byte) {
        const uint32_t crc = table[k - 1][byte];
        table[k][byte] = (crc >> 8) ^ table[0][crc & 0xFF];
      }
    }
  }
};

constexpr Tables kTables;

}  // namespace

uint32_t crc32(uint32_t previous, const void* data, size_t size) {
  const auto& table = kTables.table;
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  uint32_t crc = ~previous;
  for (; size >= 8; bytes += 8, size -= 8) {
    uint32_t low, high;
    std::memcpy(&low, bytes, 4);
    std::memcpy(&high, bytes + 4, 4);
    low ^= crc;
    crc = table[7][low & 0xFF] ^ table[6][(low >> 8) & 0xFF] ^ table[5][(low >> 16) & 0xFF] ^
          table[4][low >> 24] ^ table[3][high & 0xFF] ^ table[2][(high >> 8) & 0xFF] ^
          table[1][(high >> 16) & 0xFF] ^ table[0][high >> 24];
  }
  for (; size > 0; ++bytes, --size) crc = (crc >> 8) ^ table[0][(crc ^ *bytes) & 0xFF];
  return ~crc;
}

}  // namespace pockc
