// sgd(p, g, lr, [indices]; weight_decay, axis, start) -> p' = p - lr * (g + weight_decay * p)
#include "optimizer.h"

namespace pockc::ref {
namespace {

struct Sgd {
  float weight_decay;
  Part part;
};

Sgd read(Attributes& attributes) {
  Sgd sgd;
  sgd.weight_decay = attributes.number_f32();
  sgd.part = updated_part(attributes);
  return sgd;
}

}  // namespace

Status check_sgd(const Call& call) {
  if (!has_operands(call, 3, 4, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Sgd sgd = read(attributes);
  return verdict(attributes.valid() && fits_update(call, 2, 1, sgd.part));
}

Status run_sgd(const Call& call) {
  Attributes attributes(call);
  const Sgd sgd = read(attributes);
  const int64_t before = elements_before(call, sgd.part);
  float* p = call.outputs[0].as<float>() + before;
  const float* g = call.inputs[1].as<float>();
  const float rate = *call.inputs[2].as<float>();
  return for_each_updated(call, 3, sgd.part, [=](int64_t at, int64_t from) {
    float gradient = g[from];
    if (sgd.weight_decay != 0.0f) gradient += sgd.weight_decay * p[at];
    p[at] -= rate * gradient;
  });
}

}  // namespace pockc::ref
