// Parameter updates: sgd, momentum, adam, lion, in the formula order of torch (see the reference kernels).
//
// With an index list, runs of consecutive indices are runs of memory in p, g and the slots alike, so both
// cases are the same update of a run [to, to + n) of p from [from, from + n) of g. With a start, rows of p
// and of the whole slots from there on are updated: their pointers are moved to that row. Outputs may be the
// operands themselves.
#include "simd/optimizer.h"

#include "simd/math.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

bool float_operands(const Call& call, int state) {
  for (int i = 0; i < state; ++i) {
    if (!is_f32(call.inputs[i])) return false;
  }
  return elements(call.inputs[0]) > 0;
}

struct Part {
  int64_t axis, start;
};

// The last attributes, the first of which is the integer at `position`.
Part updated_part(const Call& call, int position) { return {call.ints[position], call.ints[position + 1]}; }

int64_t elements_before(const Call& call, const Part& part) {
  return part.start <= 0 ? 0 : part.start * (elements(call.inputs[0]) / call.inputs[0].dims[0]);
}

void copy_unless_same(const Tensor& from, const Tensor& to) {
  if (to.data != from.data)
    std::memcpy(to.data, from.data, static_cast<size_t>(elements(from)) * sizeof(float));
}

// update(to, from, n) over everything that is updated; `operands` without the optional indices.
template <typename Update>
Status for_runs(const Call& call, int operands, const Part& part, Update&& update) {
  const Tensor& p = call.inputs[0];
  const int64_t axis = part.axis;
  copy_unless_same(p, call.outputs[0]);
  for (int i = 1; part.start >= 0 && i < call.output_count; ++i) {
    copy_unless_same(call.inputs[i + 1], call.outputs[i]);
  }
  if (call.input_count == operands) {
    parallel(call, elements(call.inputs[1]), kElementGrain,
             [=](int64_t begin, int64_t end, int) { update(begin, begin, end - begin); });
    return PK_OK;
  }
  const int32_t* indices = call.inputs[operands].as<int32_t>();
  const int64_t listed = call.inputs[operands].dims[0];
  const int64_t length = p.dims[axis];
  const Status status = require_indices(call.inputs[operands], length);
  if (status != PK_OK) return status;
  int64_t outer = 1, inner = 1;
  for (int i = 0; i < p.rank; ++i) (i < axis ? outer : inner) *= i == axis ? 1 : p.dims[i];
  const int64_t grain = maximum<int64_t>(1, kElementGrain / maximum<int64_t>(1, listed * inner));
  parallel(call, outer, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t k = 0; k < listed;) {
        int64_t stop = k + 1;
        while (stop < listed && indices[stop] == indices[stop - 1] + 1) ++stop;
        update((o * length + indices[k]) * inner, (o * listed + k) * inner, (stop - k) * inner);
        k = stop;
      }
    }
  });
  return PK_OK;
}

}  // namespace

bool accepts_sgd(const Call& call) { return float_operands(call, 2); }
Status run_sgd(const Call& call) {
  Attributes attributes(call);
  const vf decay = splat(attributes.real());
  const Part part = updated_part(call, 0);
  const int64_t before = elements_before(call, part);
  const vf rate = splat(-*call.inputs[2].as<float>());
  const float* g = call.inputs[1].as<float>();
  float* p = call.outputs[0].as<float>() + before;
  return for_runs(call, 3, part, [=](int64_t to, int64_t from, int64_t n) POCKC_LAMBDA {
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf old = load_n(p + to + i, valid);
      const vf gradient = fma(decay, old, load_n(g + from + i, valid));
      store_n(p + to + i, fma(rate, gradient, old), valid);
    });
  });
}

bool accepts_momentum(const Call& call) { return float_operands(call, 3); }
Status run_momentum(const Call& call) {
  Attributes attributes(call);
  const vf momentum = splat(attributes.real());
  const vf keep = splat(static_cast<float>(1.0 - call.floats[1]));
  attributes.real();
  const bool nesterov = attributes.boolean();
  const vf decay = splat(attributes.real());
  const Part part = updated_part(call, 1);
  const int64_t before = elements_before(call, part);
  const bool first = *call.inputs[4].as<int64_t>() <= 1;
  const vf rate = splat(-*call.inputs[3].as<float>());
  const float* g = call.inputs[1].as<float>();
  const float* m = call.inputs[2].as<float>() + before;
  float* p = call.outputs[0].as<float>() + before;
  float* new_m = call.outputs[1].as<float>() + before;
  return for_runs(call, 5, part, [=](int64_t to, int64_t from, int64_t n) POCKC_LAMBDA {
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf old = load_n(p + to + i, valid);
      const vf gradient = fma(decay, old, load_n(g + from + i, valid));
      vf moved = gradient;
      if (!first) moved = fma(momentum, load_n(m + from + i, valid), keep * gradient);
      store_n(new_m + from + i, moved, valid);
      store_n(p + to + i, fma(rate, nesterov ? fma(momentum, moved, gradient) : moved, old), valid);
    });
  });
}

