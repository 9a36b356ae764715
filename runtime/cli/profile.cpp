#include "profile.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "measure.h"

namespace pockc::cli {
namespace {

constexpr size_t kMostCalls = 25;  // that are listed one by one

// `[8,56,56,24] [144,1,1,24] > [8,56,56,144]`
std::string shapes(const Program& program, const EntryRecord& entry, const CallRecord& call) {
  std::string text;
  const auto add = [&](const Span<uint32_t>& tensors) {
    for (const uint32_t index : tensors) {
      const Tensor& type = program.tensors[index].type;
      text += ShapeText(type.rank, type.dims).text;
      text += ' ';
    }
  };
  add(entry.inputs_of(call));
  text += "> ";
  add(entry.outputs_of(call));
  text.pop_back();
  return text;
}

// Indices of the largest values, largest first.
std::vector<size_t> by_size(const std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
  return order;
}

// `84.1 GF/s  72%`, or `9.3 GB/s  60%` where moving the operands from memory would take longer than the
// products.
std::string rate(const Work& work, double ms, const Limits& limits) {
  const bool products =
      work.operations > 0 && work.operations * limits.gigabytes >= work.bytes * limits.gflops;
  const double amount = products ? work.operations : work.bytes, reached = 1e-6 * amount / ms;
  const double limit = products ? limits.gflops : limits.gigabytes;
  if (!(reached > 0)) return std::string();
  char text[64];
  std::snprintf(text, sizeof(text), "%8.1f %s", reached, products ? "GF/s" : "GB/s");
  const size_t length = std::strlen(text);
  if (limit > 0) std::snprintf(text + length, sizeof(text) - length, " %4.0f%%", 100 * reached / limit);
  return text;
}

}  // namespace

void Profile::before(const EntryRecord&, size_t) { started_ = cpu_seconds(); }

void Profile::after(const EntryRecord& entry, size_t index) {
  if (&entry != &entry_) return;
  seconds_[index] += cpu_seconds() - started_;
  runs_ += index == 0 ? 1 : 0;
}

void Profile::clear() {
  seconds_.assign(entry_.calls.size(), 0.0);
  runs_ = 0;
}

double Profile::milliseconds(size_t index) const {
  return 1e3 * seconds_[index] / static_cast<double>(std::max<int64_t>(1, runs_));
}

void Profile::print(const Program& program, const Limits& limits) const {
  double total = 0;
  struct Sum {
    int calls = 0;
    double ms = 0;
    Work work;
  };
  std::map<std::string, Sum> sums;
  for (size_t i = 0; i < seconds_.size(); ++i) {
    const Work work = work_of(program, entry_, entry_.calls[i]);
    Sum& sum = sums[program.strings[entry_.calls[i].op]];
    sum.calls += 1;
    sum.ms += milliseconds(i);
    sum.work.operations += work.operations;
    sum.work.bytes += work.bytes;
    total += milliseconds(i);
  }
  const std::vector<std::pair<std::string, Sum>> rows(sums.begin(), sums.end());
  std::vector<double> times;
  for (const auto& row : rows) times.push_back(row.second.ms);
  std::printf("limit %.1f GF/s of float32 in registers, %.1f GB/s from memory, one core\n", limits.gflops,
              limits.gigabytes);
  std::printf("%-28s %6s %12s %7s %18s\n", "op", "calls", "CPU ms/step", "share", "reached, of limit");
  for (const size_t index : by_size(times)) {
    const auto& [op, sum] = rows[index];
    std::printf("%-28s %6d %12.3f %6.1f%% %s\n", op.c_str(), sum.calls, sum.ms, 100 * sum.ms / total,
                rate(sum.work, sum.ms, limits).c_str());
  }
  std::printf("\n%-28s %12s %18s  %s\n", "longest calls", "CPU ms/step", "reached, of limit",
              "operands > results, origin");
  const std::vector<size_t> order = by_size(seconds_);
  for (size_t i = 0; i < std::min(order.size(), kMostCalls); ++i) {
    const CallRecord& call = entry_.calls[order[i]];
    const double ms = milliseconds(order[i]);
    std::printf("%-28s %12.3f %18s  %s  %s\n", program.strings[call.op].c_str(), ms,
                rate(work_of(program, entry_, call), ms, limits).c_str(),
                shapes(program, entry_, call).c_str(), program.strings[call.origin].c_str());
  }
}

std::string Profile::json(const Program& program) const {
  std::string text = "[";
  for (size_t i = 0; i < seconds_.size(); ++i) {
    const CallRecord& call = entry_.calls[i];
    JsonObject object;
    object.add("op", program.strings[call.op]).add("origin", program.strings[call.origin]);
    object.add("shapes", shapes(program, entry_, call));
    const Work work = work_of(program, entry_, call);
    object.add("cpu_ms", milliseconds(i)).add("operations", work.operations).add("bytes", work.bytes);
    text += (i == 0 ? "" : ", ") + object.text();
  }
  return text + "]";
}

}  // namespace pockc::cli
