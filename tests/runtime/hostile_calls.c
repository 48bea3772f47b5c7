/* Calls the C interface at random, half of the time with arguments that it must refuse.
 *
 *   hostile_calls BUNDLE SEED CALLS THREADS
 *
 * Exits 0 if every call answered as slm.h says; a crash or a sanitizer's report is the caller's to
 * see. THREADS > 1 runs as many random conversations at the same time on one model. */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "slm.h"

#define EXPECT(condition)                                                            \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition,         \
              slm_last_error());                                                     \
      exit(3);                                                                       \
    }                                                                                \
  } while (0)

enum { MOST_EXTRA_TOKENS = 5 };

typedef struct {
  const char *bundle;
  slm_model *model;
  uint64_t random;
  long calls;
  int encoder;
  int32_t encoded; /* tokens of the last encoding */
  enum { NONE, KEYS, SKIP } mask;
} conversation;

static uint32_t random_bits(conversation *c) {
  c->random = c->random * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(c->random >> 32);
}

static int32_t below(conversation *c, uint32_t limit) {
  return (int32_t)(random_bits(c) % limit);
}

static float random_float(conversation *c) {
  static const float special[] = {0, -0.0f, 1, -1, 1e-30f, 1e30f, FLT_MAX, INFINITY, -INFINITY, NAN};
  uint32_t bits = random_bits(c);
  float value;
  switch (below(c, 3)) {
    case 0: return special[below(c, sizeof special / sizeof *special)];
    case 1: memcpy(&value, &bits, sizeof value); return value;
    default: return (float)bits / 4294967296.0f;
  }
}

/* Mostly small; now and then the ends of its type. */
static int32_t random_int(conversation *c, int32_t limit) {
  static const int32_t special[] = {INT32_MIN, INT32_MAX, -1, 0};
  return below(c, 4) ? below(c, (uint32_t)limit + 2) - 1 : special[below(c, 4)];
}

static void expect_refusal(int64_t result) {
  EXPECT(result <= SLM_ERR_ARGUMENT && result >= SLM_ERR_MASK);
  EXPECT(slm_last_error()[0] != 0);
}

static void call_eval(conversation *c, slm_session *session, int32_t *tokens, float *rows) {
  int32_t context = slm_context_size(), before = slm_position(session);
  size_t count = (size_t)below(c, (uint32_t)(context + MOST_EXTRA_TOKENS));
  int valid = count > 0 && count <= (size_t)(context - before);
  /* Ids are valid below 2; a toy's vocabulary is larger. */
  for (size_t i = 0; i < count; ++i) tokens[i] = below(c, 2);
  if (count && below(c, 4) == 0) {
    tokens[below(c, (uint32_t)count)] = below(c, 2) ? INT32_MIN : 1000000;
    valid = 0;
  }
  if (below(c, 20) == 0) count = SIZE_MAX - (size_t)below(c, 4), valid = 0;
  const int32_t *given = below(c, 20) ? tokens : (valid = 0, NULL);
  float *output = below(c, 10) ? rows : NULL;
  int32_t result;
  switch (below(c, 3)) {
    case 0:
      result = slm_eval(session, given, count, output);
      valid = valid && !c->encoder;
      break;
    case 1:
      result = slm_eval_all(session, given, count, output);
      valid = valid && !c->encoder && output;
      break;
    default:
      result = slm_encode(session, given, count, output);
      valid = valid && c->encoder;
  }
  if (valid)
    EXPECT(result == SLM_OK);
  else
    expect_refusal(result);
  if (valid && c->encoder) c->encoded = (int32_t)count;
  EXPECT(slm_position(session) == before + (valid && !c->encoder ? (int32_t)count : 0));
}

/* A mask of some kind; how many tokens it shows. */
static size_t random_mask(conversation *c, uint8_t *mask, size_t count) {
  int32_t kind = below(c, 5);
  size_t visible = 0, border = (size_t)below(c, (uint32_t)count + 1);
  for (size_t i = 0; i < count; ++i) {
    int shown = kind == 0 ? 1 : kind == 1 ? i < border : kind == 2 ? i >= border : below(c, 2);
    mask[i] = shown && (kind != 4 || border) ? (uint8_t)(1 + below(c, 255)) : 0;
    visible += mask[i] != 0;
  }
  return visible;
}

