/* The weights file: mapped and checked, copied only where it is encrypted. slmtvm/codegen/weights.py
 * writes it. */
#define _GNU_SOURCE
#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cpu.h"
#include "encrypted.h"
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

/* They are read at each token, a tenth faster by large pages. A file has these where its file system
 * does and it is read for the first time. */
static void ask_for_large_pages(void *data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int32_t slm_weights_map(const char *bundle, slm_weights_file *result) {
  char *path = result->path;
  int length = snprintf(path, sizeof result->path, "%s/weights.bin", bundle);
  if (length < 0 || (size_t)length >= sizeof result->path)
    return slm_fail(SLM_ERR_ARGUMENT, "the bundle's path is longer than %d bytes", PATH_MAX);
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return slm_fail(SLM_ERR_FILE, "%s: cannot open: %s", path, strerror(errno));
  struct stat status;
  int32_t code = SLM_OK;
  void *mapped = MAP_FAILED;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode))
    code = slm_fail(SLM_ERR_FILE, "%s: not a regular file", path);
  else if ((uint64_t)status.st_size != slm_plan.weights_bytes &&
           (uint64_t)status.st_size != slm_encrypted_bytes(slm_plan.weights_bytes))
    code = slm_fail(SLM_ERR_WEIGHTS, "%s: %lld bytes, expected %llu; copy the bundle again", path,
                    (long long)status.st_size, (unsigned long long)slm_plan.weights_bytes);
  else if ((mapped = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, file, 0)) ==
           MAP_FAILED)
    code = slm_fail(SLM_ERR_FILE, "%s: cannot map: %s", path, strerror(errno));
  close(file);
  if (code == SLM_OK) ask_for_large_pages(mapped, (size_t)status.st_size);
  result->data = mapped;
  result->bytes = code == SLM_OK ? (size_t)status.st_size : 0;
  return code;
}

void slm_weights_drop(const slm_weights_file *file) { munmap((void *)file->data, file->bytes); }

void slm_weights_unmap(const void *data) { munmap((void *)data, slm_plan.weights_bytes); }

/* Decrypts into pages that are locked, so that nothing of them comes to a disk. */
static int32_t decrypt(const slm_weights_file *file, const slm_options *options,
                       const void **weights) {
  size_t bytes = slm_plan.weights_bytes;
  if (!options->weights_key)
    return slm_fail(SLM_ERR_KEY, "%s: encrypted, and no key is given", file->path);
  void *plain = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (plain == MAP_FAILED)
    return slm_fail(SLM_ERR_MEMORY, "no memory for %zu bytes of decrypted weights: %s", bytes,
                    strerror(errno));
  ask_for_large_pages(plain, bytes);
  int32_t code = SLM_OK;
  if (mlock(plain, bytes) != 0 && !(options->flags & SLM_MAY_SWAP))
    code = slm_fail(SLM_ERR_MEMORY,
                    "%s: %zu bytes of decrypted weights cannot be locked in memory: %s; raise the "
                    "limit (ulimit -l, LimitMEMLOCK=), or allow them to go to swap space",
                    file->path, bytes, strerror(errno));
  madvise(plain, bytes, MADV_DONTDUMP);
  if (code == SLM_OK)
    code = slm_decrypt(file->path, file->data, file->bytes, options->weights_key, plain, bytes);
  if (code == SLM_OK && mprotect(plain, bytes, PROT_READ) != 0)
    code = slm_fail(SLM_ERR_MEMORY, "%s: cannot be protected: %s", file->path, strerror(errno));
  if (code == SLM_OK)
    *weights = plain;
  else
    munmap(plain, bytes);
  return code;
}

int32_t slm_weights_take(const slm_weights_file *file, const slm_options *options, int verify,
                         const void **weights) {
  int32_t code;
  const void *data = file->data;
  if (slm_is_encrypted(file->data, file->bytes)) {
    code = decrypt(file, options, &data);
    slm_weights_drop(file);
    if (code != SLM_OK) return code;
    verify = 0; /* every piece of it has its own proof */
  } else if (file->bytes != slm_plan.weights_bytes) {
    slm_weights_drop(file);
    return slm_fail(SLM_ERR_WEIGHTS, "%s: %zu bytes, expected %llu; copy the bundle again",
                    file->path, file->bytes, (unsigned long long)slm_plan.weights_bytes);
  }
  code = check(file->path, data, verify);
  if (code != SLM_OK)
    slm_weights_unmap(data);
  else
    *weights = data;
  return code;
}
