// lion(p, g, m, lr, [indices]; beta1, beta2, weight_decay, axis, start) -> (p', m')   (Chen et al., 2023)
// p = (1 - lr * weight_decay) * p - lr * sign(beta1 * m + (1 - beta1) * g);  m = beta2 * m + (1 - beta2) * g
#include "optimizer.h"

namespace pockc::ref {
namespace {

struct Lion {
  double beta1, beta2, weight_decay;
  Part part;
};

Lion read(Attributes& attributes) {
  Lion lion;
  lion.beta1 = attributes.number();
  lion.beta2 = attributes.number();
  lion.weight_decay = attributes.number();
  lion.part = updated_part(attributes);
  return lion;
}

}  // namespace

Status check_lion(const Call& call) {
  if (!has_operands(call, 4, 5, 2)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Lion lion = read(attributes);
  return verdict(attributes.valid() && fits_update(call, 3, 1, lion.part));
}

Status run_lion(const Call& call) {
  Attributes attributes(call);
  const Lion lion = read(attributes);
  const float rate = *call.inputs[3].as<float>();
  const float shrink = static_cast<float>(1.0 - rate * lion.weight_decay);
  const float keep1 = static_cast<float>(lion.beta1), take1 = static_cast<float>(1.0 - lion.beta1);
  const float keep2 = static_cast<float>(lion.beta2), take2 = static_cast<float>(1.0 - lion.beta2);
  const int64_t before = elements_before(call, lion.part);
  const float* g = call.inputs[1].as<float>();
  const float* m = call.inputs[2].as<float>() + before;
  float* p = call.outputs[0].as<float>() + before;
  float* new_m = call.outputs[1].as<float>() + before;
  return for_each_updated(call, 4, lion.part, [=](int64_t at, int64_t from) {
    const float direction = keep1 * m[from] + take1 * g[from];
    // NaN has no sign: it goes through, so that it is seen.
    const float sign =
        direction != direction ? direction : static_cast<float>((direction > 0.0f) - (direction < 0.0f));
    p[at] = p[at] * shrink - rate * sign;
    new_m[from] = keep2 * m[from] + take2 * g[from];
  });
}

}  // namespace pockc::ref
