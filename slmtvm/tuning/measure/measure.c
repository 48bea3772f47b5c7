/* Runs kernels that must give the same bytes, and times them in turns.
 *
 *   measure [--rounds N] [--millis MS] [--working-set BYTES] [--threads N] [--limit SECONDS]
 *           [--skip I,J,...]
 *
 * Each candidate first runs once, and what it writes is compared with what the first one wrote. Then
 * all that are left are timed in rounds, for so many milliseconds each: what else the machine does
 * meanwhile hits all of them. A call reads other copies of the weights than the one before, as the
 * layers of a model do, so many that together they are the working set.
 *
 * On standard output, a JSON object a line: {"begin": i} before a candidate runs, for one that does not
 * come back to be known; {"checked": i, "equal": bool}; {"index": i, "seconds": [...]}, of a call in
 * each round. With one thread, time is that in which the thread was running; on a GPU, until it is done. */
#define _GNU_SOURCE
#include "measure.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cores.h"
#include "error.h"
#include "pool.h"
#include "slm.h"

enum { MOST_BUFFERS = 32, LINE = 64, MOST_ROUNDS = 1000 };
static const size_t MOST_COPIES_BYTES = (size_t)512 << 20;
/* Each candidate must be this near to the reference in its first run to be timed more than once. */
static const double HOPELESS = 3;

/* The pool's references to them are weak, and a static libc gives only what is asked for. */
static int (*const volatile create_thread)(pthread_t *, const pthread_attr_t *, void *(*)(void *),
                                           void *) = pthread_create;
static int (*const volatile join_thread)(pthread_t, void **) = pthread_join;

typedef struct {
  void *args[MOST_BUFFERS]; /* of copy 0 */
  size_t copy_bytes;        /* from one copy to the next, of the buffers that are cycled */
  size_t copies, next;
  char *scratch;
  size_t scratch_bytes;
} memory;

typedef struct {
  const slm_candidate *candidate;
  void *args[MOST_BUFFERS];
  size_t scratch_bytes;
} call;

static slm_pool *pool;
static int thread_count = 1;

static _Noreturn void die(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(3);
}

static uint64_t random_state;

/* xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled". */
static uint64_t random_bits(void) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 2685821657736338717u;
}

static double uniform(void) { return (double)(random_bits() >> 11) / 9007199254740992.0; }

static int64_t integer(double low, double high) {
  return (int64_t)low + (int64_t)(random_bits() % (uint64_t)(high - low + 1));
}

static void fill(const slm_measured_buffer *b, char *data, void **args) {
  float *floats = (float *)data;
  switch (b->fill) {
  case FILL_OUTPUT:
    memset(data, 0xA5, b->bytes);
    break;
  case FILL_BYTES:
    for (size_t i = 0; i < b->bytes; ++i) data[i] = (char)integer(b->low, b->high);
    break;
  case FILL_INT32:
    for (size_t i = 0; i < b->bytes / 4; ++i) ((int32_t *)data)[i] = (int32_t)integer(b->low, b->high);
    break;
  case FILL_F32:
    for (size_t i = 0; i < b->bytes / 4; ++i)
      floats[i] = (float)(b->low + (b->high - b->low) * uniform());
    break;
  case FILL_F16:
    for (size_t i = 0; i < b->bytes / 2; ++i)
      ((uint16_t *)data)[i] = (uint16_t)(0x2000 | ((random_bits() >> 48) & 0x83FF));
    break;
  case FILL_SUMS: {
    const int8_t *values = args[b->of];
    for (size_t i = 0; i < b->bytes / 4; ++i) {
      int sum = 0;
      for (int j = 0; j < (int)b->low; ++j) sum += *values++;
      floats[i] = (float)sum;
    }
    break;
  }
  case FILL_GIVEN:
    memcpy(data, b->given, b->bytes);
    break;
  case FILL_STARTS:
    for (size_t i = 0; i < b->bytes / 4; ++i) ((int32_t *)data)[i] = (int32_t)i * (int32_t)b->low;
    break;
  case FILL_PLACES:
    for (size_t i = 0; i < b->bytes / 2; ++i)
      ((uint16_t *)data)[i] = (uint16_t)(i % (size_t)b->high * (size_t)b->low);
    break;
  }
}

static size_t aligned(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

static char *mapped(size_t bytes) {
  if (slm_measured_place) return slm_measured_place->memory(bytes);
  char *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) die("no memory for the buffers");
  /* Weights are mapped from a file, whose pages are small on most systems. */
  madvise(data, bytes, MADV_NOHUGEPAGE);
  return data;
}

