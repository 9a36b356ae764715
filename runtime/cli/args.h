// The command line: one table of flags, one record of values.
#ifndef POCKC_CLI_ARGS_H_
#define POCKC_CLI_ARGS_H_

#include <cstdint>
#include <string>

#include "file.h"

namespace pockc::cli {

struct Options {
  std::string verb;
  std::string model;
  std::string data, eval, save, checkpoint, output, json;
  std::string validation, save_best;
  std::string save_interval;  // the text of --save-every
  std::string cache_prefix, cache_limit, cache_dtype;
  int64_t epochs = 1;
  int64_t threads = 1;
  int64_t seed = 0;
  int64_t save_every = 0;   // steps; 0: at the end of each epoch alone
  double save_seconds = 0;  // 0: by steps alone
  int64_t max_steps = 0;    // 0: no limit
  double max_seconds = 0;
  double max_megabytes_per_hour = 0;
  uint64_t cache_bytes = uint64_t{2} << 30;
  int64_t patience = 0;  // epochs without a better validation loss; 0: no early stopping
  double validation_split = 0;
  int64_t retries = 3;  // roll-backs before a run with NaN or infinite values ends
  int64_t steps = 50;
  double learning_rate = -1;  // negative: the program's
  bool seed_given = false;
  bool resume = false;
  bool read_weights = false;
  bool profile = false;
  std::string entry = "train_step";
  bool quiet = false;
  bool help = false;
  const FileSystem* file_system = &posix_file_system();  // of checkpoints; for tests that make the disk fail
};

// Parses argv. On failure returns false and fills `error` with one sentence.
bool parse_arguments(int argc, char** argv, Options* options, std::string* error);

// The text of --help.
std::string usage();

}  // namespace pockc::cli

#endif  // POCKC_CLI_ARGS_H_
