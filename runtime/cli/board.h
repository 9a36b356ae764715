// What a board says of itself in files: model, instruction sets, clock, temperature, throttling, power mode.
#ifndef POCKC_CLI_BOARD_H_
#define POCKC_CLI_BOARD_H_

#include <cstdint>
#include <string>

#include "measure.h"

namespace pockc::cli {

// What is not known is empty, 0, NaN or -1.
struct Board {
  std::string model;         // `Raspberry Pi 4 Model B Rev 1.4`, or the processor's name
  std::string features;      // of those that kernels may use, in the words of /proc/cpuinfo
  double clock_mhz = 0;      // of the first core, now
  double max_clock_mhz = 0;  // that the governor may choose
  std::string governor;
  double celsius = 0;           // of the hottest zone; NaN: unknown
  int64_t throttle_flags = -1;  // of a Raspberry Pi: the bits of `vcgencmd get_throttled`
  std::string throttling;       // in words: `none`, or what limits the clock now, or did so since boot
  std::string power_mode;       // of a Jetson: `MAXN (0)`
};

// Files alone are read, below `root`: empty, or a directory for tests.
Board read_board(const std::string& root);

// One line for each that is known.
std::string describe(const Board& board);
void add_board(const Board& board, JsonObject* report);

}  // namespace pockc::cli

#endif  // POCKC_CLI_BOARD_H_
