#include "args.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace pockc::cli {
namespace {

enum Verb : unsigned { kTrain = 1, kEval = 2, kInfer = 4, kBench = 8, kSelftest = 16, kInfo = 32, kAll = 63 };

struct VerbRow {
  const char* name;
  Verb verb;
  bool needs_data;
  const char* help;
};

constexpr VerbRow kVerbs[] = {
    {"train", kTrain, true, "fine-tune the model on samples"},
    {"eval", kEval, true, "loss and accuracy on samples"},
    {"infer", kInfer, true, "run the model on samples and write its outputs"},
    {"bench", kBench, false, "time training steps on made-up samples"},
    {"selftest", kSelftest, false, "compare this machine's results with those stored in the program"},
    {"info", kInfo, false, "what the program holds and wants"},
};

// One of the four members says where the value goes; a flag without a value sets `boolean`.
struct Flag {
  const char* name;
  const char* value;  // null: takes none
  unsigned verbs;
  std::string Options::* text;
  int64_t Options::* integer;
  double Options::* real;
  bool Options::* boolean;
  int64_t least;
  const char* help;
};

constexpr Flag text_flag(const char* name, const char* value, unsigned verbs, std::string Options::* to,
                         const char* help) {
  return Flag{name, value, verbs, to, nullptr, nullptr, nullptr, 0, help};
}
constexpr Flag int_flag(const char* name, unsigned verbs, int64_t Options::* to, int64_t least,
                        const char* help) {
  return Flag{name, "N", verbs, nullptr, to, nullptr, nullptr, least, help};
}
constexpr Flag real_flag(const char* name, unsigned verbs, double Options::* to, const char* help) {
  return Flag{name, "X", verbs, nullptr, nullptr, to, nullptr, 0, help};
}
constexpr Flag bool_flag(const char* name, unsigned verbs, bool Options::* to, const char* help) {
  return Flag{name, nullptr, verbs, nullptr, nullptr, nullptr, to, 0, help};
}

const Flag kFlags[] = {
    text_flag("--data", "FILE.npz", kTrain | kEval | kInfer, &Options::data,
              "samples: one array per input, the first axis counts samples"),
    int_flag("--epochs", kTrain, &Options::epochs, 1, "passes over the data (1)"),
    text_flag("--eval", "FILE.npz", kTrain, &Options::eval, "evaluate on these samples after each epoch"),
    text_flag("--save", "FILE", kTrain, &Options::save,
              "checkpoint, written after each epoch and when interrupted"),
    text_flag("--save-every", "N[s]", kTrain, &Options::save_interval,
              "also write it after every N steps, or N seconds (90s), minutes (5m), hours (1h)"),
    real_flag("--max-write-mb-per-hour", kTrain, &Options::max_megabytes_per_hour,
              "save later where it would be more; the best and the last checkpoint are written always"),
    bool_flag("--resume", kTrain, &Options::resume, "continue exactly where the --save file was written"),
    text_flag("--validation", "FILE.npz", kTrain, &Options::validation,
              "samples whose loss after each epoch decides on --patience and --save-best"),
    real_flag("--validation-split", kTrain, &Options::validation_split,
              "or hold this fraction of --data back for it (0.1)"),
    int_flag("--patience", kTrain, &Options::patience, 1, "stop after N epochs without a better one"),
    text_flag("--save-best", "FILE", kTrain, &Options::save_best, "checkpoint of the best epoch"),
    int_flag(
        "--retries", kTrain, &Options::retries, 0,
        "times to go back to the last good state and halve the learning rate when the loss or a state is "
        "NaN or infinite (3)"),
    text_flag(
        "--cache-prefix", "DIR", kTrain, &Options::cache_prefix,
        "keep there what the frozen prefix makes of each sample, for later epochs and runs; needs a program "
        "built with --cache-prefix"),
    text_flag("--cache-limit", "SIZE", kTrain, &Options::cache_limit,
              "that the files there may take together; other samples are computed each time (2GiB)"),
    text_flag("--cache-dtype", "TYPE", kTrain, &Options::cache_dtype,
              "how it is kept: f32, which changes no result, or about, in f16 or int8 (f32)"),
    real_flag("--learning-rate", kTrain, &Options::learning_rate,
              "instead of the program's base learning rate"),
    int_flag("--seed", kTrain, &Options::seed, 0, "of the order of samples (0)"),
    int_flag("--max-steps", kTrain, &Options::max_steps, 1, "stop after N steps of this run"),
    real_flag("--max-seconds", kTrain, &Options::max_seconds, "stop after the step that reaches X seconds"),
    text_flag("--checkpoint", "FILE", kEval | kInfer, &Options::checkpoint, "use its weights"),
    text_flag("--output", "FILE.npz", kInfer, &Options::output, "where the outputs go (-o)"),
    int_flag("--steps", kBench, &Options::steps, 1, "steps to time (50)"),
    text_flag("--entry", "NAME", kBench, &Options::entry, "what a step is (train_step)"),
    bool_flag("--read-weights", kBench, &Options::read_weights,
              "read all mapped weights first, so that resident memory counts them"),
    bool_flag("--profile", kBench, &Options::profile, "show where the time of a step goes, call by call"),
    int_flag("--threads", kTrain | kEval | kInfer | kBench | kSelftest, &Options::threads, 1, "threads (1)"),
    text_flag("--json", "FILE", kTrain | kEval | kBench, &Options::json, "write a report"),
    bool_flag("--quiet", kTrain | kEval | kInfer, &Options::quiet, "no progress"),
    bool_flag("--help", kAll, &Options::help, "this text (-h)"),
};

const VerbRow* find_verb(const std::string& name) {
  for (const VerbRow& row : kVerbs) {
    if (name == row.name) return &row;
  }
  return nullptr;
}

const Flag* find_flag(const std::string& name) {
  const std::string full = name == "-o" ? "--output" : name == "-h" ? "--help" : name;
  for (const Flag& flag : kFlags) {
    if (full == flag.name) return &flag;
  }
  return nullptr;
}

bool parse_integer(const std::string& text, int64_t least, int64_t* out) {
  char* end = nullptr;
  errno = 0;
  *out = std::strtoll(text.c_str(), &end, 10);
  return errno == 0 && !text.empty() && *end == '\0' && *out >= least;
}

bool parse_real(const std::string& text, double* out) {
  char* end = nullptr;
  *out = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == '\0' && std::isfinite(*out) && *out >= 0;
}

bool set_value(const Flag& flag, const std::string& value, Options* options, std::string* error) {
  if (flag.text != nullptr) {
    options->*flag.text = value;
    if (value.empty()) *error = std::string(flag.name) + " needs a value: " + flag.value;
    return !value.empty();
  }
  if (flag.integer != nullptr) {
    if (parse_integer(value, flag.least, &(options->*flag.integer))) return true;
    *error = std::string(flag.name) + " wants a whole number from " + std::to_string(flag.least) +
             " on, not `" + value + "`";
    return false;
  }
  if (parse_real(value, &(options->*flag.real))) return true;
  *error = std::string(flag.name) + " wants a number from 0 on, not `" + value + "`";
  return false;
}

// One argument that starts with a dash; `index` moves on when its value is the next one.
bool parse_flag(int argc, char** argv, int* index, unsigned verb, Options* options, std::string* error) {
  const std::string argument = argv[*index];
  const size_t equals = argument.find('=');
  const std::string name = argument.substr(0, equals);
  const Flag* flag = find_flag(name);
  if (flag == nullptr || (flag->verbs & verb) == 0) {
    *error = "unknown flag " + name + (options->verb.empty() ? "" : " of `" + options->verb + "`");
    return false;
  }
  if (flag->value == nullptr) {
    if (equals != std::string::npos) *error = name + " takes no value";
    options->*flag->boolean = true;
    return equals == std::string::npos;
  }
  if (flag->integer == &Options::seed) options->seed_given = true;
  if (equals != std::string::npos) return set_value(*flag, argument.substr(equals + 1), options, error);
  if (*index + 1 >= argc) {
    *error = name + " needs a value: " + flag->value;
    return false;
  }
  return set_value(*flag, argv[++*index], options, error);
}

// `20`: steps; `90s`, `5m`, `1h`: a time.
bool parse_interval(Options* options) {
  std::string number = options->save_interval;
  if (number.empty()) return true;
  const std::string units = "smh";
  const size_t unit = units.find(number.back());
  if (unit == std::string::npos) return parse_integer(number, 1, &options->save_every);
  number.pop_back();
  int64_t count = 0;
  if (!parse_integer(number, 1, &count)) return false;
  constexpr double kSeconds[] = {1, 60, 3600};
  options->save_seconds = static_cast<double>(count) * kSeconds[unit];
  return true;
}

// Of the flags about validation: what is wrong with them, or nothing.
const char* validation_mistake(const Options& options) {
  const bool split = options.validation_split > 0;
  if (options.validation_split >= 1) return "--validation-split wants a fraction below 1";
  if (!options.save_best.empty() && options.save_best == options.save)
    return "--save and --save-best need two files";
  if (split && !options.validation.empty()) return "give --validation or --validation-split, not both";
  if (split || !options.validation.empty()) return "";
  if (options.patience > 0) return "--patience needs --validation FILE.npz or --validation-split X";
  if (!options.save_best.empty()) return "--save-best needs --validation FILE.npz or --validation-split X";
  return "";
}

// `2GiB`, `500MB`, `65536`.
bool parse_size(const std::string& text, uint64_t* out) {
  static const struct {
    const char* name;
    double bytes;
  } kUnits[] = {{"", 1},     {"B", 1},         {"KB", 1e3},      {"MB", 1e6},
                {"GB", 1e9}, {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}};
  const size_t end = text.find_first_not_of("0123456789.");
  double number = 0;
  if (!parse_real(text.substr(0, end), &number)) return false;
  const std::string unit = end == std::string::npos ? "" : text.substr(end);
  for (const auto& row : kUnits) {
    if (unit != row.name || number * row.bytes >= 1e18) continue;
    *out = static_cast<uint64_t>(number * row.bytes);
    return true;
  }
  return false;
}

// Of the flags about the cache: what is wrong with them, or nothing.
const char* cache_mistake(Options* options) {
  const std::string& dtype = options->cache_dtype;
  if (options->cache_prefix.empty() && !options->cache_limit.empty())
    return "--cache-limit needs --cache-prefix DIR";
  if (options->cache_prefix.empty() && !dtype.empty()) return "--cache-dtype needs --cache-prefix DIR";
  if (!dtype.empty() && dtype != "f32" && dtype != "f16" && dtype != "int8")
    return "--cache-dtype wants f32, f16 or int8";
  if (!options->cache_limit.empty() && !parse_size(options->cache_limit, &options->cache_bytes))
    return "--cache-limit wants a size (2GiB, 500MB)";
  return "";
}

bool check_complete(const VerbRow& row, Options* given, std::string* error) {
  const bool interval = parse_interval(given);
  const Options& options = *given;
  if (options.model.empty())
    *error = "`" + options.verb + "` needs a program: pock-run " + options.verb + " MODEL.pock";
  else if (row.needs_data && options.data.empty())
    *error = "`" + options.verb + "` needs --data FILE.npz";
  else if (row.verb == kInfer && options.output.empty())
    *error = "`infer` needs -o FILE.npz";
  else if (options.resume && options.save.empty())
    *error = "--resume needs --save FILE: the checkpoint to continue from";
  else if (!options.save_interval.empty() && options.save.empty())
    *error = "--save-every needs --save FILE";
  else if (!interval)
    *error = "--save-every wants a number of steps (20) or a time (90s, 5m, 1h), not `" +
             options.save_interval + "`";
  else
    *error = validation_mistake(options);
  if (error->empty()) *error = cache_mistake(given);
  return error->empty();
}

}  // namespace

