// From arguments to a verb.
#include <cstdio>

#include "commands.h"
#include "pockc/kernel.h"

namespace pockc::cli {

int dispatch(int argc, char** argv) {
  static const struct {
    const char* verb;
    int (*run)(const Options&);
  } kCommands[] = {{"train", train}, {"eval", evaluate},     {"infer", infer},
                   {"bench", bench}, {"selftest", selftest}, {"info", info}};
  Options options;
  std::string error;
  if (!parse_arguments(argc, argv, &options, &error)) {
    std::fprintf(stderr, "pock-run: %s (see pock-run --help)\n", error.c_str());
    return 2;
  }
  if (options.help) {
    std::fputs(usage().c_str(), stdout);
    return 0;
  }
  if (const char* lacking = what_cpu_lacks()) {
    std::fprintf(
        stderr,
        "pock-run: this CPU lacks %s, which this binary was made for: build the program for a device "
        "without it, as --device x86-64\n",
        lacking);
    return 1;
  }
  for (const auto& command : kCommands) {
    if (options.verb == command.verb) return command.run(options);
  }
  return 2;
}

}  // namespace pockc::cli
