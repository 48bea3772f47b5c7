/* CPU features by the names that Linux gives them in /proc/cpuinfo; "rvv" is RISC-V V with vectors
 * of at least 128 bits. This file, like all of the runtime, is compiled for the baseline of its
 * architecture: it must run on a CPU too old for the kernels. */
#include "cpu.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>

enum state { STATE_NONE, STATE_AVX, STATE_AVX512 };

typedef struct {
  const char *name;
  uint32_t leaf;
  uint8_t reg; /* 0 eax, 1 ebx, 2 ecx, 3 edx */
  uint8_t bit;
  uint8_t state; /* registers that the operating system must save */
} feature;

/* Intel SDM volume 2A, CPUID; leaf 7 is read with subleaf 0. */
static const feature features[] = {
    {"sse3", 1, 2, 0, STATE_NONE},
    {"pclmulqdq", 1, 2, 1, STATE_NONE},
    {"ssse3", 1, 2, 9, STATE_NONE},
    {"fma", 1, 2, 12, STATE_AVX},
    {"sse4_1", 1, 2, 19, STATE_NONE},
    {"sse4_2", 1, 2, 20, STATE_NONE},
    {"movbe", 1, 2, 22, STATE_NONE},
    {"popcnt", 1, 2, 23, STATE_NONE},
    {"avx", 1, 2, 28, STATE_AVX},
    {"f16c", 1, 2, 29, STATE_AVX},
    {"bmi1", 7, 1, 3, STATE_NONE},
    {"avx2", 7, 1, 5, STATE_AVX},
    {"bmi2", 7, 1, 8, STATE_NONE},
    {"avx512f", 7, 1, 16, STATE_AVX512},
    {"avx512dq", 7, 1, 17, STATE_AVX512},
    {"avx512ifma", 7, 1, 21, STATE_AVX512},
    {"avx512cd", 7, 1, 28, STATE_AVX512},
    {"sha_ni", 7, 1, 29, STATE_NONE},
    {"avx512bw", 7, 1, 30, STATE_AVX512},
    {"avx512vl", 7, 1, 31, STATE_AVX512},
    {"avx512vbmi", 7, 2, 1, STATE_AVX512},
    {"avx512_vbmi2", 7, 2, 6, STATE_AVX512},
    {"gfni", 7, 2, 8, STATE_NONE},
    {"vaes", 7, 2, 9, STATE_AVX},
    {"vpclmulqdq", 7, 2, 10, STATE_AVX},
    {"avx512_vnni", 7, 2, 11, STATE_AVX512},
    {"avx512_bitalg", 7, 2, 12, STATE_AVX512},
    {"avx512_vpopcntdq", 7, 2, 14, STATE_AVX512},
    {"abm", 0x80000001, 2, 5, STATE_NONE},
};

static int os_saves(int state) {
  enum { OSXSAVE = 1 << 27, XMM_YMM = 0x06, OPMASK_ZMM = 0xe0 };
  uint32_t a, b, c, d;
  if (state == STATE_NONE) return 1;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return 0;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  uint32_t wanted = state == STATE_AVX ? XMM_YMM : XMM_YMM | OPMASK_ZMM;
  return (a & wanted) == wanted;
}

static int has(const char *name) {
  for (size_t i = 0; i < sizeof features / sizeof *features; ++i) {
    const feature *f = &features[i];
    if (strcmp(f->name, name) != 0) continue;
    uint32_t regs[4];
    if (!__get_cpuid_count(f->leaf, 0, &regs[0], &regs[1], &regs[2], &regs[3])) return 0;
    return (regs[f->reg] >> f->bit & 1) && os_saves(f->state);
  }
  return 0;
}

#elif defined(__aarch64__)

#include <sys/auxv.h>

typedef struct {
  const char *name;
  uint8_t word; /* AT_HWCAP or AT_HWCAP2 */
  uint8_t bit;
} feature;

/* Linux, arch/arm64/include/uapi/asm/hwcap.h */
static const feature features[] = {
    {"fp", AT_HWCAP, 0},       {"asimd", AT_HWCAP, 1},    {"aes", AT_HWCAP, 3},
    {"pmull", AT_HWCAP, 4},    {"sha1", AT_HWCAP, 5},     {"sha2", AT_HWCAP, 6},
    {"crc32", AT_HWCAP, 7},    {"atomics", AT_HWCAP, 8},  {"fphp", AT_HWCAP, 9},
    {"asimdhp", AT_HWCAP, 10}, {"asimdrdm", AT_HWCAP, 12}, {"lrcpc", AT_HWCAP, 15},
    {"asimddp", AT_HWCAP, 20}, {"sve", AT_HWCAP, 22},     {"sve2", AT_HWCAP2, 1},
    {"i8mm", AT_HWCAP2, 13},   {"bf16", AT_HWCAP2, 14},
};

static int has(const char *name) {
  for (size_t i = 0; i < sizeof features / sizeof *features; ++i) {
    if (strcmp(features[i].name, name) == 0)
      return getauxval(features[i].word) >> features[i].bit & 1;
  }
  return 0;
}

#elif defined(__riscv) && __riscv_xlen == 64

#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

static sigjmp_buf not_there;
static volatile long probing_thread;
static struct sigaction previous;
static atomic_flag probing = ATOMIC_FLAG_INIT;

static void on_illegal_instruction(int number) {
  if (syscall(SYS_gettid) == probing_thread) siglongjmp(not_there, 1);
  /* Another thread's fault: restore what was there and let the instruction fault again. */
  sigaction(number, &previous, NULL);
}

static unsigned long read_vlenb(void) {
  unsigned long bytes;
  __asm__ volatile("csrr %0, 0xc22" : "=r"(bytes)); /* vlenb, by number: no V in the baseline */
  return bytes;
}

/* Vector length in bytes, 0 without V. AT_HWCAP has a bit for V since Linux 6.5; vendors' older
 * kernels and qemu before 8 run vector code without saying so, hence the second try: read vlenb and
 * see whether it is an illegal instruction. */
static unsigned long vector_bytes(void) {
  if (getauxval(AT_HWCAP) >> ('V' - 'A') & 1) return read_vlenb();
  while (atomic_flag_test_and_set(&probing)) sched_yield();
  struct sigaction probe;
  memset(&probe, 0, sizeof probe);
  probe.sa_handler = on_illegal_instruction;
  sigemptyset(&probe.sa_mask);
  probing_thread = syscall(SYS_gettid);
  unsigned long bytes = 0;
  if (sigaction(SIGILL, &probe, &previous) == 0) {
    if (sigsetjmp(not_there, 1) == 0) bytes = read_vlenb();
    sigaction(SIGILL, &previous, NULL);
  }
  atomic_flag_clear(&probing);
  return bytes;
}

static int has(const char *name) {
  enum { MIN_VECTOR_BYTES = 16 };
  return strcmp(name, "rvv") == 0 && vector_bytes() >= MIN_VECTOR_BYTES;
}

#else
#error "no CPU check for this architecture"
#endif

const char *slm_cpu_missing(const char *const *required) {
  for (; *required; ++required)
    if (!has(*required)) return *required;
  return NULL;
}
