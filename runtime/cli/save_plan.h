// When checkpoints are written: after so many steps or seconds and at the end of epochs, but not faster than
// the storage shall wear.
#ifndef POCKC_CLI_SAVE_PLAN_H_
#define POCKC_CLI_SAVE_PLAN_H_

#include <cstdint>

namespace pockc::cli {

// Times are seconds on any one clock.
class SavePlan {
 public:
  // `every_steps`, `every_seconds`, `bytes_per_hour`: 0 for none.
  SavePlan(int64_t every_steps, double every_seconds, double bytes_per_hour)
      : every_steps_(every_steps), every_seconds_(every_seconds), bytes_per_hour_(bytes_per_hour) {}

  void start(double now) { last_ = now; }

  // Whether to save now, `steps` into the run. A save that comes too early for the limit stays wanted, and is
  // due as soon as the limit permits it.
  bool due(int64_t steps, bool epoch_ends, double now);

  // A checkpoint was written: one that was due, the best one or the last one. After b bytes no save is due
  // for b / bytes_per_hour hours; debts add up, so that the bytes due in any time t are at most t *
  // bytes_per_hour + one checkpoint.
  void written(uint64_t bytes, double now);
  // A save that was due failed: the next one is due when its time comes.
  void failed(double now);

  int64_t saves() const { return saves_; }
  uint64_t written_bytes() const { return written_bytes_; }
  int64_t deferred() const { return deferred_; }  // saves that had to wait

 private:
  int64_t every_steps_;
  double every_seconds_;
  double bytes_per_hour_;
  double last_ = 0;     // when a save was done or tried
  double allowed_ = 0;  // from when on one may be due
  bool wanted_ = false;
  int64_t saves_ = 0, deferred_ = 0;
  uint64_t written_bytes_ = 0;
};

}  // namespace pockc::cli

#endif  // POCKC_CLI_SAVE_PLAN_H_
