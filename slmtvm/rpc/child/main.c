/* Runs kernels that are linked in, in a process of its own, for a runner (slm_runner.py).
 *
 *   program kernel     reads one request from standard input, answers on standard output
 *   program requires   prints what the CPU lacks of what the kernels need, nothing where it has all
 *   program list       prints the kernels' names
 *
 * A request, little-endian, without gaps: "SLMKREQ1", uint32 bytes of the name, int32 threads, timed,
 * int64 number, int32 repeat, min_repeat_ms, limit_zero_time_iterations, cooldown_interval_ms,
 * repeats_to_cooldown, int64 cache_flush_bytes, uint32 buffers, scalars; the name; scalars as int64;
 * the buffers' sizes as uint64, their bytes. The answer: "SLMKRES1", uint32 repeats, buffers; seconds
 * of each repeat as double; the buffers' sizes as uint64, 0 for those that the kernel does not write;
 * their bytes.
 *
 * Scalars are the kernel's own, 0 where they are left out; with two more, begin and end of the part of
 * the grid to compute, by one thread. Times are taken as TVM's WrapTimeEvaluator does. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "cores.h"
#include "cpu.h"
#include "kernels.h"
#include "pool.h"
#include "slm.h"

enum { MOST_BUFFERS = 32, MOST_SCALARS = 8, MOST_NAME = 256, LINE = 64, FAILED = 3 };

/* The runtime names these weakly, which alone would not take them out of a static libc. */
void *const slm_rpc_threads[] = {(void *)pthread_create, (void *)pthread_join,
                                 (void *)pthread_key_create, (void *)pthread_key_delete,
                                 (void *)pthread_getspecific, (void *)pthread_setspecific,
                                 (void *)pthread_self};

typedef struct {
  int32_t threads, timed, repeat, min_repeat_ms, limit_zero, cooldown_ms, cooldown_every;
  int64_t number, flush_bytes;
} how;

typedef struct {
  const slm_rpc_kernel *kernel;
  void *buffers[MOST_BUFFERS + 1];
  uint64_t sizes[MOST_BUFFERS];
  int32_t scalars[MOST_SCALARS + 2];
  int32_t begin, end;
  char *scratch;
  slm_pool *pool;
} job;

static void die(const char *what, const char *which) {
  fprintf(stderr, "%s%s\n", what, which);
  exit(FAILED);
}

static void get(void *data, size_t size) {
  for (char *at = data; size > 0;) {
    ssize_t count = read(0, at, size);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) die("the request ends within a value", "");
    at += count;
    size -= (size_t)count;
  }
}

static void put(const void *data, size_t size) {
  for (const char *at = data; size > 0;) {
    ssize_t count = write(1, at, size);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) die("cannot answer: ", strerror(errno));
    at += count;
    size -= (size_t)count;
  }
}

#define GET(name, type) \
  type name;            \
  get(&name, sizeof name)

static void *room(uint64_t size) {
  void *data = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) die("no memory for the buffers", "");
  return data;
}

static const slm_rpc_kernel *find(const char *name) {
  /* MetaSchedule asks for no other name. */
  if (!strcmp(name, "main") && slm_rpc_kernel_count == 1) return &slm_rpc_kernels[0];
  for (int i = 0; i < slm_rpc_kernel_count; ++i)
    if (!strcmp(slm_rpc_kernels[i].name, name)) return &slm_rpc_kernels[i];
  die("there is no kernel ", name);
  return NULL;
}

static void read_scalars(job *j, uint32_t count) {
  const slm_rpc_kernel *k = j->kernel;
  int32_t all[MOST_SCALARS + 2] = {0};
  if (count > (uint32_t)k->scalars + 2) die("more scalars than there are for ", k->name);
  for (uint32_t i = 0; i < count; ++i) {
    GET(value, int64_t);
    if (value != (int32_t)value) die("a scalar does not fit into 32 bits, for ", k->name);
    all[i] = (int32_t)value;
  }
  memcpy(j->scalars, all, sizeof all);
  j->begin = 0;
  j->end = k->grid;
  if (count == (uint32_t)k->scalars + 1) die("begin without end for ", k->name);
  if (count != (uint32_t)k->scalars + 2) return;
  j->begin = all[k->scalars];
  j->end = all[k->scalars + 1];
  if (j->begin < 0 || j->end < j->begin || j->end > k->grid) die("no part of the grid of ", k->name);
}

