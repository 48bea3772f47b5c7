/* Choosing the next token from the logits. */
#include <math.h>
#include <string.h>

#include "constraint.h"
#include "device.h"
#include "error.h"
#include "session.h"

/* Of the struct's first version: all up to `seed`. */
enum { LEAST_SIZE = offsetof(slm_sampling, presence_penalty) };

static int32_t check_finite(float value, const char *name) {
  return isfinite(value) ? SLM_OK
                         : slm_fail(SLM_ERR_ARGUMENT, "%s is %g, must be a number", name, value);
}

static int32_t check_additions(const slm_sampling *p) {
  int32_t code = check_finite(p->presence_penalty, "presence_penalty");
  if (code == SLM_OK) code = check_finite(p->frequency_penalty, "frequency_penalty");
  if (code != SLM_OK) return code;
  if (p->written < 0)
    return slm_fail(SLM_ERR_ARGUMENT, "written is %d, must be a position", p->written);
  if (p->most < 0) return slm_fail(SLM_ERR_ARGUMENT, "most is %d, must be 0 or more", p->most);
  if (p->bias_count < 0 || (p->bias_count && !p->biases))
    return slm_fail(SLM_ERR_ARGUMENT, "bias_count is %d, and biases are%s there", p->bias_count,
                    p->biases ? "" : " not");
  for (int32_t i = 0; i < p->bias_count; ++i) {
    if (p->biases[i].token < 0 || p->biases[i].token >= slm_plan.vocab_size)
      return slm_fail(SLM_ERR_TOKEN, "a bias is of token %d, must be 0 to %d", p->biases[i].token,
                      slm_plan.vocab_size - 1);
    code = check_finite(p->biases[i].bias, "a bias");
    if (code != SLM_OK) return code;
  }
  if (!p->constraint) return SLM_OK;
  code = slm_check_constraint(p->constraint, p->state);
  if (code == SLM_OK && p->constraint->vocab_size != (uint32_t)slm_plan.vocab_size)
    code = slm_fail(SLM_ERR_CONSTRAINT, "the constraint is for a vocabulary of %u, this model has %d: "
                                        "compile it with this model's bundle",
                    p->constraint->vocab_size, slm_plan.vocab_size);
  return code;
}

static int32_t check_sampling(const slm_sampling *p) {
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
  return check_additions(p);
}

static int repeats_matter(const slm_sampling *p) {
  return p->repetition_penalty != 0 && p->repetition_penalty != 1;
}

static int writing_matters(const slm_sampling *p) {
  return p->presence_penalty != 0 || p->frequency_penalty != 0;
}

enum { REPEATED = 1, WRITTEN = 2, ALLOWED = 4 };

/* Penalises the tokens of the context. The repetition penalty: CTRL, arXiv:1909.05858, section 4.1, a
 * positive logit is divided, a negative one multiplied. */
static void penalise(slm_session *s, const slm_sampling *p) {
  memset(s->seen, 0, (size_t)slm_plan.vocab_size);
  /* The limits of an encoder-decoder are its source's, no token of which is in the context. */
  const float *limits = slm_plan.source_count ? NULL : slm_limits(s);
  const float penalty = p->repetition_penalty;
  for (int32_t i = 0; repeats_matter(p) && i < s->position; ++i) {
    int32_t token = s->history[i];
    if (s->seen[token] || (limits && limits[i] < 0)) continue;
    s->seen[token] = REPEATED;
    float *logit = &s->candidates[token].logit;
    *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
  }
  for (int32_t i = p->written; writing_matters(p) && i < s->position; ++i) {
    int32_t token = s->history[i];
    float *logit = &s->candidates[token].logit;
    if (!(s->seen[token] & WRITTEN)) *logit -= p->presence_penalty;
    s->seen[token] |= WRITTEN;
    *logit -= p->frequency_penalty;
  }
}

/* Marks the tokens that the constraint allows. */
static void mark_allowed(slm_session *s, const slm_sampling *p) {
  const slm_constraint *c = p->constraint;
  memset(s->seen, 0, (size_t)slm_plan.vocab_size);
  for (uint32_t i = c->row_begins[p->state]; i < c->row_begins[p->state + 1]; ++i) {
    const slm_transition t = c->transitions[i];
    if (!slm_reaches(c, t.next, p->most)) continue;
    for (uint32_t k = c->class_begins[t.class]; k < c->class_begins[t.class + 1]; ++k)
      s->seen[c->tokens[k]] = ALLOWED;
  }
  if (c->left[p->state] == 0)
    for (uint32_t k = 0; k < c->end_count; ++k) s->seen[c->ends[k]] = ALLOWED;
}

