// A plugin for qemu-user 7.2 that counts how often each block of 64-bit ARM instructions is executed, and prints at the
// end, per block, its address, the count and its instructions.
//
//   cc -O2 -shared -fPIC count_blocks.c -o libblocks.so; qemu-aarch64 -plugin ./libblocks.so -d plugin PROGRAM
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qemu_plugin.h"

struct block {
  struct block *next;
  uint64_t address, count;
  size_t length;
  uint32_t words[];
};
static struct block *blocks;

static void translate(plugin_id id, struct qemu_plugin_tb *translated) {
  const size_t length = qemu_plugin_tb_n_insns(translated);
  struct block *block = malloc(sizeof(*block) + length * sizeof(block->words[0]));
  (void)id;
  if (block == NULL) abort();
  block->next = blocks;
  block->address = qemu_plugin_tb_vaddr(translated);
  block->count = 0;
  block->length = length;
  for (size_t i = 0; i < length; ++i) {
    memcpy(&block->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(translated, i)), sizeof(uint32_t));
  }
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_inline(translated, 0, &block->count, 1);
}

static void print(plugin_id id, void *unused) {
  char text[64];
  (void)id, (void)unused;
  for (const struct block *block = blocks; block != NULL; block = block->next) {
    if (block->count == 0) continue;
    snprintf(text, sizeof(text), "block %llx %llu", (unsigned long long)block->address, (unsigned long long)block->count);
    qemu_plugin_outs(text);
    for (size_t i = 0; i < block->length; ++i) {
      snprintf(text, sizeof(text), " %08x", block->words[i]);
      qemu_plugin_outs(text);
    }
    qemu_plugin_outs("\n");
  }
}

int qemu_plugin_install(plugin_id id, const void *information, int count, char **arguments) {
  (void)information, (void)count, (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_atexit_cb(id, print, NULL);
  return 0;
}
