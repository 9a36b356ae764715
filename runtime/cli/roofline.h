// What a call does, and what a core can do at most: a profile shows how near its limit each kernel is.
#ifndef POCKC_CLI_ROOFLINE_H_
#define POCKC_CLI_ROOFLINE_H_

#include "session.h"

namespace pockc::cli {

// Of one run of a call.
struct Work {
  // Of products and convolutions, a multiply-add as two, and a convolution by Winograd's algorithm as one
  // without; 0 for everything else.
  double operations = 0;
  double bytes = 0;  // of operands and results, as far as they are read or written
};
Work work_of(const Program& program, const EntryRecord& entry, const CallRecord& call);

// Measured, on one core, in a tenth of a second or so; 0 where there is no memory to measure it with.
struct Limits {
  // Multiply-adds of float32 in registers, by the instruction set that the kernels use here.
  double gflops = 0;
  // A second, to and from memory: a[i] = b[i] + c[i] over arrays that few caches hold.
  double gigabytes = 0;
};
Limits measure_limits();

}  // namespace pockc::cli

#endif  // POCKC_CLI_ROOFLINE_H_
