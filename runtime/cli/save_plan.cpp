#include "save_plan.h"

#include <algorithm>

namespace pockc::cli {

bool SavePlan::due(int64_t steps, bool epoch_ends, double now) {
  const bool by_steps = every_steps_ > 0 && steps % every_steps_ == 0;
  const bool by_time = every_seconds_ > 0 && now - last_ >= every_seconds_;
  const bool was_wanted = wanted_;
  wanted_ = wanted_ || by_steps || by_time || epoch_ends;
  if (!wanted_ || now >= allowed_) return wanted_;
  deferred_ += was_wanted ? 0 : 1;
  return false;
}

void SavePlan::written(uint64_t bytes, double now) {
  ++saves_;
  written_bytes_ += bytes;
  wanted_ = false;
  last_ = now;
  if (bytes_per_hour_ <= 0) return;
  allowed_ = std::max(allowed_, now) + 3600.0 * static_cast<double>(bytes) / bytes_per_hour_;
}

void SavePlan::failed(double now) {
  wanted_ = false;
  last_ = now;
}

}  // namespace pockc::cli