/* Whether a buffer of one candidate may be the reference's too. */
static int shared(const slm_measured_buffer *a, const slm_measured_buffer *b) {
  return a->bytes == b->bytes && a->fill == b->fill && a->low == b->low && a->high == b->high &&
         a->of == b->of && a->cycled == b->cycled && a->given == b->given;
}

static void refill(const slm_candidate *c, memory *m, int index) {
  random_state = 0x9E3779B97F4A7C15u + (uint64_t)index;
  fill(&c->buffer[index], m->args[index], m->args);
  if (slm_measured_place) slm_measured_place->written(m->args[index], c->buffer[index].bytes);
}

/* The buffers of a candidate, those that are like the reference's at its places. */
static memory prepare_like(const slm_candidate *c, const memory *reference) {
  memory m = *reference;
  for (int i = 0; i < c->buffers; ++i) {
    if (shared(&c->buffer[i], &slm_candidates[0].buffer[i])) continue;
    if (c->buffer[i].cycled) die("weights differ between candidates");
    m.args[i] = mapped(aligned(c->buffer[i].bytes) + LINE);
    refill(c, &m, i);
  }
  return m;
}

/* The buffers of the reference, filled. */
static memory prepare(const slm_candidate *c, size_t working_set) {
  memory m = {.copies = 1};
  size_t rest = LINE;
  for (int i = 0; i < c->buffers; ++i)
    *(c->buffer[i].cycled ? &m.copy_bytes : &rest) += aligned(c->buffer[i].bytes);
  if (m.copy_bytes) {
    m.copy_bytes += LINE; /* prefetched beyond the end, copies of a power of two in size */
    size_t most = working_set < MOST_COPIES_BYTES ? working_set : MOST_COPIES_BYTES;
    m.copies = (most + m.copy_bytes - 1) / m.copy_bytes;
    if (m.copies == 0) m.copies = 1;
  }
  char *cycled = m.copy_bytes ? mapped(m.copies * m.copy_bytes) : NULL, *at = cycled;
  char *single = mapped(rest);
  for (int i = 0; i < c->buffers; ++i) {
    char **place = c->buffer[i].cycled ? &at : &single;
    m.args[i] = *place;
    *place += aligned(c->buffer[i].bytes);
    refill(c, &m, i);
  }
  for (size_t i = 1; i < m.copies; ++i) {
    memcpy(cycled + i * m.copy_bytes, cycled, m.copy_bytes);
    if (slm_measured_place) slm_measured_place->written(cycled + i * m.copy_bytes, m.copy_bytes);
  }
  m.scratch_bytes = aligned(c->scratch_bytes);
  if (m.scratch_bytes) m.scratch = mapped(m.scratch_bytes * (size_t)thread_count);
  return m;
}

static void run_part(void *context, int thread, int part, int parts) {
  const call *now = context;
  const slm_candidate *c = now->candidate;
  int32_t begin = (int32_t)((int64_t)c->grid * part / parts);
  int32_t end = (int32_t)((int64_t)c->grid * (part + 1) / parts);
  if (begin == end) return;
  if (!c->scratch_bytes) {
    c->run((void **)now->args, slm_measured_position, slm_measured_valid, begin, end);
    return;
  }
  void *args[MOST_BUFFERS];
  memcpy(args, now->args, sizeof args);
  args[c->buffers] = (char *)args[c->buffers] + now->scratch_bytes * (size_t)thread;
  c->run(args, slm_measured_position, slm_measured_valid, begin, end);
}

