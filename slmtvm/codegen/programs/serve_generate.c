/* Writing text: which session, a step of it, and where the text ends. */
#include <math.h>
#include <string.h>

#include "serve.h"

/* ---- sessions ---- */

static int32_t shared_prefix(const session_slot *slot, const connection *c) {
  int32_t most = slot->count < c->job.prompt_tokens ? slot->count : c->job.prompt_tokens, n = 0;
  while (n < most && slot->tokens[n] == c->tokens[n]) ++n;
  return n;
}

/* The free session that has most of the prompt already; of equal ones that which was not used for the
 * longest time. */
session_slot *find_session(server *s, const connection *c) {
  session_slot *best = NULL;
  int32_t most = -1;
  for (session_slot *slot = s->model.slots; slot < s->model.slots + s->options.sessions; ++slot) {
    if (slot->busy) continue;
    int32_t shared = shared_prefix(slot, c);
    if (shared < most || (shared == most && slot->used > best->used)) continue;
    best = slot;
    most = shared;
  }
  return best;
}

void release_session(server *s, connection *c) {
  session_slot *slot = c->job.slot;
  if (!slot) return;
  slot->busy = 0;
  slot->used = ++s->uses;
  c->job.slot = NULL;
}

static void fail(server *s, connection *c) {
  /* What the session holds is not known any more. */
  if (c->job.slot && slm_seek(c->job.slot->session, 0) == SLM_OK) c->job.slot->count = 0;
  release_session(s, c);
  answer_error(s, c, 500, "server_error", NULL, NULL, slm_last_error());
}

/* Passes over the prompt's text, as slm-run does. */
static int skip_prompt(server *s, connection *c) {
  char piece[PIECE_BYTES];
  job *j = &c->job;
  int32_t bytes;
  do
    bytes = slm_detokenize(s->model.tokenizer, &j->text_state, c->tokens, (size_t)j->count, 0, piece,
                           sizeof piece);
  while (bytes >= 0 && (bytes & SLM_MORE_TEXT));
  /* A row of bytes that the prompt ends in may go on: its bytes so far are passed over, too. */
  if (bytes >= 0 && j->text_state.token < (uint64_t)j->count)
    j->text_state.written = (uint32_t)((uint64_t)j->count - j->text_state.token);
  return bytes < 0 ? -1 : 0;
}

static int begin_context(server *s, connection *c) {
  job *j = &c->job;
  session_slot *slot = j->slot;
  if (s->model.kind == KIND_ENCODER_DECODER) {
    if (slm_encode(slot->session, c->tokens, (size_t)j->prompt_tokens, NULL) < 0) return -1;
    c->tokens[0] = s->model.start;
    j->count = j->sampling.written = 1;
    slot->count = 0;
    return 0;
  }
  j->count = j->sampling.written = j->prompt_tokens;
  j->cached = shared_prefix(slot, c);
  if (j->cached == j->count) --j->cached; /* its last token's logits are needed */
  if (slm_seek(slot->session, j->cached) < 0) {
    /* Layers with a window do not have what is seen from there any more. */
    j->cached = 0;
    if (slm_seek(slot->session, 0) < 0) return -1;
  }
  slot->count = j->evaluated = j->cached;
  return 0;
}

void start_generation(server *s, connection *c, session_slot *slot) {
  job *j = &c->job;
  j->slot = slot;
  slot->busy = 1;
  if (j->route == ROUTE_EMBEDDING) return;
  if (begin_context(s, c) < 0 || (s->model.tokenizer && skip_prompt(s, c) < 0)) {
    fail(s, c);
    return;
  }
  s->counters.prompt_tokens += (uint64_t)j->prompt_tokens;
  s->counters.cached_tokens += (uint64_t)j->cached;
  write_begin(s, c);
}

/* ---- a step ---- */

/* The session holds `n` more of the tokens. */
static void note_evaluated(server *s, connection *c, int32_t n) {
  job *j = &c->job;
  session_slot *slot = j->slot;
  if (s->model.kind == KIND_DECODER) {
    memcpy(slot->tokens + slot->count, c->tokens + j->evaluated, (size_t)n * sizeof *c->tokens);
    slot->count += n;
  }
  j->evaluated += n;
}

static int evaluate(server *s, connection *c) {
  job *j = &c->job;
  int32_t left = j->count - j->evaluated, n = left < s->model.chunk ? left : s->model.chunk;
  if (n == 0) return 0; /* together with others */
  if (slm_eval(j->slot->session, c->tokens + j->evaluated, (size_t)n, NULL) < 0) return -1;
  note_evaluated(s, c, n);
  return 0;
}

int wants_a_token(const connection *c) {
  const job *j = &c->job;
  int writes = j->route == ROUTE_COMPLETION || j->route == ROUTE_CHAT;
  return c->state == RUNNING && writes && j->count - j->evaluated == 1;
}

void evaluate_together(server *s, int count) {
  for (int i = 0; i < count; ++i) {
    const job *j = &s->together[i]->job;
    s->together_in[i] = j->slot->session;
    s->together_tokens[i] = s->together[i]->tokens[j->evaluated];
  }
  /* Where that fails no session has changed, and each text's own step finds out whose fault it was. */
  if (slm_eval_batch(s->together_in, s->together_tokens, (size_t)count, NULL) < 0) return;
  for (int i = 0; i < count; ++i) note_evaluated(s, s->together[i], 1);
  s->counters.together_tokens += (uint64_t)count;
}

