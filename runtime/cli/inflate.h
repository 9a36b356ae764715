// Decompression of deflate streams (RFC 1951), for arrays saved with numpy.savez_compressed.
#ifndef POCKC_CLI_INFLATE_H_
#define POCKC_CLI_INFLATE_H_

#include <cstddef>
#include <cstdint>

namespace pockc::cli {

// Expands exactly `out_size` bytes; false when the stream is malformed, cut off, or expands to another size.
bool inflate(const uint8_t* in, size_t in_size, uint8_t* out, size_t out_size);

}  // namespace pockc::cli

#endif  // POCKC_CLI_INFLATE_H_
