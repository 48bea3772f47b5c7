/* Evaluates random prompts, cut at random, with 1 to 8 threads, some of whose parts are delayed, and
 * compares all logits with those of one thread.
 *
 *   equal_threads BUNDLE SEED ROUNDS PARTS
 *
 * Linked in place of cores.c: there are as many cores as threads; with PARTS 1 their speeds differ,
 * so that a thread's share has several parts. Exits 0 if all bits are equal. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cores.h"
#include "delay.h"
#include "slm.h"

enum { MOST_THREADS = 8, VOCABULARY = 50 };

static int mixed;

int32_t slm_cores_choose(int asked, const char *list, int all, const char *root, slm_cores *cores) {
  (void)list, (void)root;
  *cores = (slm_cores){.threads = asked, .count = asked, .mixed = mixed, .all = all};
  return SLM_OK;
}

void slm_cores_bind(const slm_cores *cores) { (void)cores; }

/* Every so often a part takes far longer than the others, as if the kernel had taken its core. */
void delay_part(int thread, int part) {
  static atomic_uint calls;
  unsigned call = atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
  if ((call * 2654435761u + (unsigned)(thread + part)) % 61 != 0) return;
  struct timespec time = {0, 20000 + (call % 7) * 30000};
  nanosleep(&time, NULL);
}

static uint64_t state;

static int32_t below(int32_t limit) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)((state >> 33) % (uint64_t)limit);
}

static void check(int32_t code, const char *what) {
  if (code == SLM_OK) return;
  fprintf(stderr, "%s: %s\n", what, slm_last_error());
  exit(3);
}

static slm_session *open_session(const char *bundle, int threads, slm_model **model) {
  /* All threads all the time, or as many as pay. */
  slm_options options = {.size = sizeof options, .threads = threads,
                         .flags = below(2) ? SLM_ALL_THREADS : 0};
  slm_session *session;
  check(slm_open(bundle, &options, model), "slm_open");
  check(slm_session_new(*model, &session), "slm_session_new");
  return session;
}

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  state = strtoull(argv[2], NULL, 10);
  long rounds = atol(argv[3]);
  mixed = atoi(argv[4]);
  size_t context = (size_t)slm_context_size(), width = (size_t)slm_output_size();
  int32_t *tokens = malloc(context * sizeof *tokens);
  float *expected = malloc(context * width * sizeof *expected), *rows = malloc(context * width * 4);
  slm_model *models[MOST_THREADS];
  slm_session *sessions[MOST_THREADS];
  for (int i = 0; i < MOST_THREADS; ++i)
    sessions[i] = open_session(argv[1], i + 1, &models[i]);
  for (long round = 0; round < rounds; ++round) {
    int32_t count = 1 + below((int32_t)context);
    for (int32_t i = 0; i < count; ++i) tokens[i] = below(VOCABULARY);
    for (int t = 0; t < MOST_THREADS; ++t) {
      float *target = t ? rows : expected;
      check(slm_seek(sessions[t], 0), "slm_seek");
      for (int32_t at = 0, n; at < count; at += n) {
        n = t ? 1 + below(count - at) : count;
        check(slm_eval_all(sessions[t], tokens + at, (size_t)n, target + (size_t)at * width), "eval");
      }
      if (t && memcmp(expected, rows, (size_t)count * width * sizeof *rows)) {
        fprintf(stderr, "round %ld: %d threads differ\n", round, t + 1);
        return 1;
      }
    }
  }
  for (int i = 0; i < MOST_THREADS; ++i) {
    check(slm_session_free(sessions[i]), "slm_session_free");
    check(slm_close(models[i]), "slm_close");
  }
  free(tokens);
  free(expected);
  free(rows);
  puts("done");
  return 0;
}
