/* Choosing the next token from the logits. */
#include <math.h>
#include <string.h>

#include "error.h"
#include "session.h"

static int32_t check_sampling(const slm_sampling *p) {
  if (p->size < sizeof *p)
    return slm_fail(SLM_ERR_ARGUMENT, "slm_sampling.size is %u, must be sizeof(slm_sampling), %zu",
                    p->size, sizeof *p);
  if (!(p->temperature >= 0) || isinf(p->temperature))
    return slm_fail(SLM_ERR_ARGUMENT, "temperature is %g, must be 0 or more", p->temperature);
  if (p->top_k < 0) return slm_fail(SLM_ERR_ARGUMENT, "top_k is %d, must be 0 or more", p->top_k);
  if (!(p->top_p >= 0 && p->top_p <= 1))
    return slm_fail(SLM_ERR_ARGUMENT, "top_p is %g, must be 0 to 1", p->top_p);
  if (!(p->min_p >= 0 && p->min_p <= 1))
    return slm_fail(SLM_ERR_ARGUMENT, "min_p is %g, must be 0 to 1", p->min_p);
  if (!(p->repetition_penalty >= 0) || isinf(p->repetition_penalty))
    return slm_fail(SLM_ERR_ARGUMENT, "repetition_penalty is %g, must be 0 or more",
                    p->repetition_penalty);
  return SLM_OK;
}

/* All tokens with their logits, those of the context penalised (CTRL, arXiv:1909.05858, section 4.1:
 * a positive logit is divided, a negative one multiplied). */
static void list_candidates(slm_session *s, float penalty) {
  for (int32_t i = 0; i < slm_plan.vocab_size; ++i)
    s->candidates[i] = (slm_candidate){s->logits[i], i};
  if (penalty == 0 || penalty == 1) return;
  memset(s->seen, 0, (size_t)slm_plan.vocab_size);
  /* The limits of an encoder-decoder are its source's, no token of which is in the context. */
  const float *limits = slm_plan.source_count ? NULL : slm_limits(s);
  for (int32_t i = 0; i < s->position; ++i) {
    int32_t token = s->history[i];
    if (s->seen[token] || (limits && limits[i] < 0)) continue;
    s->seen[token] = 1;
    float *logit = &s->candidates[token].logit;
    *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
  }
}

/* Of equal logits the lower token comes first. */
static int before(slm_candidate a, slm_candidate b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

static void sift_down(slm_candidate *heap, int32_t count, int32_t at) {
  for (int32_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && before(heap[child + 1], heap[child])) ++child;
    if (!before(heap[child], heap[at])) return;
    slm_candidate held = heap[at];
    heap[at] = heap[child];
    heap[child] = held;
  }
}

static double weight(slm_candidate c, slm_candidate likeliest, float temperature) {
  return exp(((double)c.logit - likeliest.logit) / temperature);
}

/* Moves the likeliest of a heap of `count` to its end, which leaves the heap. */
static slm_candidate pop(slm_candidate *heap, int32_t count) {
  slm_candidate best = heap[0];
  heap[0] = heap[count - 1];
  heap[count - 1] = best;
  sift_down(heap, count - 1, 0);
  return best;
}

/* Cuts the candidates down as top_k, top_p and min_p say, in this order; what is kept stays at the
 * end of the array, its number is returned. Only as much is sorted as is kept. */
static int32_t keep_likeliest(slm_candidate *heap, int32_t count, const slm_sampling *p) {
  int32_t limit = p->top_k > 0 && p->top_k < count ? p->top_k : count;
  int cut_p = p->top_p > 0 && p->top_p < 1;
  if (limit == count && !cut_p && p->min_p == 0) return count;
  for (int32_t i = count / 2 - 1; i >= 0; --i) sift_down(heap, count, i);
  slm_candidate likeliest = heap[0];
  double total = 0, sum = 0;
  if (limit < count)
    for (int32_t i = 0; i < limit; ++i)
      total += weight(pop(heap, count - i), likeliest, p->temperature);
  else if (cut_p)
    for (int32_t i = 0; i < count; ++i) total += weight(heap[i], likeliest, p->temperature);
  for (int32_t kept = 0; kept < limit; ++kept) {
    slm_candidate next = limit < count ? heap[count - 1 - kept] : pop(heap, count - kept);
    double w = weight(next, likeliest, p->temperature);
    if (w < p->min_p || (cut_p && sum >= p->top_p * total)) return kept;
    sum += w;
  }
  return limit;
}

