// learning_rate(base f32[], step i64[]; schedule, warmup_steps, total_steps, step_size, minimum, factor) ->
// f32[] With s = step - 1: base * (s + 1) / warmup_steps while s < warmup_steps; then t = s - warmup_steps,
// f = min(1, t / max(1, total_steps - warmup_steps)) and the schedule. `minimum` is a fraction of base.
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

constexpr double kPi = 3.14159265358979323846;

struct Schedule {
  int64_t kind, warmup_steps, total_steps, step_size;
  double minimum, factor;
};

Schedule read(Attributes& attributes) {
  Schedule schedule;
  schedule.kind = attributes.integer(kConstant, kStep);
  schedule.warmup_steps = attributes.integer(0, kMaxElements);
  schedule.total_steps = attributes.integer(0, kMaxElements);
  schedule.step_size = attributes.integer(0, kMaxElements);
  schedule.minimum = attributes.number();
  schedule.factor = attributes.number();
  return schedule;
}

double multiplier(const Schedule& schedule, int64_t step) {
  const int64_t done = step > 1 ? step - 1 : 0;
  if (done < schedule.warmup_steps)
    return static_cast<double>(done + 1) / static_cast<double>(schedule.warmup_steps);
  const int64_t since = done - schedule.warmup_steps;
  const int64_t planned = schedule.total_steps - schedule.warmup_steps;
  const int64_t span = planned > 1 ? planned : 1;
  const double fraction = span > since ? static_cast<double>(since) / static_cast<double>(span) : 1.0;
  switch (schedule.kind) {
    case kLinear:
      return schedule.minimum + (1.0 - schedule.minimum) * (1.0 - fraction);
    case kCosine:
      return schedule.minimum + (1.0 - schedule.minimum) * (1.0 + std::cos(kPi * fraction)) / 2.0;
    case kStep:
      return std::pow(schedule.factor, static_cast<double>(since / schedule.step_size));
    default:
      return 1.0;
  }
}

}  // namespace

Status check_learning_rate(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Schedule schedule = read(attributes);
  const bool declines = schedule.kind == kLinear || schedule.kind == kCosine;
  if (declines && schedule.total_steps == 0) return PK_BAD_FILE;
  return verdict(attributes.valid() && (schedule.kind != kStep || schedule.step_size > 0) &&
                 is_scalar(call.inputs[0], DType::kF32) && is_scalar(call.inputs[1], DType::kI64) &&
                 is_scalar(call.outputs[0], DType::kF32));
}

Status run_learning_rate(const Call& call) {
  Attributes attributes(call);
  const Schedule schedule = read(attributes);
  const double base = *call.inputs[0].as<float>();
  *call.outputs[0].as<float>() =
      static_cast<float>(base * multiplier(schedule, *call.inputs[1].as<int64_t>()));
  return PK_OK;
}

}  // namespace pockc::ref