bool parse_arguments(int argc, char** argv, Options* options, std::string* error) {
  error->clear();
  const VerbRow* row = argc > 1 ? find_verb(argv[1]) : nullptr;
  if (row == nullptr) {
    const std::string first = argc > 1 ? argv[1] : "";
    options->help = first == "--help" || first == "-h" || first == "help";
    if (!options->help) *error = first.empty() ? "a verb is missing" : "unknown verb `" + first + "`";
    return options->help;
  }
  options->verb = row->name;
  for (int i = 2; i < argc; ++i) {
    if (argv[i][0] == '-' && argv[i][1] != '\0') {
      if (!parse_flag(argc, argv, &i, row->verb, options, error)) return false;
    } else if (options->model.empty()) {
      options->model = argv[i];
    } else {
      *error = std::string("unexpected argument `") + argv[i] + "`";
      return false;
    }
  }
  return options->help || check_complete(*row, options, error);
}

std::string usage() {
  std::string text = "pock-run VERB MODEL.pock [flags]\n";
  for (const VerbRow& row : kVerbs) {
    text += std::string("\n  ") + row.name + ": " + row.help + "\n";
    for (const Flag& flag : kFlags) {
      if ((flag.verbs & row.verb) == 0 || flag.verbs == kAll) continue;
      std::string left =
          std::string("    ") + flag.name + (flag.value == nullptr ? "" : std::string(" ") + flag.value);
      left.resize(left.size() < 28 ? 28 : left.size() + 1, ' ');
      text += left + flag.help + "\n";
    }
  }
  return text +
         "\nExit status: 0 done, 1 failed (one line on stderr says why), 2 wrong arguments, 3 paused by "
         "SIGTERM or "
         "SIGINT (saved: continue with --resume), 128+n stopped by signal n with nothing saved.\n";
}

}  // namespace pockc::cli
