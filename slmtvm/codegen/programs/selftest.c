/* Does this device compute what was computed where the model was compiled? To the last bit, since
 * results do not depend on the machine. And how fast?
 *
 *   slm-selftest BUNDLE [--keys FILE] [--least-counter N] [--threads N] [--seconds N] [--least-speed N]
 *
 * The model's code is linked in; of BUNDLE the weights and the manifest are read, which must be signed
 * by a key of FILE (PEM) where that is given; key.h says where the key of encrypted weights comes from.
 * Prints a line for each thing that was compared, and ends with 0 where all is well, 1 where results
 * differ or are too slow, 2 where the bundle cannot be opened here, 64 for wrong usage. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "json.h"
#include "key.h"
#include "plan_tables.h"
#include "public_keys.h"
#include "sha256.h"
#include "slm.h"
#include "threads.h"
#include "trust.h"

enum { OK, DIFFERS, CANNOT, USAGE = 64 };
enum { MOST_TOKENS = 1024 };

typedef struct {
  int32_t tokens[MOST_TOKENS], source[MOST_TOKENS];
  size_t count, source_count;
  char sha256[2 * SLM_SHA256_BYTES + 1];
} expected;

static const char *bundle;

static int cannot(const char *what) {
  fprintf(stderr, "slm-selftest: %s: %s\n", bundle, what);
  return CANNOT;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 0 where `object` has no list of token ids called `name`. */
static size_t read_tokens(slm_json object, const char *name, int32_t tokens[MOST_TOKENS]) {
  slm_json at, unused, value;
  size_t count = 0;
  if (!slm_json_member(object, name, &at)) return 0;
  while (slm_json_each(&at, &unused, &value)) {
    uint64_t token;
    if (count == MOST_TOKENS || !slm_json_number(value, &token) || token > INT32_MAX) return 0;
    tokens[count++] = (int32_t)token;
  }
  return count;
}

static const char *read_expected(const slm_manifest *manifest, expected *e) {
  slm_json text = {manifest->text, manifest->text + manifest->bytes}, value;
  if (!slm_json_valid(text)) return "manifest.json is not valid JSON";
  if (!slm_json_member(text, "targets", &value) ||
      !slm_json_member(value, slm_plan.target, &value))
    return "manifest.json says nothing of the target that this program is for";
  if (!slm_json_member(value, "selftest", &value)) return "manifest.json has no self-test";
  e->count = read_tokens(value, "tokens", e->tokens);
  e->source_count = read_tokens(value, "source", e->source);
  if (!e->count || !slm_json_member(value, "sha256", &value) ||
      !slm_json_string(value, e->sha256, sizeof e->sha256))
    return "manifest.json has no self-test: the bundle was compiled without a check";
  return NULL;
}

static void add(slm_sha256 *hash, const float *values, size_t count) {
  slm_sha256_update(hash, values, count * sizeof *values); /* all targets are little endian */
}

/* All outputs of an encoder, one after the other. */
static int32_t encode(slm_session *session, const expected *e, slm_sha256 *hash) {
  int32_t code = slm_encode(session, e->tokens, e->count, NULL);
  for (int32_t i = 0; code >= 0 && i < slm_output_count(); ++i) {
    slm_output output = {.size = sizeof output};
    code = slm_output_info(i, &output);
    if (code < 0) break;
    size_t count = (output.pooled ? 1 : e->count) * (size_t)output.features;
    float *values = malloc(count * sizeof *values);
    if (!values) return SLM_ERR_MEMORY;
    code = slm_output_get(session, i, values);
    if (code >= 0) add(hash, values, count);
    free(values);
  }
  return code;
}

/* A decoder's logits after each token, appended `step` at a time. */
static int32_t decode(slm_session *session, const expected *e, size_t step, slm_sha256 *hash) {
  int32_t code = slm_seek(session, 0);
  size_t width = (size_t)slm_output_size();
  float *rows = malloc(step * width * sizeof *rows);
  if (!rows) return SLM_ERR_MEMORY;
  if (code >= 0 && e->source_count) code = slm_encode(session, e->source, e->source_count, NULL);
  for (size_t at = 0; code >= 0 && at < e->count; at += step) {
    size_t count = e->count - at < step ? e->count - at : step;
    code = slm_eval_all(session, e->tokens + at, count, rows);
    if (code >= 0) add(hash, rows, count * width);
  }
  free(rows);
  return code;
}