/* Whether the visible tokens come first. */
static int is_length(const uint8_t *mask, size_t visible) {
  for (size_t i = 0; i < visible; ++i)
    if (!mask[i]) return 0;
  return 1;
}

static void expect_zeros(const float *rows, const uint8_t *mask, size_t count) {
  size_t width = (size_t)slm_output_size();
  for (size_t i = 0; i < count; ++i)
    for (size_t j = 0; j < width; ++j)
      EXPECT(mask[i] ? isfinite(rows[i * width + j]) : rows[i * width + j] == 0);
}

static void call_masked(conversation *c, slm_session *session, int32_t *tokens, uint8_t *mask,
                        float *rows) {
  size_t context = (size_t)slm_context_size();
  int32_t before = slm_position(session);
  size_t count = (size_t)below(c, (uint32_t)(context + MOST_EXTRA_TOKENS));
  for (size_t i = 0; i < count; ++i) tokens[i] = below(c, 2);
  size_t visible = random_mask(c, mask, count), given = count;
  size_t kept = c->mask == SKIP ? visible : count;
  int valid = count > 0 && count <= context && kept <= context - (size_t)before;
  int hides = visible < count, last = count && mask[count - 1];
  if (below(c, 20) == 0) given = SIZE_MAX - (size_t)below(c, 4), valid = 0;
  const uint8_t *chosen = mask;
  if (below(c, 20) == 0) {
    chosen = NULL;
    hides = 0, last = 1, kept = count;
    valid = valid && count <= context - (size_t)before;
  }
  float *output = below(c, 10) ? rows : NULL;
  int32_t result, kind = below(c, 3);
  memset(rows, 0xff, (count < context ? count : context) * (size_t)slm_output_size() * sizeof *rows);
  if (kind == 2) {
    result = slm_encode_masked(session, tokens, chosen, given, output);
    valid = valid && c->encoder && (chosen ? visible > 0 : 1);
    if (c->mask == NONE && hides) valid = valid && is_length(mask, visible);
  } else {
    result = kind ? slm_eval_all_masked(session, tokens, chosen, given, output)
                  : slm_eval_masked(session, tokens, chosen, given, output);
    valid = valid && !c->encoder && (kind == 0 ? last : output != NULL);
    valid = valid && !(hides && c->mask == NONE);
  }
  if (valid)
    EXPECT(result == SLM_OK);
  else
    expect_refusal(result);
  EXPECT(slm_position(session) == before + (valid && !c->encoder ? (int32_t)kept : 0));
  if (valid && c->encoder) c->encoded = (int32_t)count;
  if (valid && kind && chosen && output) expect_zeros(rows, mask, count);
}

/* The sessions of a batch: the conversation's own, and three that are only evaluated together. */
enum { OTHERS = 3 };

static void call_batch(conversation *c, slm_session *session, slm_session *const *others,
                       float *rows) {
  slm_session *given[OTHERS + 1];
  int32_t tokens[OTHERS + 1], before[OTHERS + 1];
  size_t count = 1 + (size_t)below(c, OTHERS + 1);
  int valid = !c->encoder;
  for (size_t i = 0; i < count; ++i) {
    given[i] = i ? others[i - 1] : session;
    tokens[i] = below(c, 2);
    if (below(c, 16) == 0) tokens[i] = below(c, 2) ? INT32_MIN : 1000000, valid = 0;
    if (i && below(c, 20) == 0) EXPECT(slm_seek(given[i], 0) == SLM_OK);
    before[i] = slm_position(given[i]);
    if (before[i] == slm_context_size()) valid = 0;
  }
  size_t wrong = (size_t)below(c, (uint32_t)count);
  if (below(c, 16) == 0) valid = 0, given[wrong] = below(c, 2) ? NULL : given[(wrong + 1) % count];
  if (count == 1 && given[0] == session && valid == 0 && !c->encoder &&
      tokens[0] >= 0 && tokens[0] < 2 && before[0] < slm_context_size())
    valid = 1; /* the next one of one session is itself */
  int none = below(c, 20) == 0 ? 1 + below(c, 3) : 0;
  int32_t result = slm_eval_batch(none == 1 ? NULL : given, none == 2 ? NULL : tokens,
                                  none == 3 ? 0 : count, below(c, 4) ? rows : NULL);
  valid = valid && !none;
  if (valid) EXPECT(result == SLM_OK);
  else expect_refusal(result);
  for (size_t i = 0; i < count; ++i)
    EXPECT(slm_position(i ? others[i - 1] : session) == before[i] + valid);
}

