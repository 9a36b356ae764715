// Drives a fuzz target where the compiler has no libFuzzer: valid inputs, changed at random but the same way
// each time, for some seconds.
//   fuzz_program [--seconds N] [--seed N] [FILE or DIRECTORY]...     more inputs to start from
//   fuzz_program --write-seeds DIRECTORY                             writes the built-in ones there
// An input that ends the process is in the file `fuzz-input` of the working directory.
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "dataset.h"
#include "fuzz.h"
#include "program_writer.h"

namespace {

using pockc::fuzz::put;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() { return pockc::cli::splitmix64(&state_); }
  size_t below(size_t limit) { return limit == 0 ? 0 : static_cast<size_t>(next() % limit); }

 private:
  uint64_t state_;
};

// Values at which arithmetic on sizes, counts and offsets goes wrong.
constexpr uint64_t kBoundaries[] = {0,          1,
                                    2,          3,
                                    7,          8,
                                    63,         64,
                                    65,         127,
                                    128,        255,
                                    256,        4095,
                                    4096,       0x7FFF,
                                    0x8000,     0xFFFF,
                                    65536,      0x7FFFFFFF,
                                    0x80000000, 0xFFFFFFFF,
                                    1ull << 32, (1ull << 40) - 1,
                                    1ull << 40, (1ull << 40) + 64,
                                    1ull << 62, ~0ull >> 1,
                                    1ull << 63, ~0ull - 63,
                                    ~0ull};

void flip_bits(Random* random, std::string* input) {
  for (size_t count = 1 + random->below(4); count > 0; --count) {
    char& byte = (*input)[random->below(input->size())];
    byte = static_cast<char>(byte ^ (1 << random->below(8)));
  }
}

void put_integer(Random* random, std::string* input) {
  const size_t width = size_t{1} << random->below(4);
  if (input->size() < width) return;
  size_t at = random->below(input->size() - width + 1);
  if (random->below(2) == 0) at -= at % width;
  uint64_t value = kBoundaries[random->below(sizeof(kBoundaries) / sizeof(kBoundaries[0]))];
  if (random->below(3) == 0) {  // near what is there
    value = 0;
    std::memcpy(&value, input->data() + at, width);
    value += random->below(17) - 8;
  }
  std::memcpy(&(*input)[at], &value, width);
}

// A run of digits in a text becomes another number.
void put_decimal(Random* random, std::string* input) {
  const size_t from = random->below(input->size());
  const size_t begin = input->find_first_of("0123456789", from);
  if (begin == std::string::npos) return;
  size_t end = input->find_first_not_of("0123456789", begin);
  if (end == std::string::npos) end = input->size();
  input->replace(begin, end - begin,
                 std::to_string(kBoundaries[random->below(sizeof(kBoundaries) / sizeof(kBoundaries[0]))]));
}

void cut(Random* random, std::string* input) { input->resize(random->below(input->size())); }

void remove_bytes(Random* random, std::string* input) {
  const size_t at = random->below(input->size());
  input->erase(at, 1 + random->below(64));
}

void repeat_bytes(Random* random, std::string* input) {
  const size_t at = random->below(input->size());
  input->insert(random->below(input->size()), input->substr(at, 1 + random->below(64)));
}

// Two pieces of the same length change places: rows of tables, sections.
void swap_pieces(Random* random, std::string* input) {
  static const size_t kSizes[] = {4, 8, 16, 24, 64, 256};
  const size_t size = kSizes[random->below(6)];
  if (input->size() < 2 * size) return;
  const size_t step = random->below(2) == 0 ? 1 : size;
  const size_t a = random->below((input->size() - size) / step + 1) * step;
  const size_t b = random->below((input->size() - size) / step + 1) * step;
  const std::string piece = input->substr(a, size);
  input->replace(a, size, input->substr(b, size));
  input->replace(b, size, piece);
}

// The start of one input and the end of another.
void splice(Random* random, std::string* input, const std::string& other) {
  const size_t at = random->below(std::min(input->size(), other.size()));
  input->replace(at, std::string::npos, other, at, std::string::npos);
}

void change(Random* random, const std::vector<std::string>& seeds, std::string* whole, bool focused) {
  const pockc::fuzz::Focus focus =
      focused ? pockc::fuzz::fuzz_focus(*whole) : pockc::fuzz::Focus{0, whole->size()};
  std::string input = whole->substr(focus.begin, focus.size);
  for (size_t count = 1 + random->below(4); count > 0 && !input.empty(); --count) {
    // What changes the length of a part makes all that follows it garbage: mostly seen at once.
    switch (focused ? 3 + random->below(29) : random->below(16)) {
      case 0:
        cut(random, &input);
        break;
      case 1:
        remove_bytes(random, &input);
        break;
      case 2:
        repeat_bytes(random, &input);
        break;
      case 3:
      case 4:
        swap_pieces(random, &input);
        break;
      case 5:
        splice(random, &input, seeds[random->below(seeds.size())]);
        break;
      case 6:
      case 7:
        put_decimal(random, &input);
        break;
      case 8:
      case 9:
        flip_bits(random, &input);
        break;
      default:
        put_integer(random, &input);
    }
  }
  whole->replace(focus.begin, focus.size, input);
}

std::string mutate(Random* random, const std::vector<std::string>& seeds) {
  std::string input = seeds[random->below(seeds.size())];
  change(random, seeds, &input, random->below(4) != 0);
  return input;
}

void add_files(const std::string& path, std::vector<std::string>* seeds) {
  DIR* directory = opendir(path.c_str());
  if (directory == nullptr) {
    seeds->push_back(pockc::test::read_file(path));
    return;
  }
  std::vector<std::string> names;
  while (const dirent* item = readdir(directory)) names.push_back(item->d_name);
  closedir(directory);
  std::sort(names.begin(), names.end());  // the same order on every file system
  for (const std::string& name : names) {
    if (name[0] != '.') seeds->push_back(pockc::test::read_file(path + "/" + name));
  }
}

// The input under way, in a file: it is there even after an abort.
class Witness {
 public:
  Witness() {
    file_ = open("fuzz-input", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file_ < 0) std::fprintf(stderr, "cannot write fuzz-input: a failing input will not be kept\n");
  }
  ~Witness() {
    if (file_ < 0) return;
    close(file_);
    unlink("fuzz-input");
  }
  Witness(const Witness&) = delete;
  Witness& operator=(const Witness&) = delete;

  void keep(const std::string& input) const {
    if (file_ < 0) return;
    if (ftruncate(file_, 0) != 0 || pwrite(file_, input.data(), input.size(), 0) < 0) return;
  }

 private:
  int file_;
};

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

double now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  std::vector<std::string> seeds = pockc::fuzz::fuzz_seeds();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seconds" && i + 1 < argc) {
      seconds = std::strtod(argv[++i], nullptr);
    } else if (argument == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--write-seeds" && i + 1 < argc) {
      return pockc::fuzz::write_seeds(argv[++i]);
    } else {
      add_files(argument, &seeds);
    }
  }
  if (seeds.empty()) return 1;
  const Witness witness;
  const double end = now() + seconds;
  for (const std::string& input : seeds) {
    witness.keep(input);
    run(input);
  }
  uint64_t count = 0;
  for (; now() < end; ++count) {
    Random random(seed * 0x9E3779B97F4A7C15ull + count);
    const std::string input = mutate(&random, seeds);
    witness.keep(input);
    run(input);
  }
  std::printf("%zu seeds, %llu inputs in %.1f s: every one ended in a status\n", seeds.size(),
              static_cast<unsigned long long>(count), seconds);
  return 0;
}
