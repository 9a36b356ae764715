// Parameter updates with slots of one byte per element: momentum8, adam8, lion8. See kernels/ref/optimizer8.h
// for the two laws by which codes stand for values.
//
// A block of 256 slot elements is decoded, updated and encoded again in buffers that stay in the first-level
// cache; no other copy of a slot exists. Blocks are independent, loops have a fixed length, and nothing is
// fused: so the bits are the same on any number of threads and any instruction set.
#include "simd/math.h"
#include "simd/optimizer.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int64_t kBlock = 256;

struct Block {
  alignas(64) float p[kBlock];
  alignas(64) float g[kBlock];
  alignas(64) float m[kBlock];
  alignas(64) float v[kBlock];
  alignas(64) float size[kBlock];
  alignas(64) uint8_t codes[kBlock];
};

// A slot's codes and scales, old and new.
struct Slot {
  const uint8_t* codes;
  const float* scale;
  uint8_t* new_codes;
  float* new_scale;

  Slot(const Call& call, int index)
      : codes(call.inputs[2 + 2 * index].as<uint8_t>()),
        scale(call.inputs[3 + 2 * index].as<float>()),
        new_codes(call.outputs[1 + 2 * index].as<uint8_t>()),
        new_scale(call.outputs[2 + 2 * index].as<float>()) {}
};

float largest(const float* x) {
  vf most = {};
  for (int64_t i = 0; i < kBlock; i += W) {
    const vf next = load(x + i);
    most = select(next > most, next, most);
  }
  float result = 0.0f;
  for (int i = 0; i < W; ++i) result = most[i] > result ? most[i] : result;
  return result;
}

// The level of each size; what is past the end of the data has size 0.
void find_levels(float* size, float scale, float most) {
  const float divisor = scale > 0.0f ? scale : 1.0f;
  for (int64_t i = 0; i < kBlock; i += W) {
    const vf level = splat(most) * square_root(load(size + i) / splat(divisor));
    store(size + i, select(level < splat(most), level, splat(most)) + splat(0.5f));
  }
}

void decode_signed(const Slot& slot, int64_t block, int64_t n, Block* b) {
  std::memset(b->codes, 0, sizeof(b->codes));
  std::memcpy(b->codes, slot.codes + block * kBlock, static_cast<size_t>(n));
  const float scale = slot.scale[block];
  for (int64_t i = 0; i < kBlock; ++i) {
    const float c = static_cast<int8_t>(b->codes[i]);
    b->m[i] = scale * (c * __builtin_fabsf(c) / (127.0f * 127.0f));
  }
}

void encode_signed(const Slot& slot, int64_t block, int64_t n, Block* b) {
  for (int64_t i = 0; i < kBlock; ++i) b->size[i] = __builtin_fabsf(b->m[i]);
  const float scale = slot.new_scale[block] = largest(b->size);
  find_levels(b->size, scale, 127.0f);
  for (int64_t i = 0; i < kBlock; ++i) {
    const int level = static_cast<int>(b->size[i]);
    b->codes[i] = static_cast<uint8_t>(b->m[i] < 0.0f ? -level : level);
  }
  std::memcpy(slot.new_codes + block * kBlock, b->codes, static_cast<size_t>(n));
}

void decode_root(const Slot& slot, int64_t block, int64_t n, Block* b) {
  std::memset(b->codes, 0, sizeof(b->codes));
  std::memcpy(b->codes, slot.codes + block * kBlock, static_cast<size_t>(n));
  const float scale = slot.scale[block];
  for (int64_t i = 0; i < kBlock; ++i) {
    const float c = b->codes[i];
    const float root = scale * (c * c / (255.0f * 255.0f));
    b->v[i] = root * root;
  }
}

void encode_root(const Slot& slot, int64_t block, int64_t n, Block* b) {
  for (int64_t i = 0; i < kBlock; i += W) store(b->size + i, square_root(load(b->v + i)));
  const float scale = slot.new_scale[block] = largest(b->size);
  find_levels(b->size, scale, 255.0f);
  for (int64_t i = 0; i < kBlock; ++i) {
    const int level = static_cast<int>(b->size[i]);
    b->codes[i] = static_cast<uint8_t>(b->v[i] > 0.0f && level == 0 ? 1 : level);
  }
  std::memcpy(slot.new_codes + block * kBlock, b->codes, static_cast<size_t>(n));
}

// The updated part of p as one sequence in the order of the slots.
struct Part {
  int64_t length = 1, listed = 1, inner = 1;
  const int32_t* indices = nullptr;  // null: all of p

  // body(place in p, place in the range, count) for each run of memory in [begin, begin + n).
  template <typename Body>
  void for_runs(int64_t begin, int64_t n, Body&& body) const {
    if (indices == nullptr) {
      body(begin, int64_t{0}, n);
      return;
    }
    for (int64_t done = 0; done < n;) {
      const int64_t at = begin + done, row = at / inner, i = at % inner;
      const int64_t count = minimum(inner - i, n - done);
      body((row / listed * length + indices[row % listed]) * inner + i, done, count);
      done += count;
    }
  }
};