/* The chosen token's probability and those of the likeliest, of the logits as they are. */
static int note_logprobs(server *s, connection *c, int32_t token) {
  job *j = &c->job;
  if (!j->logprobs) return 0;
  const float *logits = s->values;
  if (slm_output_get(j->slot->session, 0, s->values) < 0) return -1;
  float greatest = logits[0];
  for (int32_t i = 1; i < s->model.vocabulary; ++i)
    if (logits[i] > greatest) greatest = logits[i];
  double sum = 0;
  for (int32_t i = 0; i < s->model.vocabulary; ++i) sum += exp((double)logits[i] - greatest);
  const double base = greatest + log(sum);
  likely *told = c->likeliest + (size_t)j->made * (1 + MOST_LIKELY);
  told[0] = (likely){(float)(logits[token] - base), token};
  for (int k = 1; k < j->logprobs; ++k) {
    int32_t best = -1, last = k > 1 ? told[k - 1].token : -1;
    for (int32_t i = 0; i < s->model.vocabulary; ++i) {
      int told_before = last >= 0 && (logits[i] > logits[last] ||
                                      (logits[i] == logits[last] && i <= last));
      if (!told_before && (best < 0 || logits[i] > logits[best])) best = i;
    }
    told[k] = (likely){(float)(logits[best] - base), best};
  }
  return 0;
}

static int ends_text(const served_model *m, int32_t token) {
  for (int i = 0; i < m->end_count; ++i)
    if (m->ends[i] == token) return 1;
  return 0;
}

/* Cuts the text at the first stop string that begins in what is new. */
static void cut_at_stop(connection *c, size_t before) {
  job *j = &c->job;
  size_t begin = before > STOP_BYTES ? before - STOP_BYTES : 0, cut = j->text_length;
  if (begin < j->text_sent) begin = j->text_sent;
  for (int i = 0; i < j->stop_count; ++i) {
    const size_t length = j->stop_bytes[i];
    for (size_t at = begin; at + length <= j->text_length && at < cut; ++at)
      if (memcmp(c->text + at, j->stops[i], length) == 0) cut = at;
  }
  if (cut == j->text_length || j->cut) return;
  j->text_length = cut;
  j->cut = 1;
  j->finish = FINISH_STOP;
}

static int add_text(server *s, connection *c, uint32_t flags) {
  job *j = &c->job;
  if (!s->model.tokenizer) return 0;
  for (;;) {
    size_t before = j->text_length, room = s->text_room - before;
    if (room < PIECE_BYTES) { /* more text than so many tokens usually are */
      if (!j->finish) j->finish = FINISH_LENGTH;
      return 0;
    }
    int32_t bytes = slm_detokenize(s->model.tokenizer, &j->text_state, c->tokens, (size_t)j->count,
                                   flags, c->text + before, PIECE_BYTES);
    if (bytes < 0) return -1;
    j->text_length += (size_t)(bytes & ~SLM_MORE_TEXT);
    cut_at_stop(c, before);
    if (j->cut || !(bytes & SLM_MORE_TEXT)) return 0;
  }
}

/* Whether the text ends at a token, before or behind it. */
static follow ends_at(const server *s, job *j, int32_t token) {
  if (j->sampling.constraint) return follow_constraint(j, token);
  return ends_text(&s->model, token) ? ENDS_BEFORE : GOES_ON;
}

static int choose(server *s, connection *c) {
  job *j = &c->job;
  if (j->sampling.constraint) j->sampling.most = most_to_come(s, j);
  int32_t token = slm_sample(j->slot->session, &j->sampling);
  if (token < 0) return -1;
  double now = seconds_now();
  if (j->made == 0) {
    j->first_token = now;
    observe(&s->first_token, now - j->began);
  } else {
    observe(&s->each_token, now - j->last_token);
  }
  j->last_token = now;
  const follow end = ends_at(s, j, token);
  if (end == FOLLOW_FAILED) return -1;
  if (end == ENDS_BEFORE) {
    j->finish = FINISH_STOP;
    return 0;
  }
  if (note_logprobs(s, c, token) < 0) return -1;
  c->tokens[j->count++] = token;
  ++j->made;
  ++s->counters.generated_tokens;
  if (add_text(s, c, 0) < 0) return -1;
  if (!j->finish && end == ENDS_BEHIND) j->finish = FINISH_STOP;
  if (!j->finish && (j->made == j->most_tokens || j->count > s->model.context))
    j->finish = FINISH_LENGTH;
  return 0;
}

void step_generation(server *s, connection *c) {
  job *j = &c->job;
  if (evaluate(s, c) < 0) {
    fail(s, c);
    return;
  }
  if (j->evaluated < j->count) return;
  if (choose(s, c) < 0 || (j->finish && !j->cut && add_text(s, c, SLM_TEXT_ENDS) < 0)) {
    fail(s, c);
    return;
  }
  if (!j->finish) {
    if (j->stream) write_events(s, c);
    return;
  }
  release_session(s, c);
  observe(&s->whole, seconds_now() - j->began);
  ++s->counters.finished[j->finish];
  find_calls(s, c);
  c->state = ANSWERING;
  finish_generation(s, c);
}

void finish_generation(server *s, connection *c) {
  if (c->job.stream) write_events(s, c);
  else write_whole(s, c);
}
