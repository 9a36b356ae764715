// Clocks, memory of the process, and the JSON of reports.
#ifndef POCKC_CLI_MEASURE_H_
#define POCKC_CLI_MEASURE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace pockc::cli {

double wall_seconds();
double cpu_seconds();      // of all threads of the process
int64_t resident_bytes();  // now
int64_t peak_resident_bytes();

// The value below which `fraction` of the values lie; 0 when there are none.
double percentile(std::vector<double> values, double fraction);

// Wall and CPU time of steps, in milliseconds.
class StepTimer {
 public:
  void start();
  void stop();
  void clear();

  size_t steps() const { return wall_.size(); }
  double mean_wall() const;
  double mean_cpu() const;
  double wall(double fraction) const { return percentile(wall_, fraction); }
  double cpu(double fraction) const { return percentile(cpu_, fraction); }

 private:
  double wall_start_ = 0, cpu_start_ = 0;
  std::vector<double> wall_, cpu_;
};

// Builds a JSON object: {"key": value, ...}. Numbers that JSON lacks (NaN, infinities) become null.
class JsonObject {
 public:
  JsonObject& add(const char* key, double value);
  JsonObject& add(const char* key, int64_t value);
  JsonObject& add(const char* key, const std::string& text);
  JsonObject& add_json(const char* key, const std::string& json);
  std::string text() const { return "{" + members_ + "}"; }

 private:
  std::string members_;
};

}  // namespace pockc::cli

#endif  // POCKC_CLI_MEASURE_H_
