// Where a training run is: everything that decides which samples come next, and what early stopping has seen.
#ifndef POCKC_CLI_CURSOR_H_
#define POCKC_CLI_CURSOR_H_

#include <cstdint>
#include <string>

namespace pockc::cli {

// Kept in the checkpoint as JSON.
struct Cursor {
  int64_t epoch = 0;  // complete epochs
  int64_t step = 0;   // steps done of the current one; all of them while its evaluation is still to come
  int64_t seed = 0;
  int64_t samples = 0;     // in the file
  double loss_sum = 0;     // of the current epoch
  int64_t held_out = 0;    // samples of the file that are for validation alone
  int64_t best_epoch = 0;  // the one with the least validation loss; 0: none yet
  double best_loss = 0;    // its validation loss
  int64_t retries = 0;     // roll-backs so far

  std::string json() const;
  // Cursors of before there was validation are good too.
  bool parse(const std::string& text);
};

}  // namespace pockc::cli

#endif  // POCKC_CLI_CURSOR_H_
