// What `pock-run` needs for a run: a program, samples, options, in a directory of their own.
#ifndef POCKC_TEST_WORKSPACE_H_
#define POCKC_TEST_WORKSPACE_H_

#include <string>
#include <vector>

#include "check.h"
#include "commands.h"
#include "json.h"
#include "npz.h"
#include "program_writer.h"

namespace pockc::test {

struct Workspace {
  explicit Workspace(const ProgramWriter& writer = mean_program(), int64_t samples = 11) {
    write_file(directory.path("model.pock"), writer.bytes());
    std::vector<float> x;
    std::vector<int64_t> labels;
    for (int64_t i = 0; i < samples; ++i) {
      for (int k = 0; k < 4; ++k)
        x.push_back(0.3f * static_cast<float>((i * 5 + k * 3) % 7) + 0.01f * static_cast<float>(i));
      labels.push_back(i % 4);
    }
    write_samples("train.npz", x, labels);
    options.verb = "train";
    options.model = directory.path("model.pock");
    options.data = directory.path("train.npz");
    options.save = directory.path("a.ckpt");
    options.epochs = 3;
    options.quiet = true;
  }

  void write_samples(const char* name, const std::vector<float>& x,
                     const std::vector<int64_t>& labels) const {
    const int64_t samples = static_cast<int64_t>(labels.size());
    cli::NumpyArray a{"pixel_values",
                      cli::NumpyType::kF32,
                      {samples, 4},
                      reinterpret_cast<const uint8_t*>(x.data()),
                      x.size() * 4};
    cli::NumpyArray b{"labels",
                      cli::NumpyType::kI64,
                      {samples},
                      reinterpret_cast<const uint8_t*>(labels.data()),
                      labels.size() * 8};
    if (cli::write_npz(directory.path(name), {a, b}) != PK_OK) CHECK(false && "cannot write samples");
  }

  std::string checkpoint() const { return read_file(options.save); }

  // What a run with --json writes; null when it is no JSON.
  Json report() const {
    const std::string text = read_file(options.json);
    Json report;
    if (!parse_json(text.data(), text.size(), &report)) CHECK(false && "the report is not JSON");
    return report;
  }

  TemporaryDirectory directory;
  cli::Options options;
};

}  // namespace pockc::test

#endif  // POCKC_TEST_WORKSPACE_H_
