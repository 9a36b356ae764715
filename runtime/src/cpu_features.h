// Which instruction sets this x86 CPU and its operating system have.
//
// The CPU is asked here: __builtin_cpu_supports reads a table of the compiler's runtime library, and that of
// zig is a stub in which no CPU has anything.
#ifndef POCKC_SRC_CPU_FEATURES_H_
#define POCKC_SRC_CPU_FEATURES_H_

namespace pockc {

bool cpu_has_avx2();         // with fused multiply-add and conversions of 16-bit floats
bool cpu_has_avx512();       // F, BW, DQ and VL, and what cpu_has_avx2 asks for
bool cpu_has_avx512_bf16();  // products of bfloat16, and what cpu_has_avx512 asks for
bool cpu_has_amx();  // tiles of bfloat16, and what cpu_has_avx512_bf16 asks for; this process may use them

}  // namespace pockc

#endif  // POCKC_SRC_CPU_FEATURES_H_