/* Uniform in [0, 1) from seed and position: splitmix64 (Steele, Lea, Flood, OOPSLA 2014). */
static double uniform(uint64_t seed, int32_t position) {
  uint64_t x = seed + ((uint64_t)position + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return (double)(x >> 11) * 0x1p-53;
}

static int32_t draw(const slm_candidate *from, int32_t count, slm_candidate likeliest,
                    float temperature, double u) {
  double total = 0;
  for (int32_t i = 0; i < count; ++i) total += weight(from[i], likeliest, temperature);
  double left = u * total;
  for (int32_t i = 0; i < count; ++i) {
    double w = weight(from[i], likeliest, temperature);
    if (left < w) return from[i].token;
    left -= w;
  }
  return likeliest.token; /* rounding only */
}

/* The greatest of `count` logits; NAN where one is not a number. Greedy decoding comes here for each
 * token: a maximum of its own for each of a few lanes is what compilers make vector code of. */
static float greatest_logit(const float *logits, int32_t count) {
  enum { LANES = 16 };
  float greatest[LANES];
  int32_t whole = count / LANES * LANES, not_numbers[LANES] = {0};
  for (int lane = 0; lane < LANES; ++lane) greatest[lane] = -INFINITY;
  for (int32_t i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) {
      float logit = logits[i + lane];
      greatest[lane] = logit > greatest[lane] ? logit : greatest[lane];
      not_numbers[lane] |= logit != logit;
    }
  for (int32_t i = whole; i < count; ++i) {
    greatest[0] = logits[i] > greatest[0] ? logits[i] : greatest[0];
    not_numbers[0] |= isnan(logits[i]);
  }
  for (int lane = 1; lane < LANES; ++lane) {
    greatest[0] = greatest[lane] > greatest[0] ? greatest[lane] : greatest[0];
    not_numbers[0] |= not_numbers[lane];
  }
  return not_numbers[0] ? NAN : greatest[0];
}

/* The first of the likeliest tokens. Blocks bound what is searched for it once the greatest logit is
 * known. */
static int32_t likeliest_token(const float *logits, int32_t count) {
  enum { BLOCK = 1024 };
  float greatest = -INFINITY;
  int32_t token = 0;
  for (int32_t i = 0; i < count; i += BLOCK) {
    float in_block = greatest_logit(logits + i, count - i < BLOCK ? count - i : BLOCK);
    if (in_block <= greatest) continue;
    greatest = in_block;
    token = i;
    if (isnan(greatest)) break;
  }
  if (isnan(greatest) || isinf(greatest))
    return slm_fail(SLM_ERR_LOGITS, "the logits are not finite numbers");
  while (logits[token] != greatest) ++token;
  return token;
}

static int32_t sample(slm_session *session, const slm_sampling *sampling) {
  if (slm_plan.encoder) return slm_fail(SLM_ERR_KIND, "this model is an encoder: nothing to sample");
  if (slm_plan.output_size != slm_plan.vocab_size)
    return slm_fail(SLM_ERR_KIND, "this model's output %s has %d numbers and no logit for each of "
                                  "%d tokens: nothing to sample",
                    slm_plan.outputs[0].name, slm_plan.output_size, slm_plan.vocab_size);
  if (!session->has_logits)
    return slm_fail(SLM_ERR_LOGITS, "no logits to sample from: call slm_eval first");
  int penalised = sampling->repetition_penalty != 0 && sampling->repetition_penalty != 1;
  if (sampling->temperature == 0 && !penalised)
    return likeliest_token(session->logits, slm_plan.vocab_size);
  list_candidates(session, sampling->repetition_penalty);
  slm_candidate *all = session->candidates, likeliest = all[0];
  int32_t count = slm_plan.vocab_size, numbers = 1;
  for (int32_t i = 0; i < count; ++i) {
    if (isnan(all[i].logit)) numbers = 0;
    if (before(all[i], likeliest)) likeliest = all[i];
  }
  if (!numbers || isinf(likeliest.logit))
    return slm_fail(SLM_ERR_LOGITS, "the logits are not finite numbers");
  if (sampling->temperature == 0) return likeliest.token;
  int32_t kept = keep_likeliest(all, count, sampling);
  return draw(all + (count - kept), kept, likeliest, sampling->temperature,
              uniform(sampling->seed, session->position));
}

int32_t slm_sample(slm_session *session, const slm_sampling *sampling) {
  const slm_sampling greedy = {sizeof greedy, 0, 0, 0, 0, 0, 0};
  if (!sampling) sampling = &greedy;
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  code = check_sampling(sampling);
  if (code == SLM_OK) code = sample(session, sampling);
  slm_leave(session);
  return code;
}