static void read_buffers(job *j, uint32_t count) {
  const slm_rpc_kernel *k = j->kernel;
  if (count != (uint32_t)k->buffers) {
    fprintf(stderr, "%s takes %d tensors, not %u\n", k->name, k->buffers, count);
    exit(FAILED);
  }
  get(j->sizes, count * sizeof j->sizes[0]);
  for (uint32_t i = 0; i < count; ++i) {
    if (j->sizes[i] < k->sizes[i]) {
      fprintf(stderr, "tensor %u of %s takes %llu bytes, not %llu\n", i, k->name,
              (unsigned long long)k->sizes[i], (unsigned long long)j->sizes[i]);
      exit(FAILED);
    }
    j->buffers[i] = room(j->sizes[i]);
    get(j->buffers[i], j->sizes[i]);
  }
}

static void run_part(void *context, int thread, int part, int parts) {
  const job *j = context;
  int32_t begin = (int32_t)((int64_t)j->end * part / parts);
  int32_t end = (int32_t)((int64_t)j->end * (part + 1) / parts);
  if (begin == end) return;
  void *buffers[MOST_BUFFERS + 1];
  memcpy(buffers, j->buffers, sizeof buffers);
  buffers[j->kernel->buffers] = j->scratch + j->kernel->scratch_bytes * (uint64_t)thread;
  j->kernel->call(buffers, j->scalars, begin, end);
}

static void run(job *j) {
  if (j->pool)
    slm_pool_run(j->pool, run_part, j);
  else
    j->kernel->call(j->buffers, j->scalars, j->begin, j->end);
}

static void start_threads(job *j, int threads) {
  uint64_t scratch = (j->kernel->scratch_bytes + LINE - 1) / LINE * LINE;
  if (threads < 1 || threads > SLM_MAX_THREADS) die("no such number of threads", "");
  j->scratch = room(scratch * (uint64_t)threads);
  j->buffers[j->kernel->buffers] = j->scratch;
  int whole = j->begin == 0 && j->end == j->kernel->grid;
  if (threads == 1 || !whole) return;
  slm_cores cores;
  if (slm_cores_choose(threads, NULL, 1, "", &cores) != SLM_OK ||
      slm_pool_new(&cores, 1, &j->pool) != SLM_OK || slm_pool_acquire(j->pool) != SLM_OK)
    die("no threads: ", slm_last_error());
}

static void flush(const char *data, size_t size) {
  for (size_t i = 0; i < size; i += LINE) {
#if defined(__x86_64__)
    __builtin_ia32_clflush(data + i);
#elif defined(__aarch64__)
    __asm__ volatile("dc civac, %0" ::"r"(data + i) : "memory");
#else
    (void)data; /* RISC-V: cbo.flush needs Zicbom, and the kernel's leave */
#endif
  }
}

static void prepare(const job *j, const how *h, volatile char *cache) {
  if (h->flush_bytes < 0)
    for (int i = 1; i < j->kernel->buffers; ++i) flush(j->buffers[i], j->sizes[i]);
  for (int64_t i = 0; i < h->flush_bytes; i += LINE) cache[i]++;
}

/* Seconds of one call, the mean of `number`, which grows until they take min_repeat_ms. */
static double measure(job *j, const how *h, int64_t *number, volatile char *cache) {
  double ms = 0;
  int zeros = 0;
  do {
    if (ms > 0) {
      double wanted = h->min_repeat_ms / (ms / (double)*number) + 1, more = (double)*number * 1.618;
      *number = (int64_t)(wanted > more ? wanted : more);
    }
    prepare(j, h, cache);
    int64_t start = slm_now_nanoseconds();
    for (int64_t i = 0; i < *number; ++i) run(j);
    int64_t spent = slm_now_nanoseconds() - start;
    zeros += spent == 0;
    ms = (double)spent / 1e6;
  } while (ms < h->min_repeat_ms && zeros < h->limit_zero + 1);
  return ms / 1e3 / (double)*number;
}

