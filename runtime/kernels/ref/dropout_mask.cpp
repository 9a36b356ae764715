// dropout_mask(seed i64[], step i64[]; elements, probability, stream) -> u8[ceil(elements / 8)]
// Philox4x32-10 (Salmon et al., 2011): key = seed (low, high word), counter = (block low, block high, stream,
// step low). Element i takes word i % 4 of block i / 4 and is kept (bit set) when the word is at least
// floor(probability * 2^32).
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

struct Words {
  uint32_t values[4];
};

Words philox(Words counter, uint32_t key0, uint32_t key1) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t (&c)[4] = counter.values;
  for (int round = 0; round < 10; ++round, key0 += kWeyl0, key1 += kWeyl1) {
    const uint64_t product0 = kMultiplier0 * c[0], product1 = kMultiplier1 * c[2];
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32),
                   high1 = static_cast<uint32_t>(product1 >> 32);
    c[0] = high1 ^ c[1] ^ key0;
    c[2] = high0 ^ c[3] ^ key1;
    c[1] = static_cast<uint32_t>(product1);
    c[3] = static_cast<uint32_t>(product0);
  }
  return counter;
}

}  // namespace

Status check_dropout_mask(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  const Tensor& mask = call.outputs[0];
  Attributes attributes(call);
  const int64_t elements = attributes.integer(1, kMaxElements);
  const double probability = attributes.number();
  attributes.integer(0, std::numeric_limits<uint32_t>::max());
  return verdict(attributes.valid() && probability >= 0.0 && probability <= 1.0 &&
                 is_scalar(call.inputs[0], DType::kI64) && is_scalar(call.inputs[1], DType::kI64) &&
                 mask.dtype == DType::kU8 && has_shape(mask, {(elements + 7) / 8}));
}

Status run_dropout_mask(const Call& call) {
  Attributes attributes(call);
  const int64_t elements = attributes.integer();
  const double probability = attributes.number();
  const uint32_t stream = static_cast<uint32_t>(attributes.integer());
  const uint64_t seed = static_cast<uint64_t>(*call.inputs[0].as<int64_t>());
  const uint32_t step = static_cast<uint32_t>(*call.inputs[1].as<int64_t>());
  const uint64_t threshold = static_cast<uint64_t>(std::floor(probability * 4294967296.0));
  uint8_t* mask = call.outputs[0].as<uint8_t>();
  fill_zero(call.outputs[0]);
  for (int64_t first = 0; first < elements; first += 4) {
    const uint64_t block = static_cast<uint64_t>(first / 4);
    const Words counter = {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, step}};
    const Words words = philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int64_t i = first; i < elements && i < first + 4; ++i) {
      if (words.values[i - first] >= threshold)
        mask[i / 8] = static_cast<uint8_t>(mask[i / 8] | 1u << (i % 8));
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