bool accepts_adam(const Call& call) { return float_operands(call, 4); }
Status run_adam(const Call& call) {
  const double beta1 = call.floats[0], beta2 = call.floats[1], decay = call.floats[3];
  Attributes attributes(call);
  const bool decoupled = attributes.boolean();
  const Part part = updated_part(call, 1);
  const int64_t before = elements_before(call, part);
  const double rate = *call.inputs[4].as<float>();
  const double step = static_cast<double>(*call.inputs[5].as<int64_t>());
  const auto vector = [](double x) { return splat(static_cast<float>(x)); };
  const vf shrink = vector(decoupled ? 1.0 - rate * decay : 1.0), l2 = vector(decoupled ? 0.0 : decay);
  const vf take1 = vector(1.0 - beta1), keep2 = vector(beta2), take2 = vector(1.0 - beta2);
  const bool near_start = 1.0 - beta1 < 0.5;  // torch.lerp: exact at the nearer end
  const vf rest1 = splat(1.0f) - take1;
  const vf step_size = vector(rate / (1.0 - ::pow(beta1, step)));
  const vf correction = vector(1.0 / ::sqrt(1.0 - ::pow(beta2, step)));
  const vf epsilon = vector(call.floats[2]);
  const float* g = call.inputs[1].as<float>();
  const float* m = call.inputs[2].as<float>() + before;
  const float* v = call.inputs[3].as<float>() + before;
  float* p = call.outputs[0].as<float>() + before;
  float* new_m = call.outputs[1].as<float>() + before;
  float* new_v = call.outputs[2].as<float>() + before;
  return for_runs(call, 6, part, [=](int64_t to, int64_t from, int64_t n) POCKC_LAMBDA {
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf old = load_n(p + to + i, valid) * shrink;
      const vf gradient = fma(l2, old, load_n(g + from + i, valid));
      const vf start = load_n(m + from + i, valid);
      const vf way = gradient - start;
      const vf mean = near_start ? fma(take1, way, start) : fma(-way, rest1, gradient);
      const vf square = fma(take2 * gradient, gradient, keep2 * load_n(v + from + i, valid));
      store_n(new_m + from + i, mean, valid);
      store_n(new_v + from + i, square, valid);
      const vf denominator = fma(square_root(square), correction, epsilon);
      store_n(p + to + i, old - step_size * mean / denominator, valid);
    });
  });
}

bool accepts_lion(const Call& call) { return float_operands(call, 3); }
Status run_lion(const Call& call) {
  const double beta1 = call.floats[0], beta2 = call.floats[1], decay = call.floats[2];
  const Part part = updated_part(call, 0);
  const int64_t before = elements_before(call, part);
  const float lr = *call.inputs[3].as<float>();
  const auto vector = [](double x) { return splat(static_cast<float>(x)); };
  const vf rate = splat(lr), shrink = vector(1.0 - static_cast<double>(lr) * decay);
  const vf keep1 = vector(beta1), take1 = vector(1.0 - beta1);
  const vf keep2 = vector(beta2), take2 = vector(1.0 - beta2);
  const float* g = call.inputs[1].as<float>();
  const float* m = call.inputs[2].as<float>() + before;
  float* p = call.outputs[0].as<float>() + before;
  float* new_m = call.outputs[1].as<float>() + before;
  return for_runs(call, 4, part, [=](int64_t to, int64_t from, int64_t n) POCKC_LAMBDA {
    for_vectors(0, n, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
      const vf gradient = load_n(g + from + i, valid);
      const vf slot = load_n(m + from + i, valid);
      const vf direction = keep1 * slot + take1 * gradient;        // two roundings: its sign decides
      vf sign = select(direction > vf{}, splat(1.0f), direction);  // zero and NaN stay
      sign = select(direction < vf{}, splat(-1.0f), sign);
      store_n(p + to + i, load_n(p + to + i, valid) * shrink - rate * sign, valid);
      store_n(new_m + from + i, fma(keep2, slot, take2 * gradient), valid);
    });
  });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