static void answer(const job *j, const double *seconds, uint32_t count) {
  uint32_t buffers = (uint32_t)j->kernel->buffers;
  put("SLMKRES1", 8);
  put(&count, sizeof count);
  put(&buffers, sizeof buffers);
  put(seconds, count * sizeof *seconds);
  for (uint32_t i = 0; i < buffers; ++i) {
    uint64_t size = j->kernel->written[i] ? j->sizes[i] : 0;
    put(&size, sizeof size);
  }
  for (uint32_t i = 0; i < buffers; ++i)
    if (j->kernel->written[i]) put(j->buffers[i], j->sizes[i]);
}

static int serve(void) {
  enum { MOST_REPEATS = 1 << 20 };
  char magic[8], name[MOST_NAME + 1];
  get(magic, sizeof magic);
  if (memcmp(magic, "SLMKREQ1", sizeof magic) != 0) die("this is no request", "");
  how h;
  GET(name_bytes, uint32_t);
  get(&h.threads, sizeof h.threads);
  get(&h.timed, sizeof h.timed);
  get(&h.number, sizeof h.number);
  get(&h.repeat, sizeof h.repeat);
  get(&h.min_repeat_ms, sizeof h.min_repeat_ms);
  get(&h.limit_zero, sizeof h.limit_zero);
  get(&h.cooldown_ms, sizeof h.cooldown_ms);
  get(&h.cooldown_every, sizeof h.cooldown_every);
  get(&h.flush_bytes, sizeof h.flush_bytes);
  GET(buffers, uint32_t);
  GET(scalars, uint32_t);
  if (name_bytes > MOST_NAME || buffers > MOST_BUFFERS || scalars > MOST_SCALARS + 2 ||
      h.number < 1 || h.repeat < 1 || h.repeat > MOST_REPEATS || h.cooldown_every < 1)
    die("the request has numbers out of range", "");
  get(name, name_bytes);
  name[name_bytes] = 0;
  static job j;
  j.kernel = find(name);
  read_scalars(&j, scalars);
  read_buffers(&j, buffers);
  const char *missing = slm_cpu_missing(slm_rpc_requires);
  if (missing) die("this CPU lacks what the kernels need: ", missing);
  start_threads(&j, h.threads);
  run(&j); /* also where it is timed: caches and threads warm up */
  double *seconds = NULL;
  if (h.timed) {
    seconds = room((uint64_t)h.repeat * sizeof *seconds);
    volatile char *cache = h.flush_bytes > 0 ? room((uint64_t)h.flush_bytes) : NULL;
    int64_t number = h.number;
    for (int i = 0; i < h.repeat; ++i) {
      seconds[i] = measure(&j, &h, &number, cache);
      if (h.cooldown_ms > 0 && (i + 1) % h.cooldown_every == 0)
        usleep((useconds_t)h.cooldown_ms * 1000);
    }
  }
  answer(&j, seconds, h.timed ? (uint32_t)h.repeat : 0);
  return 0;
}

int main(int argc, char **argv) {
  const char *verb = argc == 2 ? argv[1] : "";
  if (!strcmp(verb, "kernel")) return serve();
  if (!strcmp(verb, "requires")) {
    const char *missing = slm_cpu_missing(slm_rpc_requires);
    if (missing) puts(missing);
    return 0;
  }
  if (!strcmp(verb, "list")) {
    for (int i = 0; i < slm_rpc_kernel_count; ++i) puts(slm_rpc_kernels[i].name);
    return 0;
  }
  fprintf(stderr, "usage: %s kernel | requires | list\n", argv[0]);
  return 64;
}