/* The tokens that may follow, with their logits; how many there are. */
static int32_t list_candidates(slm_session *s, const slm_sampling *p) {
  int32_t count = 0;
  for (int32_t i = 0; i < slm_plan.vocab_size; ++i)
    s->candidates[i] = (slm_candidate){s->logits[i], i};
  if (repeats_matter(p) || writing_matters(p)) penalise(s, p);
  for (int32_t i = 0; i < p->bias_count; ++i)
    s->candidates[p->biases[i].token].logit += p->biases[i].bias;
  if (!p->constraint) return slm_plan.vocab_size;
  mark_allowed(s, p);
  for (int32_t i = 0; i < slm_plan.vocab_size; ++i)
    if (s->seen[i]) s->candidates[count++] = s->candidates[i];
  return count;
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

/* The same, which a device may have found already: the logits are then left where they are. */
static int32_t likeliest_of(const slm_session *s) {
  slm_candidate found;
  if (!slm_plan.device || !slm_plan.device->likeliest(s, &found))
    return likeliest_token(s->logits, slm_plan.vocab_size);
  if (isnan(found.logit) || isinf(found.logit))
    return slm_fail(SLM_ERR_LOGITS, "the logits are not finite numbers");
  return found.token;
}

/* Why no token may follow. */
static int32_t nothing_allowed(const slm_sampling *p) {
  const uint32_t left = p->constraint->left[p->state];
  if (left == 0)
    return slm_fail(SLM_ERR_CONSTRAINT, "the text is whole, and its constraint lets nothing follow");
  return slm_fail(SLM_ERR_CONSTRAINT, "the constraint asks for at least %u tokens, and %d may come",
                  left, p->most);
}

/* The likeliest token that the constraint allows: of most states few are, and those alone are read. */
static int32_t likeliest_allowed(const slm_session *s, const slm_sampling *p) {
  const slm_constraint *c = p->constraint;
  slm_candidate best = {-INFINITY, INT32_MAX};
  int numbers = 1;
  for (uint32_t i = c->row_begins[p->state]; i < c->row_begins[p->state + 1]; ++i) {
    const slm_transition t = c->transitions[i];
    if (!slm_reaches(c, t.next, p->most)) continue;
    for (uint32_t k = c->class_begins[t.class]; k < c->class_begins[t.class + 1]; ++k) {
      const slm_candidate next = {s->logits[c->tokens[k]], (int32_t)c->tokens[k]};
      numbers &= next.logit == next.logit;
      if (before(next, best)) best = next;
    }
  }
  for (uint32_t k = 0; c->left[p->state] == 0 && k < c->end_count; ++k) {
    const slm_candidate next = {s->logits[c->ends[k]], (int32_t)c->ends[k]};
    numbers &= next.logit == next.logit;
    if (before(next, best)) best = next;
  }
  if (numbers && best.token == INT32_MAX) return nothing_allowed(p);
  if (!numbers || isinf(best.logit))
    return slm_fail(SLM_ERR_LOGITS, "the logits are not finite numbers");
  return best.token;
}

static int32_t sample(slm_session *session, const slm_sampling *sampling) {
  if (slm_plan.encoder) return slm_fail(SLM_ERR_KIND, "this model is an encoder: nothing to sample");
  if (slm_plan.output_size != slm_plan.vocab_size)
    return slm_fail(SLM_ERR_KIND, "this model's output %s has %d numbers and no logit for each of "
                                  "%d tokens: nothing to sample",
                    slm_plan.outputs[0].name, slm_plan.output_size, slm_plan.vocab_size);
  if (!session->has_logits)
    return slm_fail(SLM_ERR_LOGITS, "no logits to sample from: call slm_eval first");
  if (sampling->temperature == 0 && !repeats_matter(sampling) && !writing_matters(sampling) &&
      !sampling->bias_count)
    return sampling->constraint ? likeliest_allowed(session, sampling)
                                : likeliest_of(session);
  int32_t count = list_candidates(session, sampling), numbers = 1;
  if (count == 0) return nothing_allowed(sampling);
  slm_candidate *all = session->candidates, likeliest = all[0];
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
  slm_sampling full = {0}; /* all of an older caller's, and nothing of what came since */
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  if (sampling && sampling->size < LEAST_SIZE) {
    code = slm_fail(SLM_ERR_ARGUMENT, "slm_sampling.size is %u, must be sizeof(slm_sampling), %zu",
                    sampling->size, sizeof full);
  } else {
    /* A size between the two would cut a field in half. */
    if (sampling) memcpy(&full, sampling, sampling->size < sizeof full ? LEAST_SIZE : sizeof full);
    code = check_sampling(&full);
    if (code == SLM_OK) code = sample(session, &full);
  }
  slm_leave(session);
  return code;
}
