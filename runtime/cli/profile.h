// Where the time of a step goes: milliseconds of each call of an entry, over some runs of it. With gradient
// accumulation that is the last micro-step of a group, which is an entry of its own.
#ifndef POCKC_CLI_PROFILE_H_
#define POCKC_CLI_PROFILE_H_

#include <string>
#include <vector>

#include "roofline.h"

namespace pockc::cli {

class Profile : public CallObserver {
 public:
  explicit Profile(const EntryRecord& entry) : entry_(entry) { clear(); }

  void before(const EntryRecord& entry, size_t index) override;
  void after(const EntryRecord& entry, size_t index) override;
  void clear();

  // The share of each op and what it makes of the limits of a core, then the calls that take longest.
  void print(const Program& program, const Limits& limits) const;
  // [{"op": ..., "origin": ..., "shapes": ..., "cpu_ms": ..., "operations": ..., "bytes": ...}, ...] in the
  // order of the calls.
  std::string json(const Program& program) const;

 private:
  double milliseconds(size_t index) const;

  const EntryRecord& entry_;
  double started_ = 0;
  int64_t runs_ = 0;
  std::vector<double> seconds_;
};

}  // namespace pockc::cli

#endif  // POCKC_CLI_PROFILE_H_
