#include "record_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "saved8.h"

namespace pockc::cli {
namespace {

constexpr float kSmallestNormalHalf = 0x1p-14f, kLargestHalf = 65504.0f;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float with_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The scales of all blocks, then the codes: what the kernel `pack8` does, which the pock-run of a program may
// lack.
void store_int8(int64_t elements, const float* from, uint8_t* to) {
  uint8_t* codes = to + kScaleBytes * saved_blocks(elements);
  for (int64_t begin = 0; begin < elements; begin += kSavedBlock) {
    const int64_t end = std::min(elements, begin + kSavedBlock);
    float most = 0.0f;
    for (int64_t i = begin; i < end; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    const float scale = most / kLargestSaved;
    std::memcpy(to + kScaleBytes * (begin / kSavedBlock), &scale, sizeof(scale));
    for (int64_t i = begin; i < end; ++i) {
      const float step = scale > 0.0f ? from[i] / scale : 0.0f;
      const float code = std::nearbyint(step) + kSavedZero;
      codes[i] = static_cast<uint8_t>(code >= 0.0f && code <= 255.0f ? code : kSavedZero);  // of a NaN: 0
    }
  }
}

void restore_int8(int64_t elements, const uint8_t* from, float* to) {
  const uint8_t* codes = from + kScaleBytes * saved_blocks(elements);
  for (int64_t i = 0; i < elements; ++i) {
    float scale;
    std::memcpy(&scale, from + kScaleBytes * (i / kSavedBlock), sizeof(scale));
    to[i] = (static_cast<float>(codes[i]) - kSavedZero) * scale;
  }
}

}  // namespace

// To the nearest, of two as near to the even one. A half is a sign, five bits of exponent and ten of
// fraction.
uint16_t half_of(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00u);
  const float size = std::min(std::fabs(value), kLargestHalf);
  // Halves below the smallest normal one are multiples of 2^-24, the last bit of a float from 0.5 on.
  if (size < kSmallestNormalHalf) return static_cast<uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
  const uint32_t bits = bits_of(size);
  const uint32_t rounded = bits + 0xFFFu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13));
}

float float_of(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, bits = half & 0x7FFFu;
  if (bits < 0x0400u) return with_bits(sign | bits_of(static_cast<float>(bits) * 0x1p-24f));
  if (bits >= 0x7C00u) return with_bits(sign | 0x7FC00000u);
  return with_bits(sign | ((bits << 13) + ((127u - 15u) << 23)));
}

uint64_t stored_bytes(CacheDType how, DType dtype, int64_t elements) {
  if (dtype != DType::kF32 || how == CacheDType::kF32)
    return static_cast<uint64_t>(elements) * dtype_size(dtype);
  return static_cast<uint64_t>(how == CacheDType::kF16 ? 2 * elements : packed_bytes(elements));
}

void store(CacheDType how, DType dtype, int64_t elements, const void* from, uint8_t* to) {
  if (dtype != DType::kF32 || how == CacheDType::kF32) {
    std::memcpy(to, from, stored_bytes(how, dtype, elements));
    return;
  }
  const float* values = static_cast<const float*>(from);
  if (how == CacheDType::kInt8) return store_int8(elements, values, to);
  for (int64_t i = 0; i < elements; ++i) {
    const uint16_t half = half_of(values[i]);
    std::memcpy(to + 2 * i, &half, sizeof(half));
  }
}

void restore(CacheDType how, DType dtype, int64_t elements, const uint8_t* from, void* to) {
  if (dtype != DType::kF32 || how == CacheDType::kF32) {
    std::memcpy(to, from, stored_bytes(how, dtype, elements));
    return;
  }
  float* values = static_cast<float*>(to);
  if (how == CacheDType::kInt8) return restore_int8(elements, from, values);
  for (int64_t i = 0; i < elements; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof(half));
    values[i] = float_of(half);
  }
}

}  // namespace pockc::cli
