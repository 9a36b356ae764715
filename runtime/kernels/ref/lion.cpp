// lion(p, g, m, lr, [indices]; beta1, beta2, weight_decay, axis, start) -> (p', m')   (Chen et al., 2023)
// p = (1 - lr * weight_decay) * p - lr * sign(beta1 * m + (1 - beta1) * g);  m = beta2 * m + (1 - beta2) * g
//
// lion8(p, g, m, m_scale, lr, ...) -> (p', m', m_scale'): the same with a slot of one byte per element
// (optimizer8.h), and without `start`.
#include "optimizer8.h"

namespace pockc::ref {
namespace {

struct Lion {
  double beta1, beta2, weight_decay;
  Part part;
};

Lion read(Attributes& attributes, bool has_start) {
  Lion lion;
  lion.beta1 = attributes.number();
  lion.beta2 = attributes.number();
  lion.weight_decay = attributes.number();
  lion.part = updated_part(attributes, has_start);
  return lion;
}

// `scalars` is the operand that holds the rate.
template <typename Slot>
Status update(const Call& call, int scalars, Slot m) {
  Attributes attributes(call);
  const Lion lion = read(attributes, Slot::kHasStart);
  const float rate = *call.inputs[scalars].as<float>();
  const float shrink = static_cast<float>(1.0 - rate * lion.weight_decay);
  const float keep1 = static_cast<float>(lion.beta1), take1 = static_cast<float>(1.0 - lion.beta1);
  const float keep2 = static_cast<float>(lion.beta2), take2 = static_cast<float>(1.0 - lion.beta2);
  const int64_t before = elements_before(call, lion.part);
  const float* g = call.inputs[1].as<float>();
  float* p = call.outputs[0].as<float>() + before;
  return for_each_updated(call, scalars + 1, lion.part, [=, &m](int64_t at, int64_t from) {
    const float old = m.at(before + from);
    const float direction = keep1 * old + take1 * g[from];
    // NaN has no sign: it goes through, so that it is seen.
    const float sign =
        direction != direction ? direction : static_cast<float>((direction > 0.0f) - (direction < 0.0f));
    p[at] = p[at] * shrink - rate * sign;
    m.set(before + from, keep2 * old + take2 * g[from]);
  });
}

}  // namespace

Status check_lion(const Call& call) {
  if (!has_operands(call, 4, 5, 2)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Lion lion = read(attributes, true);
  return verdict(attributes.valid() && fits_update(call, 3, 1, lion.part));
}

Status run_lion(const Call& call) { return update(call, 3, FloatSlot(call, 0)); }

Status check_lion8(const Call& call) {
  if (!has_operands(call, 5, 6, 3)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Lion lion = read(attributes, false);
  return verdict(attributes.valid() && fits_update8(call, 1, 1, lion.part));
}

Status run_lion8(const Call& call) { return update(call, 4, CodedSlot<SignedLaw>(call, 0)); }

}  // namespace pockc::ref