/* One call on the next copy of the weights. */
static void run(const slm_candidate *c, memory *m) {
  call now = {.candidate = c, .scratch_bytes = m->scratch_bytes};
  size_t ahead = m->copy_bytes * m->next;
  for (int i = 0; i < c->buffers; ++i)
    now.args[i] = (char *)m->args[i] + (c->buffer[i].cycled ? ahead : 0);
  now.args[c->buffers] = m->scratch;
  if (++m->next == m->copies) m->next = 0;
  if (pool)
    slm_pool_run(pool, run_part, &now);
  else
    run_part(&now, 0, 0, 1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(pool || slm_measured_place ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of a call, of so many. */
static double seconds(const slm_candidate *c, memory *m, long number) {
  double start = now();
  for (long i = 0; i < number; ++i) run(c, m);
  if (slm_measured_place) slm_measured_place->wait();
  double each = (now() - start) / (double)number;
  return each > 1e-9 ? each : 1e-9; /* clocks may be coarse */
}

/* Has the host see what a candidate computed. */
static void look_at_results(const slm_candidate *c, const memory *m) {
  for (int i = 0; i < c->buffers && slm_measured_place; ++i)
    if (c->buffer[i].result) slm_measured_place->wanted(m->args[i], c->buffer[i].bytes);
}

static int results_equal(const slm_candidate *c, const memory *m, char *const *expected) {
  for (int i = 0; i < c->buffers; ++i)
    if (c->buffer[i].result && memcmp(m->args[i], expected[i], c->buffer[i].bytes) != 0) return 0;
  return 1;
}

static int listed(const char *list, int index) {
  for (const char *at = list; at && *at; at = strchr(at, ',')) {
    if (*at == ',') ++at;
    if (atoi(at) == index) return 1;
  }
  return 0;
}

static void start_pool(void) {
  slm_cores cores;
  if (!create_thread || !join_thread) die("no threads");
  if (slm_cores_choose(thread_count, NULL, 1, "", &cores) != SLM_OK ||
      slm_pool_new(&cores, 1, &pool) != SLM_OK || slm_pool_acquire(pool) != SLM_OK)
    die(slm_last_error());
}

int main(int argc, char **argv) {
  int rounds = 7;
  double millis = 3, limit = 60;
  size_t working_set = 0;
  const char *skip = NULL;
  for (int i = 1; i + 1 < argc; i += 2) {
    const char *value = argv[i + 1];
    if (!strcmp(argv[i], "--rounds")) rounds = atoi(value);
    else if (!strcmp(argv[i], "--millis")) millis = atof(value);
    else if (!strcmp(argv[i], "--working-set")) working_set = (size_t)strtoull(value, NULL, 10);
    else if (!strcmp(argv[i], "--threads")) thread_count = atoi(value);
    else if (!strcmp(argv[i], "--limit")) limit = atof(value);
    else if (!strcmp(argv[i], "--skip")) skip = value;
    else die(argv[i]);
  }
  if (rounds < 1 || rounds > MOST_ROUNDS || thread_count < 1 || thread_count > SLM_MAX_THREADS)
    die("--rounds and --threads must be reasonable");
  setvbuf(stdout, NULL, _IOLBF, 1 << 16);
  if (thread_count > 1) start_pool();
  if (slm_measured_place) slm_measured_place->start();

  memory *memories = calloc((size_t)slm_candidate_count, sizeof *memories);
  double *once = calloc((size_t)slm_candidate_count, sizeof *once); /* 0: not to be timed */
  double *times = calloc((size_t)slm_candidate_count * (size_t)rounds, sizeof *times);
  char *expected[MOST_BUFFERS] = {0};
  if (!memories || !once || !times) die("no memory");
  for (int i = 0; i < slm_candidate_count; ++i) {
    if (listed(skip, i)) continue;
    const slm_candidate *c = &slm_candidates[i];
    printf("{\"begin\": %d}\n", i);
    alarm((unsigned)limit + 1);
    memory *m = &memories[i];
    *m = i == 0 ? prepare(c, working_set) : prepare_like(c, &memories[0]);
    m->next = 0;
    for (int b = 0; b < c->buffers; ++b) /* the memory may be that of others */
      if (c->buffer[b].result) refill(c, m, b);
    once[i] = seconds(c, m, 1);
    int equal = 1;
    look_at_results(c, m);
    if (i == 0) {
      for (int b = 0; b < c->buffers; ++b)
        if (c->buffer[b].result) {
          if (!(expected[b] = malloc(c->buffer[b].bytes))) die("no memory");
          memcpy(expected[b], m->args[b], c->buffer[b].bytes);
        }
    } else {
      equal = results_equal(c, m, expected);
    }
    printf("{\"checked\": %d, \"equal\": %s}\n", i, equal ? "true" : "false");
    if (!equal) {
      once[i] = 0;
      continue;
    }
    once[i] = seconds(c, m, 1); /* warm */
  }
  for (int r = 0; r < rounds; ++r) {
    for (int j = 0; j < slm_candidate_count; ++j) {
      int i = (j + r) % slm_candidate_count; /* nobody is always behind the same */
      if (once[i] == 0 || (r > 0 && once[i] > HOPELESS * once[0])) continue;
      alarm((unsigned)limit + 1);
      printf("{\"begin\": %d}\n", i);
      double number = millis / 1e3 / once[i];
      times[i * rounds + r] = seconds(&slm_candidates[i], &memories[i], number < 1 ? 1 : (long)number);
    }
    if (r == 0)
      for (int i = 0; i < slm_candidate_count; ++i)
        if (once[i] != 0) once[i] = times[i * rounds];
  }
  for (int i = 0; i < slm_candidate_count; ++i) {
    if (once[i] == 0) continue;
    printf("{\"index\": %d, \"seconds\": [", i);
    for (int r = 0; r < rounds && times[i * rounds + r] > 0; ++r)
      printf("%s%.9g", r ? ", " : "", times[i * rounds + r]);
    printf("]}\n");
  }
  return fflush(stdout) == 0 ? 0 : 4;
}
