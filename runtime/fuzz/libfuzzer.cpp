// What libFuzzer calls first: `fuzz_program --write-seeds DIRECTORY` writes the built-in inputs and ends, as
// with driver.cpp.
#include <cstdlib>
#include <cstring>

#include "fuzz.h"

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  if (*argc == 3 && std::strcmp((*argv)[1], "--write-seeds") == 0)
    std::exit(pockc::fuzz::write_seeds((*argv)[2]));
  return 0;
}
