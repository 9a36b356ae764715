#include "board.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "commands.h"

namespace pockc::cli {
namespace {

// The start of a file, up to 64 KiB; empty when it cannot be read. Device tree strings end in NUL.
std::string read_text(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return std::string();
  std::string text(64 * 1024, '\0');
  text.resize(std::fread(&text[0], 1, text.size(), file));
  std::fclose(file);
  while (!text.empty() && (text.back() == '\n' || text.back() == '\0')) text.pop_back();
  return text;
}

// What follows `key<blanks>:` in the first line that starts with it, of /proc/cpuinfo.
std::string find_value(const std::string& text, const std::string& key) {
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find('\n', at);
    if (end == std::string::npos) end = text.size();
    const std::string line = text.substr(at, end - at);
    const size_t colon = line.find(':');
    at = end + 1;
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    if (line.find_first_not_of(" \t", key.size()) != colon) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? std::string() : line.substr(begin);
  }
  return std::string();
}

std::string find_features(const std::string& cpuinfo) {
  static const char* const kNames[] = {"sse4_2",   "avx",      "avx2",     "fma",         "f16c",
                                       "avx512f",  "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16",
                                       "amx_bf16", "neon",     "vfpv4",    "asimd",       "asimdhp",
                                       "asimddp",  "i8mm",     "bf16",     "sve",         "sve2"};
  std::string list = find_value(cpuinfo, "flags");
  if (list.empty()) list = find_value(cpuinfo, "Features");
  if (list.empty()) return find_value(cpuinfo, "isa");  // RISC-V: one word, `rv64imafdcv`
  list = " " + list + " ";
  std::string found;
  for (const char* name : kNames) {
    if (list.find(" " + std::string(name) + " ") == std::string::npos) continue;
    found += (found.empty() ? "" : " ") + std::string(name);
  }
  return found;
}

double number(const std::string& text) { return std::strtod(text.c_str(), nullptr); }

void read_clock(const std::string& root, const std::string& cpuinfo, Board* board) {
  const std::string folder = root + "/sys/devices/system/cpu/cpu0/cpufreq/";
  board->governor = read_text(folder + "scaling_governor");
  board->max_clock_mhz = number(read_text(folder + "scaling_max_freq")) / 1000;
  board->clock_mhz = number(read_text(folder + "scaling_cur_freq")) / 1000;
  if (board->clock_mhz == 0) board->clock_mhz = number(find_value(cpuinfo, "cpu MHz"));
}

double read_temperature(const std::string& root) {
  double hottest = NAN;
  for (int zone = 0; zone < 16; ++zone) {
    const std::string text = read_text(root + format("/sys/class/thermal/thermal_zone%d/temp", zone));
    if (text.empty()) continue;
    const double celsius = number(text) / 1000;
    if (std::isnan(hottest) || celsius > hottest) hottest = celsius;
  }
  return hottest;
}

// Bits 0 to 3 say what is, bits 16 to 19 what was since boot, in the same order.
std::string describe_flags(int64_t flags) {
  static const char* const kCauses[] = {"too low a voltage", "a capped clock", "throttling",
                                        "the soft temperature limit"};
  std::string text;
  for (int bit = 0; bit < 4; ++bit) {
    const bool now = (flags >> bit & 1) != 0, before = (flags >> (16 + bit) & 1) != 0;
    if (!now && !before) continue;
    text += (text.empty() ? "" : ", ") + std::string(kCauses[bit]) + (now ? " now" : " since boot");
  }
  return text.empty() ? "none" : text;
}

void read_throttling(const std::string& root, Board* board) {
  const std::string flags = read_text(root + "/sys/devices/platform/soc/soc:firmware/get_throttled");
  if (!flags.empty()) {
    board->throttle_flags = std::strtoll(flags.c_str(), nullptr, 16);
    board->throttling = describe_flags(board->throttle_flags);
    return;
  }
  const std::string folder = root + "/sys/devices/system/cpu/cpu0/thermal_throttle/";
  const std::string count = read_text(folder + "core_throttle_count");
  if (count.empty()) return;
  board->throttling = number(count) == 0 ? "none" : "throttled " + count + " times since boot";
}

// `pmode:0002` in the status; `< POWER_MODEL ID=2 NAME=MODE_15W >` in the configuration.
std::string read_power_mode(const std::string& root) {
  const std::string status = read_text(root + "/var/lib/nvpmodel/status");
  const size_t colon = status.find(':');
  if (colon == std::string::npos) return std::string();
  const long id = std::strtol(status.c_str() + colon + 1, nullptr, 10);
  const std::string configuration = read_text(root + "/etc/nvpmodel.conf");
  const size_t at = configuration.find(format("POWER_MODEL ID=%ld NAME=", id));
  if (at == std::string::npos) return format("%ld", id);
  const size_t name = configuration.find("NAME=", at) + 5;
  return configuration.substr(name, configuration.find_first_of(" >\n", name) - name) + format(" (%ld)", id);
}

}  // namespace

Board read_board(const std::string& root) {
  Board board;
  const std::string cpuinfo = read_text(root + "/proc/cpuinfo");
  board.model = read_text(root + "/proc/device-tree/model");
  for (const char* key : {"model name", "Model", "Hardware"}) {
    if (board.model.empty()) board.model = find_value(cpuinfo, key);
  }
  board.features = find_features(cpuinfo);
  read_clock(root, cpuinfo, &board);
  board.celsius = read_temperature(root);
  read_throttling(root, &board);
  board.power_mode = read_power_mode(root);
  return board;
}

std::string describe(const Board& board) {
  std::string text;
  const auto line = [&text](const char* title, const std::string& value) {
    if (!value.empty()) text += format("%-5s ", title) + value + "\n";
  };
  line("board", board.model);
  line("has", board.features);
  std::string clock = board.clock_mhz > 0 ? format("%.0f MHz", board.clock_mhz) : "";
  if (!clock.empty() && board.max_clock_mhz > 0) clock += format(" of %.0f", board.max_clock_mhz);
  if (!clock.empty() && !board.governor.empty()) clock += " (" + board.governor + ")";
  if (!std::isnan(board.celsius)) clock += format("%s%.1f C", clock.empty() ? "" : ", ", board.celsius);
  line("clock", clock);
  line("limit", board.throttling);
  line("power", board.power_mode);
  return text;
}

void add_board(const Board& board, JsonObject* report) {
  report->add("board", board.model).add("cpu_features", board.features);
  report->add("clock_mhz", board.clock_mhz > 0 ? board.clock_mhz : NAN);
  report->add("max_clock_mhz", board.max_clock_mhz > 0 ? board.max_clock_mhz : NAN);
  report->add("governor", board.governor).add("celsius", board.celsius);
  report->add("throttle_flags", board.throttle_flags >= 0 ? static_cast<double>(board.throttle_flags) : NAN);
  report->add("throttling", board.throttling).add("power_mode", board.power_mode);
}

}  // namespace pockc::cli
