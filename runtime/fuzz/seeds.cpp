#include "fuzz.h"
#include "program_writer.h"

namespace pockc::fuzz {

int write_seeds(const std::string& directory) {
  const std::vector<std::string> seeds = fuzz_seeds();
  for (size_t i = 0; i < seeds.size(); ++i)
    test::write_file(directory + "/built-in-" + std::to_string(i), seeds[i]);
  return seeds.empty() ? 1 : 0;
}

}  // namespace pockc::fuzz
