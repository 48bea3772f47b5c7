/* Runs a bundle's library on a list of tokens, for machines that the test runner only emulates.
 *
 *   slm_eval BUNDLE TOKENS OUTPUT all|together|encode|outputs|greedy|memory THREADS WINDOW
 *
 * TOKENS holds int32 ids. "all" and "encode" start afresh for each WINDOW of them and write a float
 * row for each, "together" the same with a session for each window; "greedy" evaluates them and writes the WINDOW int32 ids that follow; "memory" does
 * the same and writes one int32, the most memory that was ever resident, in kB. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "slm.h"

static void check(int32_t status) {
  if (status >= 0) return;
  fprintf(stderr, "error %d: %s\n", status, slm_last_error());
  exit(3);
}

static int32_t peak_resident_kb(void) {
  char line[256];
  int kb = -1;
  FILE *status = fopen("/proc/self/status", "r");
  while (status && fgets(line, sizeof line, status)) sscanf(line, "VmHWM: %d kB", &kb);
  if (status) fclose(status);
  return kb;
}

/* A token of each window at a time, `count` in all. */
static void eval_together(slm_model *model, const int32_t *tokens, size_t count, size_t window,
                          FILE *out) {
  enum { MOST = 16 };
  slm_session *sessions[MOST];
  int32_t next[MOST];
  size_t windows = count / window, width = (size_t)slm_output_size();
  if (windows > MOST || count % window) exit(2);
  float *rows = malloc(windows * width * sizeof *rows);
  float *all = malloc(count * width * sizeof *all);
  for (size_t i = 0; i < windows; ++i) check(slm_session_new(model, &sessions[i]));
  for (size_t at = 0; at < window; ++at) {
    for (size_t i = 0; i < windows; ++i) next[i] = tokens[i * window + at];
    check(slm_eval_batch(sessions, next, windows, rows));
    for (size_t i = 0; i < windows; ++i)
      memcpy(all + (i * window + at) * width, rows + i * width, width * sizeof *rows);
  }
  fwrite(all, width * sizeof *all, count, out);
  for (size_t i = 0; i < windows; ++i) check(slm_session_free(sessions[i]));
  free(all);
  free(rows);
}

int main(int argc, char **argv) {
  if (argc != 7) return 2;
  FILE *in = fopen(argv[2], "rb"), *out = fopen(argv[3], "wb");
  const char *mode = argv[4];
  size_t window = (size_t)atol(argv[6]);
  if (!in || !out) return 2;
  fseek(in, 0, SEEK_END);
  size_t count = (size_t)ftell(in) / sizeof(int32_t);
  rewind(in);
  int32_t *tokens = malloc((count + window) * sizeof *tokens);
  if (fread(tokens, sizeof *tokens, count, in) != count) return 2;

  slm_options options = {.size = sizeof options, .threads = atoi(argv[5])};
  slm_model *model;
  slm_session *session;
  check(slm_open(argv[1], &options, &model));
  check(slm_session_new(model, &session));
  size_t width = (size_t)slm_output_size();
  int measure = !strcmp(mode, "memory");
  if (measure || !strcmp(mode, "greedy")) {
    check(slm_eval(session, tokens, count, NULL));
    for (size_t i = 0; i < window; ++i) {
      int32_t next = slm_sample(session, NULL);
      check(next);
      if (!measure) fwrite(&next, sizeof next, 1, out);
      check(slm_eval(session, &next, 1, NULL));
    }
    int32_t kb = peak_resident_kb();
    if (measure) fwrite(&kb, sizeof kb, 1, out);
  } else if (!strcmp(mode, "together")) {
    eval_together(model, tokens, count, window, out);
  } else if (!strcmp(mode, "outputs")) {
    check(slm_encode(session, tokens, count, NULL));
    for (int32_t i = 0; i < slm_output_count(); ++i) {
      slm_output output = {.size = sizeof output};
      check(slm_output_info(i, &output));
      int32_t n = slm_output_get(session, i, NULL);
      check(n);
      float *values = malloc((size_t)n * (size_t)output.features * sizeof *values);
      check(slm_output_get(session, i, values));
      fwrite(values, (size_t)output.features * sizeof *values, (size_t)n, out);
      free(values);
    }
  } else {
    float *rows = malloc(window * width * sizeof *rows);
    for (size_t at = 0; at < count; at += window) {
      size_t n = count - at < window ? count - at : window;
      if (!strcmp(mode, "all")) {
        check(slm_seek(session, 0));
        check(slm_eval_all(session, tokens + at, n, rows));
      } else {
        check(slm_encode(session, tokens + at, n, rows));
      }
      fwrite(rows, width * sizeof *rows, n, out);
    }
    free(rows);
  }
  check(slm_session_free(session));
  check(slm_close(model));
  free(tokens);
  fclose(in);
  return fclose(out);
}
