// How the frozen prefix's outputs for one sample lie in a cache: one tensor after the other.
#ifndef POCKC_CLI_RECORD_FORMAT_H_
#define POCKC_CLI_RECORD_FORMAT_H_

#include <cstdint>

#include "program.h"

namespace pockc::cli {

// kF32 keeps every bit. kF16: nearest IEEE half, what is out of range becomes its largest number. kInt8: a
// byte each and a scale for every 128, as `pack8` has it. Tensors of other dtypes than f32 are kept as they
// are.
enum class CacheDType : uint8_t { kF32, kF16, kInt8 };

uint64_t stored_bytes(CacheDType how, DType dtype, int64_t elements);
void store(CacheDType how, DType dtype, int64_t elements, const void* from, uint8_t* to);
void restore(CacheDType how, DType dtype, int64_t elements, const uint8_t* from, void* to);

uint16_t half_of(float value);
float float_of(uint16_t half);

}  // namespace pockc::cli

#endif  // POCKC_CLI_RECORD_FORMAT_H_
