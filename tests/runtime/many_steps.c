/* Runs steps that take next to nothing, so that threads come late to most of them, and looks whether
 * each part of each was computed once: many_steps THREADS MIXED STEPS. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cores.h"
#include "pool.h"

enum { MOST_PARTS = 64 };

typedef struct {
  _Atomic int computed[MOST_PARTS];
  _Atomic int parts;
} step;

static void compute(void *context, int32_t thread, int32_t part, int32_t parts) {
  step *s = context;
  (void)thread;
  if (part < 0 || part >= parts || parts > MOST_PARTS) abort();
  atomic_fetch_add_explicit(&s->computed[part], 1, memory_order_relaxed);
  atomic_store_explicit(&s->parts, parts, memory_order_relaxed);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  slm_cores cores;
  memset(&cores, 0, sizeof cores);
  cores.threads = cores.count = atoi(argv[1]);
  cores.mixed = atoi(argv[2]);
  slm_pool *pool;
  if (slm_pool_new(&cores, 1, &pool) < 0) return 2;
  /* Two, so that a part of an earlier step that is computed late shows. */
  static step steps[2];
  for (int i = 0; i < atoi(argv[3]); ++i) {
    step *s = &steps[i % 2];
    memset(s, 0, sizeof *s);
    slm_pool_run(pool, compute, s);
    for (int part = 0; part < s->parts; ++part)
      if (s->computed[part] != 1) {
        printf("step %d: part %d computed %d times\n", i, part, s->computed[part]);
        return 1;
      }
    /* The threads come to rest, and late to the next one, after some. */
    for (volatile int wait = i % 64 ? 0 : 3000; wait > 0; --wait) {
    }
  }
  slm_pool_free(pool);
  puts("done");
  return 0;
}
