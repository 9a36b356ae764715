// A plugin for qemu-user 7.2 that counts executed 64-bit ARM instructions by class, and prints them at the end.
//
//   cc -O2 -shared -fPIC count_instructions.c -o libcount.so; qemu-aarch64 -plugin ./libcount.so -d plugin PROGRAM
#include <stdio.h>
#include <string.h>

#include "qemu_plugin.h"

enum { kTotal, kVectorFma, kOtherFloat, kLoad, kStore, kBranch, kInteger, kClasses };
static const char *const kNames[kClasses] = {"total", "vector_fma", "other_float_and_vector", "load",
                                             "store", "branch",     "integer"};
static uint64_t counts[kClasses];

// The top-level decode table of the Arm Architecture Reference Manual, C4.1: bits 25 to 28.
static int class_of(uint32_t word) {
  const uint32_t group = word >> 25 & 15;
  if ((group & 5) == 4) return word >> 22 & 1 ? kLoad : kStore;
  if ((group & 14) == 10) return kBranch;
  if ((group & 7) != 7) return kInteger;
  const uint32_t vector = word & 0xBFA0FC00;
  if (vector == 0x0E20CC00 || vector == 0x0EA0CC00) return kVectorFma;  // FMLA, FMLS (vector)
  const uint32_t element = word & 0xBF80F400;
  if (element == 0x0F801000 || element == 0x0F805000) return kVectorFma;  // FMLA, FMLS (by element)
  return kOtherFloat;
}

static void translate(plugin_id id, struct qemu_plugin_tb *block) {
  uint64_t found[kClasses] = {0};
  (void)id;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof(word));
    ++found[kTotal];
    ++found[class_of(word)];
  }
  for (int i = 0; i < kClasses; ++i) {
    if (found[i] > 0) qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &counts[i], found[i]);
  }
}

static void print(plugin_id id, void *unused) {
  char line[256];
  (void)id, (void)unused;
  for (int i = 0; i < kClasses; ++i) {
    snprintf(line, sizeof(line), "count %s %llu\n", kNames[i], (unsigned long long)counts[i]);
    qemu_plugin_outs(line);
  }
}

int qemu_plugin_install(plugin_id id, const void *information, int count, char **arguments) {
  (void)information, (void)count, (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_atexit_cb(id, print, NULL);
  return 0;
}
