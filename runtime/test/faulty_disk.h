// Disks for tests: one that fails or ends the process at a chosen call, and one that writes down all calls,
// so that whatever a power cut may leave of them can be laid out.
#ifndef POCKC_TEST_FAULTY_DISK_H_
#define POCKC_TEST_FAULTY_DISK_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "file.h"

namespace pockc::test {

enum class Fault {
  kNone,        // calls are counted, all pass
  kFail,        // the call fails with `code` and does nothing, the next ones pass
  kFailHalf,    // the same, but a write has written half before
  kStayBroken,  // this and all later calls fail
  kDieBefore,   // the process ends instead of the call
  kDieHalf,     // a write writes half, then the process ends
  kDieAfter,    // the process ends after the call
};

// Call number `at` (from 0) of open, write, fsync, close, rename, unlink, pread, pwrite and ftruncate
// together has the fault.
void set_fault(Fault fault, int64_t at, int code);
int64_t calls_seen();  // since set_fault
const FileSystem& faulty_disk();

constexpr int kDied = 77;  // exit status of a process that ended at its fault

// What one save asked of the disk, in order.
struct DiskCall {
  enum Kind { kCreate, kWrite, kSync, kRename, kSyncDirectory, kOther } kind;
  std::string bytes;  // of a write
};

// Passes calls on and records them.
void start_recording();
const std::vector<DiskCall>& recorded_calls();
const FileSystem& recording_disk();

// Everything that may be under the name of the checkpoint after a power cut that follows the first `count` of
// the recorded calls of a save. Data is certain to be there after its fsync, names after that of the
// directory; before, each write may be lost, there by half, or there, in any combination, and directory
// changes may have been done up to any point. Missing bytes in front of others read as zeros.
struct DiskOptions {
  bool syncs_data = true;         // false: a disk that ignores fsync of files
  bool syncs_directories = true;  // false: one that ignores fsync of directories
};
std::vector<std::string> contents_after_power_cut(const std::vector<DiskCall>& calls, size_t count,
                                                  const std::string& before, const DiskOptions& options);

}  // namespace pockc::test

#endif  // POCKC_TEST_FAULTY_DISK_H_
