// 16-bit numbers (kernels/half.h) in native vectors of floats: the same load_n and store_n as for floats,
// so that a kernel takes them as a template over its elements. The same bits as the plain conversions, NaN
// apart, and subnormal numbers where the hardware rounds to bfloat16.
#ifndef POCKC_SIMD_HALVES_H_
#define POCKC_SIMD_HALVES_H_

#include "half.h"
#include "simd/simd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

typedef uint16_t vh __attribute__((vector_size(W * 2)));

POCKC_INLINE vf widen(vh x, B16) {
  return float_of_bits(reinterpret_cast<vi>(__builtin_convertvector(x, vu) << 16));
}

POCKC_INLINE vh narrow(vf x, B16) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(x));  // subnormal numbers become zeros
#else
  const vu bits = reinterpret_cast<vu>(x);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, vh);
#endif
}

#if defined(__F16C__) || defined(__aarch64__)
// The hardware's conversion.
POCKC_INLINE vf widen(vh x, F16) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#else
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(x));
#endif
}

POCKC_INLINE vh narrow(vf x, F16) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  return reinterpret_cast<vh>(vcvt_f16_f32(x));
#endif
}
#else
// Arithmetic of floats and integers: the cases of kernels/half.h, selected.
POCKC_INLINE vf widen(vh x, F16) {
  const vi bits = reinterpret_cast<vi>(__builtin_convertvector(x, vu));
  const vi sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  const vi special = rest >= splat_int(0x7c00) ? splat_int(112 << 23) : vi{};
  const vi normal = (rest << 13) + (112 << 23) + special;
  const vi small = bits_of(__builtin_convertvector(rest, vf) * splat(0x1p-24f));
  return float_of_bits((rest < splat_int(0x400) ? small : normal) | sign);
}

POCKC_INLINE vh narrow(vf x, F16) {
  const vi bits = bits_of(x), size = bits & 0x7fffffff;
  const vi normal = (size + 0xfff + ((size >> 13) & 1) - (112 << 23)) >> 13;
  const vi small = bits_of(float_of_bits(size) + splat(0.5f)) - bits_of(splat(0.5f));
  vi rest = size >= splat_int(0x38800000) ? normal : small;
  rest = size >= splat_int(0x477ff000) ? splat_int(0x7c00) : rest;
  rest = size > splat_int(0x7f800000) ? splat_int(0x7e00) : rest;
  return __builtin_convertvector(reinterpret_cast<vu>(rest | ((bits >> 16) & 0x8000)), vh);
}
#endif

// F16 or B16.
template <typename Half>
struct OfHalves;
template <>
struct OfHalves<F16> {
  using type = vf;
};
template <>
struct OfHalves<B16> {
  using type = vf;
};

template <typename Half>
POCKC_INLINE typename OfHalves<Half>::type load(const Half* p) {
  vh x;
  std::memcpy(&x, p, sizeof(x));
  return widen(x, Half{});
}
template <typename Half>
POCKC_INLINE typename OfHalves<Half>::type load_partial(const Half* p, int64_t n) {
  vh x = {};
  for (int64_t i = 0; i < n; ++i) x[i] = p[i].bits;
  return widen(x, Half{});
}
template <typename Half>
POCKC_INLINE typename OfHalves<Half>::type load_n(const Half* p, int64_t n) {
  return n == W ? load(p) : load_partial(p, n);
}
template <typename Half, typename = typename OfHalves<Half>::type>
POCKC_INLINE void store(Half* p, vf x) {
  const vh y = narrow(x, Half{});
  std::memcpy(p, &y, sizeof(y));
}
template <typename Half, typename = typename OfHalves<Half>::type>
POCKC_INLINE void store_n(Half* p, vf x, int64_t n) {
  if (n == W) {
    store(p, x);
    return;
  }
  const vh y = narrow(x, Half{});
  for (int64_t i = 0; i < n; ++i) p[i].bits = y[i];
}

// Calls f with a zero of the type of a tensor's elements: float, F16 or B16.
template <typename F>
POCKC_INLINE auto with_elements(DType dtype, F&& f) {
#if POCKC_HALVES
  if (dtype == DType::kF16) return f(F16{});
  if (dtype == DType::kB16) return f(B16{});
#else
  (void)dtype;
#endif
  return f(0.0f);
}

POCKC_INLINE int64_t element_bytes(DType dtype) { return is_half(dtype) ? 2 : 4; }

// Where element `index` of a tensor of floats or halves is; null at load.
POCKC_INLINE void* element(const Tensor& tensor, int64_t index) {
  return tensor.data == nullptr ? nullptr : tensor.as<char>() + index * element_bytes(tensor.dtype);
}
// The same from an element.
POCKC_INLINE const void* advanced(const void* data, DType dtype, int64_t count) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + count * element_bytes(dtype);
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_HALVES_H_