static void call_exits(conversation *c, slm_session *session) {
  EXPECT(slm_use_exits(session, random_int(c, 2)) == SLM_OK);
  EXPECT(slm_exit_taken(session) == 0); /* the model has none */
  expect_refusal(slm_use_exits(NULL, 0));
  expect_refusal(slm_exit_taken(NULL));
}

static void call_outputs(conversation *c, slm_session *session, float *rows) {
  int32_t count = slm_output_count(), index = random_int(c, count - 1);
  slm_output output = {.size = below(c, 10) ? sizeof output : random_bits(c) % sizeof output};
  int32_t result = slm_output_info(index, below(c, 10) ? &output : NULL);
  int known = index >= 0 && index < count;
  if (result == SLM_OK)
    EXPECT(known && output.features > 0 && output.name);
  else
    expect_refusal(result);
  expect_refusal(slm_output_get(NULL, index, rows));
  result = slm_output_get(session, index, below(c, 2) ? rows : NULL);
  if (!known || result < 0)
    expect_refusal(result);
  else
    EXPECT(result == (c->encoder ? c->encoded : 1));
  if (known && c->encoder) EXPECT((result > 0) == (c->encoded > 0));
}

static void call_sample(conversation *c, slm_session *session) {
  slm_sampling sampling = {
      .size = below(c, 10) ? sizeof sampling : random_bits(c) % sizeof sampling,
      .temperature = random_float(c),
      .top_k = random_int(c, 40),
      .top_p = random_float(c),
      .min_p = random_float(c),
      .repetition_penalty = random_float(c),
      .seed = random_bits(c),
  };
  const slm_bias biases[] = {{random_int(c, 40), random_float(c)}, {1, 0.5f}};
  if (below(c, 3) == 0) {
    sampling.presence_penalty = random_float(c);
    sampling.frequency_penalty = random_float(c);
    sampling.written = random_int(c, 40);
    sampling.most = random_int(c, 40);
    sampling.bias_count = random_int(c, 2);
    sampling.biases = below(c, 5) ? biases : NULL;
  }
  if (sampling.bias_count > 2) sampling.bias_count = 2; /* so many are there */
  int32_t token = slm_sample(session, below(c, 5) ? &sampling : NULL);
  if (token < 0)
    expect_refusal(token);
  else
    EXPECT(token < 1000);
}

static void call_open(conversation *c) {
  static const char *const paths[] = {NULL, "", "/", "/nonexistent", "/dev"};
  slm_options options = {
      .size = below(c, 2) ? sizeof options : random_bits(c) % (2 * sizeof options),
      .threads = below(c, 2) ? 1 + below(c, 3) : (below(c, 2) ? -1 : 257 + below(c, 1000)),
      .flags = below(c, 2) ? 0 : random_bits(c) % 4,
  };
  const char *path = below(c, 2) ? c->bundle : paths[below(c, 5)];
  char *long_path = NULL;
  if (below(c, 10) == 0) {
    long_path = malloc(70000);
    memset(long_path, 'a', 69999);
    long_path[69999] = 0;
    path = long_path;
  }
  slm_model *model = (slm_model *)&options;
  int32_t result = slm_open(path, &options, below(c, 10) ? &model : NULL);
  if (result == SLM_OK) {
    EXPECT(slm_close(model) == SLM_OK);
  } else {
    expect_refusal(result);
    EXPECT(model == NULL || model == (slm_model *)&options);
  }
  free(long_path);
}

