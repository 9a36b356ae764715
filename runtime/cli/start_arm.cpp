// Where a static 32-bit ARM program begins: does this CPU have what everything else is compiled for?
//
// The C library's start-up code is compiled for ARMv7 too, so the question comes before it, in instructions
// that every ARM core has. The kernel leaves the CPU's features (AT_HWCAP = 16) behind arguments and
// environment on the stack. NEON is bit 12, VFPv4 with its fused multiply-add bit 16. Registers and stack are
// left as they were found.
#if defined(__arm__)

__asm__(R"(
  .syntax unified
  .arch armv4t
  .arm
  .section .text.pockc_start, "ax", %progbits
  .balign 4
  .global pockc_start
  .type pockc_start, %function
pockc_start:
  ldr r5, [sp]
  add r5, sp, r5, lsl #2
  add r5, r5, #8
.Lenvironment:
  ldr r6, [r5], #4
  cmp r6, #0
  bne .Lenvironment
.Lauxiliary:
  ldr r6, [r5], #4
  ldr r7, [r5], #4
  cmp r6, #0
  beq .Lrefuse
  cmp r6, #16
  bne .Lauxiliary
  and r7, r7, #0x11000
  cmp r7, #0x11000
  bne .Lrefuse
  ldr r12, .Loffset
.Lhere:
  add r12, pc, r12
  bx r12
.Lrefuse:
  mov r0, #2
  adr r1, .Lmessage
  mov r2, #(.Lmessage_end - .Lmessage)
  mov r7, #4
  svc #0
  mov r0, #1
  mov r7, #1
  svc #0
  .balign 4
.Loffset:
  .word _start - (.Lhere + 8)
.Lmessage:
  .ascii "pock-run: this CPU lacks NEON with fused multiply-add (VFPv4), which this binary is compiled for\n"
.Lmessage_end:
  .size pockc_start, . - pockc_start
)");

#endif
