#include "faulty_disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <set>

namespace pockc::test {
namespace {

struct Plan {
  Fault fault = Fault::kNone;
  int64_t at = 0;
  int code = 0;
  int64_t seen = 0;
};

Plan plan;

bool is_death(Fault fault) {
  return fault == Fault::kDieBefore || fault == Fault::kDieHalf || fault == Fault::kDieAfter;
}

// Whether this call is the one, counted; a call of a disk that stays broken is one from then on.
bool strikes() {
  const int64_t now = plan.seen++;
  if (plan.fault == Fault::kNone) return false;
  return plan.fault == Fault::kStayBroken ? now >= plan.at : now == plan.at;
}

// Runs `act`, or what the fault makes of it; `half` comes before a fault that strikes in the middle.
template <typename Act, typename Half>
auto attempt(Act act, Half half) -> decltype(act()) {
  if (!strikes()) return act();
  if (plan.fault == Fault::kFailHalf || plan.fault == Fault::kDieHalf) half();
  if (plan.fault == Fault::kDieAfter) act();
  if (is_death(plan.fault)) _exit(kDied);
  errno = plan.code;
  return -1;
}

template <typename Act>
auto attempt(Act act) -> decltype(act()) {
  return attempt(act, [] {});
}

std::vector<DiskCall> recording;
std::set<int> directories;

void record(DiskCall::Kind kind, std::string bytes = std::string()) {
  recording.push_back(DiskCall{kind, std::move(bytes)});
}

// Appends to `all` every content that these writes may leave.
void add_contents(const std::vector<const std::string*>& writes, size_t index, uint64_t offset,
                  const std::string& so_far, std::set<std::string>* all) {
  if (index == writes.size()) {
    all->insert(so_far);
    return;
  }
  const std::string& bytes = *writes[index];
  for (const size_t kept : {size_t{0}, bytes.size() / 2, bytes.size()}) {
    std::string next = so_far;
    if (kept > 0) next.resize(offset, '\0');  // a hole where writes before this one were lost
    next += bytes.substr(0, kept);
    add_contents(writes, index + 1, offset + bytes.size(), next, all);
  }
}

}  // namespace

void set_fault(Fault fault, int64_t at, int code) { plan = Plan{fault, at, code, 0}; }
int64_t calls_seen() { return plan.seen; }

const FileSystem& faulty_disk() {
  static const FileSystem disk = {
      [](const char* path, int flags, mode_t mode) {
        return attempt([&] { return ::open(path, flags, mode); });
      },
      [](int file, const void* data, size_t size) {
        return attempt([&] { return ::write(file, data, size); },
                       [&] { return ::write(file, data, size / 2); });
      },
      [](int file) { return attempt([&] { return ::fsync(file); }); },
      [](int file) {
        const int result = attempt([] { return 0; });
        ::close(file);  // a failed close still closes
        return result;
      },
      [](const char* from, const char* to) { return attempt([&] { return ::rename(from, to); }); },
      [](const char* path) { return attempt([&] { return ::unlink(path); }); },
      [](int file, void* data, size_t size, off_t offset) {
        return attempt([&] { return ::pread(file, data, size, offset); });
      },
      [](int file, const void* data, size_t size, off_t offset) {
        return attempt([&] { return ::pwrite(file, data, size, offset); },
                       [&] { return ::pwrite(file, data, size / 2, offset); });
      },
      [](int file, off_t size) { return attempt([&] { return ::ftruncate(file, size); }); },
  };
  return disk;
}

void start_recording() {
  recording.clear();
  directories.clear();
}

const std::vector<DiskCall>& recorded_calls() { return recording; }

const FileSystem& recording_disk() {
  static const FileSystem disk = {
      [](const char* path, int flags, mode_t mode) {
        const int file = ::open(path, flags, mode);
        if ((flags & O_DIRECTORY) != 0) directories.insert(file);
        record((flags & O_CREAT) != 0 ? DiskCall::kCreate : DiskCall::kOther);
        return file;
      },
      [](int file, const void* data, size_t size) {
        record(DiskCall::kWrite, std::string(static_cast<const char*>(data), size));
        return ::write(file, data, size);
      },
      [](int file) {
        record(directories.count(file) != 0 ? DiskCall::kSyncDirectory : DiskCall::kSync);
        return ::fsync(file);
      },
      [](int file) {
        directories.erase(file);
        record(DiskCall::kOther);
        return ::close(file);
      },
      [](const char* from, const char* to) {
        record(DiskCall::kRename);
        return ::rename(from, to);
      },
      [](const char* path) {
        record(DiskCall::kOther);
        return ::unlink(path);
      },
      ::pread,
      ::pwrite,
      ::ftruncate,
  };
  return disk;
}

std::vector<std::string> contents_after_power_cut(const std::vector<DiskCall>& calls, size_t count,
                                                  const std::string& before, const DiskOptions& options) {
  std::string certain;                        // of the new file
  std::vector<const std::string*> uncertain;  // its writes since the last fsync
  bool renamed = false, certainly_renamed = false;
  for (size_t i = 0; i < count; ++i) {
    const DiskCall& call = calls[i];
    renamed = renamed || call.kind == DiskCall::kRename;
    if (call.kind == DiskCall::kSyncDirectory && options.syncs_directories) certainly_renamed = renamed;
    if (call.kind == DiskCall::kWrite) uncertain.push_back(&call.bytes);
    if (call.kind != DiskCall::kSync || !options.syncs_data) continue;
    for (const std::string* bytes : uncertain) certain += *bytes;
    uncertain.clear();
  }
  std::set<std::string> all;
  if (renamed) add_contents(uncertain, 0, certain.size(), certain, &all);
  if (!certainly_renamed) all.insert(before);
  return std::vector<std::string>(all.begin(), all.end());
}

}  // namespace pockc::test