static void *converse(void *argument) {
  conversation *c = argument;
  size_t context = (size_t)slm_context_size(), width = (size_t)slm_output_size();
  int32_t *tokens = malloc((context + MOST_EXTRA_TOKENS) * sizeof *tokens);
  uint8_t *mask = malloc(context + MOST_EXTRA_TOKENS);
  float *rows = malloc(context * width * sizeof *rows);
  slm_session *session = NULL;
  EXPECT(slm_session_new(c->model, &session) == SLM_OK);
  slm_session *others[OTHERS];
  for (int i = 0; i < OTHERS; ++i) EXPECT(slm_session_new(c->model, &others[i]) == SLM_OK);
  for (long i = 0; i < c->calls; ++i) {
    switch (below(c, 12)) {
      case 11: call_batch(c, session, others, rows); break;
      case 10: call_outputs(c, session, rows); call_exits(c, session); break;
      case 0:
        expect_refusal(slm_close(c->model)); /* it has sessions */
        break;
      case 1: {
        int32_t to = random_int(c, (int32_t)context), at = slm_position(session);
        int32_t result = slm_seek(session, to);
        if (to >= 0 && to <= at)
          EXPECT(result == SLM_OK && slm_position(session) == to);
        else
          expect_refusal(result);
        break;
      }
      case 2: call_sample(c, session); break;
      case 3:
        if (below(c, 10) == 0) call_open(c);
        break;
      case 4: {
        slm_session *none = session;
        expect_refusal(slm_session_new(NULL, &none));
        EXPECT(none == NULL);
        expect_refusal(slm_session_new(c->model, NULL));
        expect_refusal(slm_eval(NULL, tokens, 1, rows));
        expect_refusal(slm_eval_masked(NULL, tokens, mask, 1, rows));
        expect_refusal(slm_encode_segments(NULL, tokens, NULL, mask, 1, rows));
        int32_t beyond = below(c, 2) ? -1 : 1000000;
        tokens[0] = 0;
        expect_refusal(slm_encode_segments(session, tokens, &beyond, NULL, 1, rows));
        expect_refusal(slm_encode_masked(session, NULL, mask, 1, rows));
        expect_refusal(slm_eval_all_masked(session, NULL, NULL, 1, rows));
        expect_refusal(slm_seek(NULL, 0));
        expect_refusal(slm_position(NULL));
        expect_refusal(slm_sample(NULL, NULL));
        expect_refusal(slm_session_bytes(NULL));
        break;
      }
      case 5:
      case 6: call_masked(c, session, tokens, mask, rows); break;
      default: call_eval(c, session, tokens, rows);
    }
  }
  EXPECT(slm_session_free(session) == SLM_OK);
  EXPECT(slm_session_free(NULL) == SLM_OK);
  for (int i = 0; i < OTHERS; ++i) EXPECT(slm_session_free(others[i]) == SLM_OK);
  free(tokens);
  free(mask);
  free(rows);
  return NULL;
}

int main(int argc, char **argv) {
  enum { MOST_THREADS = 8 };
  if (argc != 5) return 2;
  int threads = atoi(argv[4]);
  slm_options options = {.size = sizeof options, .threads = threads};
  slm_model *model;
  EXPECT(threads >= 1 && threads <= MOST_THREADS);
  EXPECT(slm_abi_version() == SLM_ABI_VERSION);
  EXPECT(slm_last_error()[0] == 0);
  EXPECT(slm_open(argv[1], &options, &model) == SLM_OK);
  conversation conversations[MOST_THREADS];
  pthread_t ids[MOST_THREADS];
  for (int i = 0; i < threads; ++i) {
    conversations[i] = (conversation){argv[1], model, strtoull(argv[2], NULL, 10) + (uint64_t)i,
                                      atol(argv[3]), strstr(slm_info(), "\"encoder\"") != NULL, 0,
                                      strstr(slm_info(), "\"mask\": \"keys\"")   ? KEYS
                                      : strstr(slm_info(), "\"mask\": \"skip\"") ? SKIP
                                                                                 : NONE};
    EXPECT(pthread_create(&ids[i], NULL, converse, &conversations[i]) == 0);
  }
  for (int i = 0; i < threads; ++i) pthread_join(ids[i], NULL);
  EXPECT(slm_close(model) == SLM_OK);
  EXPECT(slm_close(NULL) == SLM_OK);
  puts("done");
  return 0;
}
