#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace pockc {
namespace {

constexpr unsigned bit(int number) { return 1u << number; }
constexpr bool all_of(unsigned word, unsigned bits) { return (word & bits) == bits; }

// Registers that the operating system saves when it changes threads: without, a set must not be used (XCR0).
unsigned saved_registers() {
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Whether the CPU has these features (leaf 7, EBX) beside AVX, FMA and F16C, and the system saves these
// registers.
bool has(unsigned features, unsigned registers) {
  constexpr unsigned kFma = bit(12), kXgetbv = bit(27), kAvx = bit(28), kF16c = bit(29);  // leaf 1, ECX
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !all_of(c, kFma | kXgetbv | kAvx | kF16c)) return false;
  if (!all_of(saved_registers(), registers)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && all_of(b, features);
}

constexpr unsigned kAvx2 = bit(5);
constexpr unsigned kAvx512 = bit(16) | bit(17) | bit(30) | bit(31);  // F, DQ, BW, VL
constexpr unsigned kVectors = bit(1) | bit(2);                       // xmm, ymm
constexpr unsigned kWideVectors = bit(5) | bit(6) | bit(7);          // masks, zmm

}  // namespace

bool cpu_has_avx2() { return has(kAvx2, kVectors); }
bool cpu_has_avx512() { return has(kAvx2 | kAvx512, kVectors | kWideVectors); }

bool cpu_has_avx512_bf16() {
  constexpr unsigned kBf16 = bit(5);  // leaf 7, second part, EAX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return cpu_has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && all_of(a, kBf16);
}

// Linux gives a process the 8 KiB of tiles where it asks for them: before, the first use of one is SIGILL.
bool cpu_has_amx() {
#if defined(__linux__)
  constexpr unsigned kTiles = bit(22) | bit(24);         // leaf 7, EDX: AMX-BF16, AMX-TILE
  constexpr unsigned kTileState = bit(17) | bit(18);     // configuration, data
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!cpu_has_avx512_bf16() || !all_of(saved_registers(), kTileState)) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || !all_of(d, kTiles)) return false;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace pockc
#endif
