// momentum(p, g, m, lr, step, [indices]; momentum, dampening, nesterov, weight_decay, axis, start) ->
// (p', m')
// torch.optim.SGD: g += weight_decay * p; m = g at step 1, else momentum * m + (1 - dampening) * g;
// p -= lr * m, or with nesterov p -= lr * (g + momentum * m).
//
// momentum8(p, g, m, m_scale, lr, step, ...) -> (p', m', m_scale'): the same with a slot of one byte per
// element (optimizer8.h), and without `start`. The parameter moves by the new momentum before it is rounded.
#include "optimizer8.h"

namespace pockc::ref {
namespace {

struct Momentum {
  float momentum, keep;  // keep = 1 - dampening
  bool nesterov;
  float weight_decay;
  Part part;
};

Momentum read(Attributes& attributes, bool has_start) {
  Momentum result;
  result.momentum = attributes.number_f32();
  result.keep = static_cast<float>(1.0 - attributes.number());
  result.nesterov = attributes.boolean();
  result.weight_decay = attributes.number_f32();
  result.part = updated_part(attributes, has_start);
  return result;
}

// `scalars` is the operand that holds the rate.
template <typename Slot>
Status update(const Call& call, int scalars, Slot m) {
  Attributes attributes(call);
  const Momentum settings = read(attributes, Slot::kHasStart);
  const int64_t before = elements_before(call, settings.part);
  const float* g = call.inputs[1].as<float>();
  const float rate = *call.inputs[scalars].as<float>();
  const bool first = *call.inputs[scalars + 1].as<int64_t>() <= 1;
  float* p = call.outputs[0].as<float>() + before;
  return for_each_updated(call, scalars + 2, settings.part, [=, &m](int64_t at, int64_t from) {
    float gradient = g[from];
    if (settings.weight_decay != 0.0f) gradient += settings.weight_decay * p[at];
    const float moved = first ? gradient : settings.momentum * m.at(before + from) + settings.keep * gradient;
    m.set(before + from, moved);
    p[at] -= rate * (settings.nesterov ? gradient + settings.momentum * moved : moved);
  });
}

}  // namespace

Status check_momentum(const Call& call) {
  if (!has_operands(call, 5, 6, 2)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Momentum settings = read(attributes, true);
  return verdict(attributes.valid() && fits_update(call, 3, 2, settings.part));
}

Status run_momentum(const Call& call) { return update(call, 3, FloatSlot(call, 0)); }

Status check_momentum8(const Call& call) {
  if (!has_operands(call, 6, 7, 3)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Momentum settings = read(attributes, false);
  return verdict(attributes.valid() && fits_update8(call, 1, 2, settings.part));
}

Status run_momentum8(const Call& call) { return update(call, 4, CodedSlot<SignedLaw>(call, 0)); }

}  // namespace pockc::ref
