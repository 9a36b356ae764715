// The command line: one table of flags, one record of values.
#ifndef POCKC_CLI_ARGS_H_
#define POCKC_CLI_ARGS_H_

#include <cstdint>
#include <string>

namespace pockc::cli {

struct Options {
  std::string verb;
  std::string model;
  std::string data, eval, save, checkpoint, output, json;
  int64_t epochs = 1;
  int64_t threads = 1;
  int64_t seed = 0;
  int64_t save_every = 0;  // steps; 0: at the end of each epoch alone
  int64_t max_steps = 0;   // 0: no limit
  int64_t steps = 50;
  double learning_rate = -1;  // negative: the program's
  bool seed_given = false;
  bool resume = false;
  bool read_weights = false;
  bool profile = false;
  bool quiet = false;
  bool help = false;
};

// Parses argv. On failure returns false and fills `error` with one sentence.
bool parse_arguments(int argc, char** argv, Options* options, std::string* error);

// The text of --help.
std::string usage();

}  // namespace pockc::cli

#endif  // POCKC_CLI_ARGS_H_
