// momentum(p, g, m, lr, step, [indices]; momentum, dampening, nesterov, weight_decay, axis, start) -> (p',
// m') torch.optim.SGD: g += weight_decay * p; m = g at step 1, else momentum * m + (1 - dampening) * g; p -=
// lr * m, or with nesterov p -= lr * (g + momentum * m).
#include "optimizer.h"

namespace pockc::ref {
namespace {

struct Momentum {
  float momentum, keep;  // keep = 1 - dampening
  bool nesterov;
  float weight_decay;
  Part part;
};

Momentum read(Attributes& attributes) {
  Momentum result;
  result.momentum = attributes.number_f32();
  result.keep = static_cast<float>(1.0 - attributes.number());
  result.nesterov = attributes.boolean();
  result.weight_decay = attributes.number_f32();
  result.part = updated_part(attributes);
  return result;
}

}  // namespace

Status check_momentum(const Call& call) {
  if (!has_operands(call, 5, 6, 2)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Momentum settings = read(attributes);
  return verdict(attributes.valid() && fits_update(call, 3, 2, settings.part));
}

Status run_momentum(const Call& call) {
  Attributes attributes(call);
  const Momentum settings = read(attributes);
  const int64_t before = elements_before(call, settings.part);
  const float* g = call.inputs[1].as<float>();
  const float* m = call.inputs[2].as<float>() + before;
  const float rate = *call.inputs[3].as<float>();
  const bool first = *call.inputs[4].as<int64_t>() <= 1;
  float* p = call.outputs[0].as<float>() + before;
  float* new_m = call.outputs[1].as<float>() + before;
  return for_each_updated(call, 5, settings.part, [=](int64_t at, int64_t from) {
    float gradient = g[from];
    if (settings.weight_decay != 0.0f) gradient += settings.weight_decay * p[at];
    const float moved = first ? gradient : settings.momentum * m[from] + settings.keep * gradient;
    new_m[from] = moved;
    p[at] -= rate * (settings.nesterov ? gradient + settings.momentum * moved : moved);
  });
}

}  // namespace pockc::ref
