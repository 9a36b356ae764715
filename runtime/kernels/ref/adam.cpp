// adam(p, g, m, v, lr, step, [indices]; beta1, beta2, epsilon, weight_decay, decoupled, axis, start) ->
// (p', m', v')
// torch.optim.AdamW when decoupled (p *= 1 - lr * weight_decay), else torch.optim.Adam (g += weight_decay *
// p): m += (1 - beta1) * (g - m), v = beta2 * v + (1 - beta2) * g * g, p -= lr / (1 - beta1^step) * m /
// (sqrt(v) / sqrt(1 - beta2^step) + epsilon). Scalars are computed in f64 and rounded once, as PyTorch does.
//
// adam8(p, g, m, m_scale, v, v_scale, lr, step, ...) -> (p', m', m_scale', v', v_scale'): the same with slots
// of one byte per element (optimizer8.h), and without `start`. The parameter moves by the new moments before
// they are rounded.
#include <cmath>

#include "optimizer8.h"

namespace pockc::ref {
namespace {

struct Adam {
  double beta1, beta2, epsilon, weight_decay;
  bool decoupled;
  Part part;
};

Adam read(Attributes& attributes, bool has_start) {
  Adam adam;
  adam.beta1 = attributes.number();
  adam.beta2 = attributes.number();
  adam.epsilon = attributes.number();
  adam.weight_decay = attributes.number();
  adam.decoupled = attributes.boolean();
  adam.part = updated_part(attributes, has_start);
  return adam;
}

// torch.lerp's two branches: the one that is exact at the nearer end.
float interpolate(float start, float end, float weight) {
  if (std::fabs(weight) < 0.5f) return start + weight * (end - start);
  return end - (end - start) * (1.0f - weight);
}

// `scalars` is the operand that holds the rate.
template <typename Means, typename Squares>
Status update(const Call& call, int scalars, Means m, Squares v) {
  Attributes attributes(call);
  const Adam adam = read(attributes, Means::kHasStart);
  const double rate = *call.inputs[scalars].as<float>();
  const double step = static_cast<double>(*call.inputs[scalars + 1].as<int64_t>());
  const float shrink = static_cast<float>(1.0 - rate * adam.weight_decay);
  const float decay = static_cast<float>(adam.weight_decay);
  const float take1 = static_cast<float>(1.0 - adam.beta1);
  const float beta2 = static_cast<float>(adam.beta2), take2 = static_cast<float>(1.0 - adam.beta2);
  const float step_size = static_cast<float>(rate / (1.0 - std::pow(adam.beta1, step)));
  const float correction = static_cast<float>(std::sqrt(1.0 - std::pow(adam.beta2, step)));
  const float epsilon = static_cast<float>(adam.epsilon);
  const bool decays = adam.weight_decay != 0.0, decoupled = adam.decoupled;
  const int64_t before = elements_before(call, adam.part);
  const float* g = call.inputs[1].as<float>();
  float* p = call.outputs[0].as<float>() + before;
  return for_each_updated(call, scalars + 2, adam.part, [=, &m, &v](int64_t at, int64_t from) {
    float gradient = g[from];
    if (decays && decoupled) p[at] *= shrink;
    if (decays && !decoupled) gradient += decay * p[at];
    const float mean = interpolate(m.at(before + from), gradient, take1);
    const float square = beta2 * v.at(before + from) + take2 * gradient * gradient;
    m.set(before + from, mean);
    v.set(before + from, square);
    p[at] -= step_size * mean / (std::sqrt(square) / correction + epsilon);
  });
}

}  // namespace

Status check_adam(const Call& call) {
  if (!has_operands(call, 6, 7, 3)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Adam adam = read(attributes, true);
  return verdict(attributes.valid() && fits_update(call, 4, 2, adam.part));
}

Status run_adam(const Call& call) { return update(call, 4, FloatSlot(call, 0), FloatSlot(call, 1)); }

Status check_adam8(const Call& call) {
  if (!has_operands(call, 8, 9, 5)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Adam adam = read(attributes, false);
  return verdict(attributes.valid() && fits_update8(call, 2, 2, adam.part));
}

Status run_adam8(const Call& call) {
  return update(call, 6, CodedSlot<SignedLaw>(call, 0), CodedSlot<RootLaw>(call, 1));
}

}  // namespace pockc::ref
