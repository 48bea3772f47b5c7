/* The weights file: mapped, checked, never copied. slmtvm/codegen/weights.py writes it. */
#define _GNU_SOURCE
#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cpu.h"
#include "error.h"
#include "plan_tables.h"
#include "slm.h"

typedef struct {
  char magic[8];
  uint32_t version;
  uint32_t count; /* of segments */
  uint64_t bytes; /* of the file, this header included */
  uint64_t id;    /* checksum of all that follows the header */
  uint8_t zero[32];
} header;

static const char MAGIC[8] = {'S', 'L', 'M', 'W', 'G', 'H', 'T', '\n'};
enum { VERSION = 1 };

/* Sum of a mix of each 64-bit word and its index, times the mixing factor. For one index the mix is a
 * bijection: a change to any single word always changes the sum. Words are independent, so compilers
 * interleave them. */
static inline __attribute__((always_inline)) uint64_t sum_mixed(const uint64_t *words,
                                                                size_t count) {
  const uint64_t index_step = 0x9e3779b97f4a7c15u, mix = 0xd6e8feb86659fd93u;
  uint64_t sum = 0, index_mark = 0;
  for (size_t i = 0; i < count; ++i) {
    index_mark += index_step;
    uint64_t word = (words[i] ^ index_mark) * mix;
    sum += word ^ word >> 32;
  }
  return sum * mix;
}

#if defined(__x86_64__)
/* Products of 64 bits take long without vectors of 32 bytes. */
__attribute__((target("avx2"))) static uint64_t sum_mixed_avx2(const uint64_t *words,
                                                               size_t count) {
  return sum_mixed(words, count);
}
#endif

static uint64_t checksum(const uint64_t *words, size_t count) {
#if defined(__x86_64__)
  static const char *const avx2[] = {"avx2", NULL};
  if (!slm_cpu_missing(avx2)) return sum_mixed_avx2(words, count);
#endif
  return sum_mixed(words, count);
}

static int32_t check(const char *path, const void *data, int verify) {
  const header *h = data;
  static const uint8_t zero[sizeof h->zero];
  if (memcmp(h->magic, MAGIC, sizeof MAGIC) != 0 || memcmp(h->zero, zero, sizeof zero) != 0)
    return slm_fail(SLM_ERR_WEIGHTS, "%s: not a weights file: its header is damaged", path);
  if (h->version != VERSION)
    return slm_fail(SLM_ERR_WEIGHTS, "%s: weights format %u, this library reads format %d", path,
                    h->version, VERSION);
  if (h->bytes != slm_plan.weights_bytes || h->id != slm_plan.weights_id ||
      h->count != slm_plan.weights_count)
    return slm_fail(SLM_ERR_WEIGHTS,
                    "%s: these weights belong to another library: id %016llx, expected %016llx",
                    path, (unsigned long long)h->id, (unsigned long long)slm_plan.weights_id);
  if (!verify) return SLM_OK;
#ifdef MADV_POPULATE_READ
  /* All pages at once: touching them one by one takes three times as long. Not vital. */
  madvise((void *)data, h->bytes, MADV_POPULATE_READ);
#endif
  uint64_t sum = checksum((const uint64_t *)(h + 1), (h->bytes - sizeof *h) / sizeof(uint64_t));
  if (sum != h->id)
    return slm_fail(SLM_ERR_WEIGHTS,
                    "%s: damaged: checksum %016llx, expected %016llx; copy the bundle again", path,
                    (unsigned long long)sum, (unsigned long long)h->id);
  return SLM_OK;
}

int32_t slm_weights_map(const char *bundle, int verify, const void **data) {
  char path[PATH_MAX];
  int length = snprintf(path, sizeof path, "%s/weights.bin", bundle);
  if (length < 0 || (size_t)length >= sizeof path)
    return slm_fail(SLM_ERR_ARGUMENT, "the bundle's path is longer than %d bytes", PATH_MAX);
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return slm_fail(SLM_ERR_FILE, "%s: cannot open: %s", path, strerror(errno));
  struct stat status;
  int32_t code = SLM_OK;
  void *mapped = MAP_FAILED;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode))
    code = slm_fail(SLM_ERR_FILE, "%s: not a regular file", path);
  else if ((uint64_t)status.st_size != slm_plan.weights_bytes)
    code = slm_fail(SLM_ERR_WEIGHTS, "%s: %lld bytes, expected %llu; copy the bundle again", path,
                    (long long)status.st_size, (unsigned long long)slm_plan.weights_bytes);
  else if ((mapped = mmap(NULL, slm_plan.weights_bytes, PROT_READ, MAP_PRIVATE, file, 0)) ==
           MAP_FAILED)
    code = slm_fail(SLM_ERR_FILE, "%s: cannot map: %s", path, strerror(errno));
  close(file);
  if (code != SLM_OK) return code;
  code = check(path, mapped, verify);
  if (code != SLM_OK)
    munmap(mapped, slm_plan.weights_bytes);
  else
    *data = mapped;
  return code;
}

void slm_weights_unmap(const void *data) { munmap((void *)data, slm_plan.weights_bytes); }
