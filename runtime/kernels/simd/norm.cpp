// Layer and RMS normalisation over the last axis, their input and gamma gradients.
//
// With m the mean (0 for rms), r = 1 / sqrt(mean((x - m)^2) + epsilon), h = (x - m) r, g = ct gamma:
//   y = h gamma + beta;   dx = r (g - mean(g) - h mean(g h)), without mean(g) for rms;   dgamma = sum over
//   rows ct h.
// A row's statistics are two passes of sixteen lanes each. The gamma gradient sums kUnits equal parts of the
// rows, each in order into its own [C] in the workspace, and then those in order.
#include "simd/attributes.h"
#include "simd/halves.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int64_t kUnits = 4;

struct Statistics {
  float mean, scale;  // scale = r
};

POCKC_INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

template <bool Centred, typename T>
POCKC_INLINE Statistics statistics(const T* x, int64_t n, float epsilon) {
  const float count = static_cast<float>(n);
  float mean = 0;
  if (Centred) {
    Lanes sum = Lanes::all(0);
    for_lanes(n, [&](int j, int64_t i, int64_t valid) POCKC_LAMBDA { sum.v[j] += load_n(x + i, valid); });
    mean = sum.sum() / count;
  }
  Lanes squares = Lanes::all(0);
  for_lanes(n, [&](int j, int64_t i, int64_t valid) POCKC_LAMBDA {
    vf d = load_n(x + i, valid);
    if (Centred) d = d - splat(mean);
    if (valid < W) d = keep_first(d, valid, vf{});
    squares.v[j] = fma(d, d, squares.v[j]);
  });
  return {mean, inverse_root(squares.sum() / count + epsilon)};
}

// The first `images` inputs, and the output unless it is a sum over rows, are of one dtype.
bool accepts(const Call& call, int images, bool sums = false) {
  const DType dtype = call.inputs[0].dtype;
  if (call.inputs[images - 1].dtype != dtype || (!sums && call.outputs[0].dtype != dtype)) return false;
  return elements(call.inputs[0]) > 0;
}

float epsilon_of(const Call& call) { return static_cast<float>(call.floats[0]); }
const float* optional_input(const Call& call, int index) {
  return call.input_count > index ? call.inputs[index].as<float>() : nullptr;
}
int64_t row_grain(int64_t n) { return maximum<int64_t>(1, kElementGrain / n); }

template <bool Centred, typename T>
Status forward(const Call& call) {
  const T* x = call.inputs[0].as<T>();
  const float* gamma = optional_input(call, 1);
  const float* beta = optional_input(call, 2);
  T* y = call.outputs[0].as<T>();
  const int64_t n = last_dim(call.inputs[0]), rows = elements(call.inputs[0]) / n;
  const float epsilon = epsilon_of(call);
  parallel(call, rows, row_grain(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * n;
      const Statistics s = statistics<Centred>(from, n, epsilon);
      for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
        vf v = (load_n(from + i, valid) - splat(s.mean)) * splat(s.scale);
        if (gamma != nullptr) v *= load_n(gamma + i, valid);
        if (beta != nullptr) v += load_n(beta + i, valid);
        store_n(y + row * n + i, v, valid);
      });
    }
  });
  return PK_OK;
}

template <bool Centred, typename T>
Status grad_input(const Call& call) {
  const T* ct = call.inputs[0].as<T>();
  const T* x = call.inputs[1].as<T>();
  const float* gamma = optional_input(call, 2);
  T* dx = call.outputs[0].as<T>();
  const int64_t n = last_dim(call.inputs[0]), rows = elements(call.inputs[0]) / n;
  const float epsilon = epsilon_of(call);
  parallel(call, rows, row_grain(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * n;
      const T* up = ct + row * n;
      const Statistics s = statistics<Centred>(from, n, epsilon);
      const auto normalised = [&](int64_t i, int64_t valid) POCKC_LAMBDA {
        return (load_n(from + i, valid) - splat(s.mean)) * splat(s.scale);
      };
      const auto scaled = [&](int64_t i, int64_t valid) POCKC_LAMBDA {
        const vf g = load_n(up + i, valid);
        return gamma == nullptr ? g : g * load_n(gamma + i, valid);
      };
      Lanes sum = Lanes::all(0), products = Lanes::all(0);
      for_lanes(n, [&](int j, int64_t i, int64_t valid) POCKC_LAMBDA {
        const vf g = scaled(i, valid);  // zero past the end
        sum.v[j] += g;
        products.v[j] = fma(g, normalised(i, valid), products.v[j]);
      });
      const vf mean = splat(Centred ? sum.sum() / static_cast<float>(n) : 0.0f);
      const vf slope = splat(-products.sum() / static_cast<float>(n));
      for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
        const vf d = fma(normalised(i, valid), slope, scaled(i, valid) - mean);
        store_n(dx + row * n + i, d * splat(s.scale), valid);
      });
    }
  });
  return PK_OK;
}

bool accepts_grad_gamma(const Call& call) {
  return accepts(call, 2, true) && has_workspace(call, 0, kUnits * round_up(last_dim(call.inputs[0]), 16));
}

template <bool Centred, typename T>
Status grad_gamma(const Call& call) {
  const T* ct = call.inputs[0].as<T>();
  const T* x = call.inputs[1].as<T>();
  const int64_t n = last_dim(call.inputs[0]), rows = elements(call.inputs[0]) / n;
  const int64_t pitch = round_up(n, 16);
  const float epsilon = epsilon_of(call);
  float* units = workspace(call);
  parallel(call, kUnits, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t u = begin; u < end; ++u) {
      float* sums = units + u * pitch;
      for (int64_t i = 0; i < n; ++i) sums[i] = 0;
      for (int64_t row = rows * u / kUnits; row < rows * (u + 1) / kUnits; ++row) {
        const T* from = x + row * n;
        const Statistics s = statistics<Centred>(from, n, epsilon);
        for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
          const vf h = (load_n(from + i, valid) - splat(s.mean)) * splat(s.scale);
          store_n(sums + i, fma(load_n(ct + row * n + i, valid), h, load_n(sums + i, valid)), valid);
        });
      }
    }
  });
  float* out = call.outputs[0].as<float>();
  for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    vf total = load_n(units + i, valid);
    for (int64_t u = 1; u < kUnits; ++u) total += load_n(units + u * pitch + i, valid);
    store_n(out + i, total, valid);
  });
  return PK_OK;
}

}  // namespace

#define POCKC_NORM(op, accepted, function, centred)                                           \
  bool accepts_##op(const Call& call) { return accepted; }                                    \
  Status run_##op(const Call& call) {                                                         \
    return with_elements(call.inputs[0].dtype,                                                \
                         [&](auto zero) { return function<centred, decltype(zero)>(call); }); \
  }
POCKC_NORM(layer_norm, accepts(call, 1), forward, true)
POCKC_NORM(layer_norm_grad_input, accepts(call, 2), grad_input, true)
POCKC_NORM(layer_norm_grad_gamma, accepts_grad_gamma(call), grad_gamma, true)
POCKC_NORM(rms_norm, accepts(call, 1), forward, false)
POCKC_NORM(rms_norm_grad_input, accepts(call, 2), grad_input, false)
POCKC_NORM(rms_norm_grad_gamma, accepts_grad_gamma(call), grad_gamma, false)

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
