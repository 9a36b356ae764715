// pack8, unpack8: see ref/saved8.cpp. Blocks are independent, and a largest size is exact in any order.
#include "saved8.h"

#include "simd/codes.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// A block, and where its scale and codes lie in the packed tensor.
struct Block {
  int64_t begin, count, scale, codes;
  int64_t filler;  // bytes behind the last block of a row

  Block(const Tensor& x, int64_t index) {
    const int64_t columns = elements(x) / x.dims[0], blocks = saved_blocks(columns);
    const int64_t row = index / blocks, block = index - row * blocks;
    begin = row * columns + block * kSavedBlock;
    count = minimum<int64_t>(kSavedBlock, columns - block * kSavedBlock);
    scale = row * packed_bytes(columns) + block * kScaleBytes;
    codes = row * packed_bytes(columns) + blocks * kScaleBytes + block * kSavedBlock;
    filler = block == blocks - 1 ? packed_bytes(columns) - blocks * kScaleBytes - columns : 0;
  }
};

template <typename F>
Status for_blocks(const Call& call, const Tensor& x, F f) {
  const int64_t columns = elements(x) / x.dims[0];
  parallel(call, x.dims[0] * saved_blocks(columns), kElementGrain / kSavedBlock,
           [&](int64_t begin, int64_t end, int) {
             for (int64_t i = begin; i < end; ++i) f(Block(x, i));
           });
  return PK_OK;
}

POCKC_INLINE float largest_size(const float* x, int64_t count) {
  vf most = {};
  for_vectors(0, count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    const vf size = absolute(load_n(x + i, valid));
    most = select(size > most, size, most);
  });
  float lanes[W], largest = 0.0f;
  store(lanes, most);
  for (int i = 0; i < W; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

}  // namespace

bool accepts_pack8(const Call&) { return true; }

Status run_pack8(const Call& call) {
  const float* x = call.inputs[0].as<float>();
  uint8_t* packed = call.outputs[0].as<uint8_t>();
  return for_blocks(call, call.inputs[0], [=](const Block& block) {
    const float scale = largest_size(x + block.begin, block.count) / kLargestSaved;
    __builtin_memcpy(packed + block.scale, &scale, sizeof(scale));
    const vf divisor = splat(scale == 0.0f ? 1.0f : scale);  // all elements are 0 then
    for_vectors(0, block.count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf steps = load_n(x + block.begin + i, valid) / divisor + splat(kSavedZero);
      narrow(packed + block.codes + i, to_codes(steps, vf{}, splat(255.0f)), valid);
    });
    for (int64_t i = 0; i < block.filler; ++i) packed[block.codes + block.count + i] = 0;
  });
}

bool accepts_unpack8(const Call&) { return true; }

Status run_unpack8(const Call& call) {
  const uint8_t* packed = call.inputs[0].as<uint8_t>();
  float* x = call.outputs[0].as<float>();
  return for_blocks(call, call.outputs[0], [=](const Block& block) {
    float scale;
    __builtin_memcpy(&scale, packed + block.scale, sizeof(scale));
    for_vectors(0, block.count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf numbers =
          (to_float(widen(packed + block.codes + i, valid)) - splat(kSavedZero)) * splat(scale);
      store_n(x + block.begin + i, numbers, valid);
    });
  });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
