#include "measure.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>

#include "json.h"

namespace pockc::cli {
namespace {

double seconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

}  // namespace

double wall_seconds() { return seconds(CLOCK_MONOTONIC); }
double cpu_seconds() { return seconds(CLOCK_PROCESS_CPUTIME_ID); }

int64_t resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr) return 0;
  long long total = 0, resident = 0;
  const int fields = std::fscanf(file, "%lld %lld", &total, &resident);
  std::fclose(file);
  return fields == 2 ? resident * sysconf(_SC_PAGESIZE) : 0;
}

// Not getrusage: its ru_maxrss survives exec, and so reports the peak of a large parent.
int64_t peak_resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/status", "r");
  if (file == nullptr) return 0;
  char line[256];
  long long kibibytes = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "VmHWM: %lld kB", &kibibytes) == 1) break;
  }
  std::fclose(file);
  return static_cast<int64_t>(kibibytes) * 1024;
}

double percentile(std::vector<double> values, double fraction) {
  if (values.empty()) return 0;
  const size_t index = static_cast<size_t>(fraction * static_cast<double>(values.size() - 1) + 0.5);
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(index), values.end());
  return values[index];
}

void StepTimer::start() {
  wall_start_ = wall_seconds();
  cpu_start_ = cpu_seconds();
}

void StepTimer::stop() {
  cpu_.push_back(1e3 * (cpu_seconds() - cpu_start_));
  wall_.push_back(1e3 * (wall_seconds() - wall_start_));
}

void StepTimer::clear() {
  wall_.clear();
  cpu_.clear();
}

double StepTimer::mean_wall() const { return mean(wall_); }
double StepTimer::mean_cpu() const { return mean(cpu_); }

JsonObject& JsonObject::add_json(const char* key, const std::string& json) {
  members_ += (members_.empty() ? "" : ", ") + quote_json(key) + ": " + json;
  return *this;
}

JsonObject& JsonObject::add(const char* key, double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return add_json(key, std::isfinite(value) ? text : "null");
}

JsonObject& JsonObject::add(const char* key, int64_t value) { return add_json(key, std::to_string(value)); }
JsonObject& JsonObject::add(const char* key, const std::string& text) {
  return add_json(key, quote_json(text));
}

}  // namespace pockc::cli