/* OK, DIFFERS or CANNOT; tokens are given `step` at a time. */
static int compare(slm_model *model, const expected *e, size_t step, int threads) {
  slm_session *session;
  slm_sha256 hash;
  uint8_t digest[SLM_SHA256_BYTES];
  char text[2 * SLM_SHA256_BYTES + 1];
  if (slm_session_new(model, &session) < 0) return cannot(slm_last_error());
  slm_sha256_init(&hash);
  int32_t code = slm_plan.encoder ? encode(session, e, &hash) : decode(session, e, step, &hash);
  slm_session_free(session);
  if (code < 0) return cannot(slm_last_error());
  slm_sha256_final(&hash, digest);
  for (int i = 0; i < SLM_SHA256_BYTES; ++i) snprintf(text + 2 * i, 3, "%02x", digest[i]);
  int same = strcmp(text, e->sha256) == 0;
  printf("%s: %zu tokens, %zu at a time, %d threads\n", same ? "same" : "DIFFERENT", e->count, step,
         threads);
  return same ? OK : DIFFERS;
}

/* Tokens a second, one at a time for a decoder, all at once for an encoder; negative: an error. */
static double speed(slm_model *model, const expected *e, double seconds) {
  slm_session *session;
  if (slm_session_new(model, &session) < 0) return -1;
  int32_t code = e->source_count ? slm_encode(session, e->source, e->source_count, NULL) : SLM_OK;
  double start = now(), tokens = 0, passed = 0;
  while (code >= 0 && passed < seconds) {
    if (slm_plan.encoder) {
      code = slm_encode(session, e->tokens, e->count, NULL);
      tokens += (double)e->count;
    } else {
      if (slm_position(session) >= (int32_t)e->count) code = slm_seek(session, 0);
      if (code >= 0) code = slm_eval(session, &e->tokens[slm_position(session)], 1, NULL);
      tokens += 1;
    }
    passed = now() - start;
  }
  slm_session_free(session);
  return code < 0 ? -1 : tokens / passed;
}

static int run(const slm_options *options, const expected *e, double seconds, double least) {
  slm_model *model;
  if (slm_open(bundle, options, &model) < 0) return cannot(slm_last_error());
  int threads = 1;
  const char *info = slm_model_info(model), *of = info ? strstr(info, "\"threads\": ") : NULL;
  if (of) threads = atoi(of + strlen("\"threads\": "));
  int result = compare(model, e, e->count, threads);
  if (result == OK && !slm_plan.encoder) result = compare(model, e, 1, threads);
  if (result == OK && seconds > 0) {
    double found = speed(model, e, seconds);
    if (found < 0) {
      result = cannot(slm_last_error());
    } else {
      printf("speed: %.1f tokens/s, %d threads\n", found, threads);
      if (found < least) {
        fprintf(stderr, "slm-selftest: %.1f tokens/s, at least %.1f are wanted\n", found, least);
        result = DIFFERS;
      }
    }
  }
  slm_close(model);
  return result;
}

static int usage(void) {
  fprintf(stderr, "usage: slm-selftest BUNDLE [--keys FILE] [--least-counter N] [--threads N] "
                  "[--seconds N] [--least-speed N]\n");
  return USAGE;
}

int main(int argc, char **argv) {
  static expected e;
  slm_options options = {.size = sizeof options, .threads = 0};
  char *keys = NULL;
  double seconds = 0.5, least = 0;
  if (argc < 2 || argv[1][0] == '-' || argc % 2) return usage();
  bundle = argv[1];
  for (int i = 2; i < argc; i += 2) {
    char *end = argv[i + 1];
    if (!*end) return usage();
    if (!strcmp(argv[i], "--keys")) {
      free(keys);
      keys = read_keys(argv[i + 1]);
      if (!keys) {
        fprintf(stderr, "slm-selftest: %s: cannot be read\n", argv[i + 1]);
        return CANNOT;
      }
      continue;
    }
    if (!strcmp(argv[i], "--least-counter")) options.least_counter = strtoull(argv[i + 1], &end, 10);
    if (!strcmp(argv[i], "--threads")) options.threads = (int32_t)strtol(argv[i + 1], &end, 10);
    if (!strcmp(argv[i], "--seconds")) seconds = strtod(argv[i + 1], &end);
    if (!strcmp(argv[i], "--least-speed")) least = strtod(argv[i + 1], &end);
    if (*end) return usage();
  }
  options.public_keys = keys;
  slm_manifest manifest;
  int32_t code = keys ? slm_manifest_trust(bundle, keys, options.least_counter, &manifest)
                      : slm_manifest_read(bundle, &manifest);
  if (code < 0) return cannot(slm_last_error());
  const char *wrong = read_expected(&manifest, &e);
  slm_manifest_free(&manifest);
  if (wrong) return cannot(wrong);
  if (take_weights_key("slm-selftest", &options) < 0) return CANNOT;
  int32_t asked = options.threads;
  options.threads = 1;
  int result = run(&options, &e, seconds, least);
  options.threads = asked;
  if (result == OK && asked != 1) result = run(&options, &e, seconds, least);
  forget_weights_key();
  printf("%s\n", result == OK ? "ok" : "FAILED");
  free(keys);
  return result;
}