// update(block of elements, block index, elements of it) for every block of the slots.
template <typename Update>
Status for_blocks(const Call& call, int operands, int64_t axis, Update&& update) {
  const Tensor& p = call.inputs[0];
  Part part;
  if (call.input_count > operands) {
    const Status status = require_indices(call.inputs[operands], p.dims[axis]);
    if (status != PK_OK) return status;
    part.indices = call.inputs[operands].as<int32_t>();
    part.listed = call.inputs[operands].dims[0];
    part.length = p.dims[axis];
    for (int i = static_cast<int>(axis) + 1; i < p.rank; ++i) part.inner *= p.dims[i];
  }
  float* out = call.outputs[0].as<float>();
  if (out != p.data) std::memcpy(out, p.data, static_cast<size_t>(elements(p)) * sizeof(float));
  const float* g = call.inputs[1].as<float>();
  const int64_t count = elements(call.inputs[1]);
  parallel(call, divide_up(count, kBlock), kElementGrain / kBlock, [&](int64_t first, int64_t last, int) {
    Block b = {};
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, n = minimum(kBlock, count - begin);
      if (n < kBlock) b = Block{};
      std::memcpy(b.g, g + begin, static_cast<size_t>(n) * sizeof(float));
      part.for_runs(begin, n, [&](int64_t at, int64_t to, int64_t size) {
        std::memcpy(b.p + to, out + at, static_cast<size_t>(size) * sizeof(float));
      });
      update(&b, block, n);
      part.for_runs(begin, n, [&](int64_t at, int64_t from, int64_t size) {
        std::memcpy(out + at, b.p + from, static_cast<size_t>(size) * sizeof(float));
      });
    }
  });
  return PK_OK;
}

bool has_elements(const Call& call) { return elements(call.inputs[1]) > 0; }

}  // namespace

bool accepts_momentum8(const Call& call) { return has_elements(call); }
Status run_momentum8(const Call& call) {
  Attributes attributes(call);
  const float momentum = attributes.real();
  const float keep = static_cast<float>(1.0 - call.floats[1]);
  attributes.real();
  const bool nesterov = attributes.boolean();
  const float decay = attributes.real();
  const int64_t axis = attributes.integer();
  const float rate = *call.inputs[4].as<float>();
  const bool first = *call.inputs[5].as<int64_t>() <= 1;
  const Slot slot(call, 0);
  return for_blocks(call, 6, axis, [=](Block* b, int64_t block, int64_t n) {
    decode_signed(slot, block, n, b);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float gradient = b->g[i] + decay * b->p[i];
      const float moved = first ? gradient : momentum * b->m[i] + keep * gradient;
      b->m[i] = moved;
      b->p[i] -= rate * (nesterov ? gradient + momentum * moved : moved);
    }
    encode_signed(slot, block, n, b);
  });
}

bool accepts_adam8(const Call& call) { return has_elements(call); }
Status run_adam8(const Call& call) {
  const double beta1 = call.floats[0], beta2 = call.floats[1], weight_decay = call.floats[3];
  Attributes attributes(call);
  const bool decoupled = attributes.boolean();
  const int64_t axis = attributes.integer();
  const double rate = *call.inputs[6].as<float>();
  const double step = static_cast<double>(*call.inputs[7].as<int64_t>());
  const float shrink = static_cast<float>(decoupled ? 1.0 - rate * weight_decay : 1.0);
  const float l2 = static_cast<float>(decoupled ? 0.0 : weight_decay);
  const float take1 = static_cast<float>(1.0 - beta1), rest1 = 1.0f - take1;
  const float keep2 = static_cast<float>(beta2), take2 = static_cast<float>(1.0 - beta2);
  const bool near_start = 1.0 - beta1 < 0.5;  // torch.lerp: exact at the nearer end
  const float step_size = static_cast<float>(rate / (1.0 - ::pow(beta1, step)));
  const float correction = static_cast<float>(::sqrt(1.0 - ::pow(beta2, step)));
  const float epsilon = static_cast<float>(call.floats[2]);
  const Slot means(call, 0), squares(call, 1);
  return for_blocks(call, 8, axis, [=](Block* b, int64_t block, int64_t n) {
    decode_signed(means, block, n, b);
    decode_root(squares, block, n, b);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float old = b->p[i] * shrink;
      const float gradient = b->g[i] + l2 * old;
      const float way = gradient - b->m[i];
      const float mean = near_start ? b->m[i] + take1 * way : gradient - way * rest1;
      const float square = keep2 * b->v[i] + take2 * gradient * gradient;
      b->m[i] = mean;
      b->v[i] = square;
      b->p[i] = old - step_size * mean / (__builtin_sqrtf(square) / correction + epsilon);
    }
    encode_signed(means, block, n, b);
    encode_root(squares, block, n, b);
  });
}

bool accepts_lion8(const Call& call) { return has_elements(call); }
Status run_lion8(const Call& call) {
  const double beta1 = call.floats[0], beta2 = call.floats[1], decay = call.floats[2];
  const int64_t axis = Attributes(call).integer();
  const float rate = *call.inputs[4].as<float>();
  const float shrink = static_cast<float>(1.0 - static_cast<double>(rate) * decay);
  const float keep1 = static_cast<float>(beta1), take1 = static_cast<float>(1.0 - beta1);
  const float keep2 = static_cast<float>(beta2), take2 = static_cast<float>(1.0 - beta2);
  const Slot slot(call, 0);
  return for_blocks(call, 5, axis, [=](Block* b, int64_t block, int64_t n) {
    decode_signed(slot, block, n, b);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float direction = keep1 * b->m[i] + take1 * b->g[i];
      float sign = direction > 0.0f ? 1.0f : direction;  // zero and NaN stay
      sign = direction < 0.0f ? -1.0f : sign;
      b->p[i] = b->p[i] * shrink - rate * sign;
      b->m[i] = keep2 * b->m[i] + take2 * b->g[i];
    }
    encode_signed(slot, block, n, b);
  });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
