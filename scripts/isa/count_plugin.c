/* A qemu-user TCG plugin that counts executed guest instructions between two marks: the guest calls
 * the system calls MARK_BEGIN and MARK_END, which no kernel has. Prints "instructions N" to stderr.
 *
 * The few declarations stand in for qemu-plugin.h, which distributions leave out. PLUGIN_API is the
 * version of that interface: 1 up to qemu 8, 2 from qemu 9 on; what is used here is in both. */
#include <stdint.h>
#include <stdio.h>

enum { MARK_BEGIN = 9001, MARK_END = 9002, CALLBACK_READS_NO_REGISTERS = 0 };

typedef uint64_t plugin_id;
struct block;
struct qemu_info;
typedef void (*translate)(plugin_id, struct block *);
typedef void (*execute)(unsigned cpu, void *data);
typedef void (*system_call)(plugin_id, unsigned cpu, int64_t number, uint64_t, uint64_t, uint64_t,
                            uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);

extern size_t qemu_plugin_tb_n_insns(const struct block *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, translate);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct block *, execute, int, void *);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id, system_call);

#define EXPORT __attribute__((visibility("default")))

EXPORT int qemu_plugin_version = PLUGIN_API;

static uint64_t instructions;

static void on_execute(unsigned cpu, void *count) {
  (void)cpu;
  instructions += (uintptr_t)count;
}

static void on_translate(plugin_id id, struct block *block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(block, on_execute, CALLBACK_READS_NO_REGISTERS,
                                       (void *)qemu_plugin_tb_n_insns(block));
}

static void on_system_call(plugin_id id, unsigned cpu, int64_t number, uint64_t a, uint64_t b,
                           uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number == MARK_BEGIN) instructions = 0;
  if (number == MARK_END) fprintf(stderr, "instructions %lu\n", (unsigned long)instructions);
}

EXPORT int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
  qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
  return 0;
}
