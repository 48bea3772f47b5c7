/* Tokens in, logits or hidden states out. */
#include <math.h>
#include <string.h>

#include "device.h"
#include "error.h"
#include "eval.h"
#include "execute.h"

typedef enum { LAST_ROW, ALL_ROWS, ENCODE } output_mode;

/* What a call is to run, and then what is left of it. */
typedef struct {
  const int32_t *tokens;
  const uint8_t *mask; /* not 0: visible. NULL: all are */
  size_t count;
  const int32_t *segments; /* NULL: 0 for all */
} sequence;

static size_t count_visible(const sequence *s) {
  if (!s->mask) return s->count;
  size_t visible = 0;
  for (size_t i = 0; i < s->count; ++i) visible += s->mask[i] != 0;
  return visible;
}

static int32_t check_call(const slm_session *session, const float *output, output_mode mode) {
  int encodes = slm_plan.encoder || slm_plan.source_count;
  if (mode == ENCODE && !encodes)
    return slm_fail(SLM_ERR_KIND, "this model is a decoder: use slm_eval");
  if (mode != ENCODE && slm_plan.encoder)
    return slm_fail(SLM_ERR_KIND, "this model is an encoder: use slm_encode");
  if (mode != ENCODE && slm_plan.source_count && !session->source)
    return slm_fail(SLM_ERR_KIND, "this model is an encoder-decoder: slm_encode its source first");
  if (!output && mode == ALL_ROWS)
    return slm_fail(SLM_ERR_ARGUMENT, "the place for the output is NULL");
  return SLM_OK;
}

static int32_t check_tokens(const slm_session *session, const sequence *s, output_mode mode) {
  if (!s->tokens || s->count == 0) return slm_fail(SLM_ERR_ARGUMENT, "no tokens given");
  int32_t room = slm_plan.context - session->position;
  if (mode == ENCODE) room = slm_plan.encoder ? slm_plan.context : slm_plan.source_context;
  /* Where hidden tokens are left out, visible ones count; a bound of all comes before reading them. */
  size_t most = (size_t)(s->mask && mode != ENCODE ? slm_plan.context : room);
  size_t count = s->count;
  if (count <= most && slm_plan.mask == SLM_MASK_SKIP) count = count_visible(s);
  if (count > (size_t)room)
    return slm_fail(SLM_ERR_CONTEXT, "%zu tokens at position %d do not fit the context of %d",
                    count, mode == ENCODE ? 0 : session->position,
                    room + (mode == ENCODE ? 0 : session->position));
  for (size_t i = 0; i < s->count; ++i)
    if (s->tokens[i] < 0 || s->tokens[i] >= slm_plan.vocab_size)
      return slm_fail(SLM_ERR_TOKEN, "token %zu is %d, must be 0 to %d", i, s->tokens[i],
                      slm_plan.vocab_size - 1);
  int32_t types = slm_plan.segment_types ? slm_plan.segment_types : 1;
  for (size_t i = 0; s->segments && i < s->count; ++i)
    if (s->segments[i] < 0 || s->segments[i] >= types)
      return slm_fail(SLM_ERR_ARGUMENT, "the segment of token %zu is %d, must be 0 to %d", i,
                      s->segments[i], types - 1);
  return SLM_OK;
}

/* A model that finds its row by the last end token computes nothing for a text without one. */
static int32_t check_final(const sequence *s) {
  size_t last = s->count;
  if (slm_plan.final_token < 0) return SLM_OK;
  while (s->mask && last > 1 && !s->mask[last - 1]) --last;
  int32_t token = s->tokens[last - 1];
  if (token == slm_plan.final_token) return SLM_OK;
  return slm_fail(SLM_ERR_TOKEN, "the last token is %d, and this model takes its row at an end token: "
                                 "end the sequence with %d", token, slm_plan.final_token);
}

static int32_t check_mask(const sequence *s, output_mode mode) {
  size_t visible = count_visible(s);
  if (visible == s->count) return SLM_OK;
  if (mode != ENCODE && slm_plan.source_count)
    return slm_fail(SLM_ERR_MASK, "the mask hides tokens of an encoder-decoder's text: only its "
                                  "source, read by slm_encode_masked, may have hidden ones");
  if (slm_plan.mask == SLM_MASK_NONE) {
    if (mode != ENCODE)
      return slm_fail(SLM_ERR_MASK, "the mask hides tokens, and this bundle was compiled for "
                                    "sequences without hidden ones: compile the model with "
                                    "--mask arbitrary");
    for (size_t i = 0; i < visible; ++i)
      if (!s->mask[i])
        return slm_fail(SLM_ERR_MASK, "token %zu is hidden and a later one is not, and this bundle "
                                      "was compiled for hidden tokens at the end alone: compile "
                                      "the model with --mask arbitrary", i);
  }
  if (mode == ENCODE && visible == 0)
    return slm_fail(SLM_ERR_MASK, "the mask hides every token: there is nothing to encode");
  if (mode == LAST_ROW && !s->mask[s->count - 1])
    return slm_fail(SLM_ERR_MASK, "the mask hides the last token, after which logits are wanted: "
                                  "end with a visible one, or use slm_eval_all_masked");
  return SLM_OK;
}

/* Whether hidden tokens are not run at all. */
static int leaves_out(const sequence *s) { return s->mask && slm_plan.mask != SLM_MASK_KEYS; }

/* The next `count` tokens of `s` into the step; padding is token 0. What padded rows leave in the KV
 * cache lies behind the context's end: no other row reads it before real tokens overwrite it. */
static void put_tokens(slm_session *session, sequence *s, int32_t count, int32_t rows) {
  int32_t *step = (int32_t *)session->base[SLM_SPACE_TOKENS];
  if (leaves_out(s)) {
    for (int32_t put = 0; put < count; ++s->tokens, ++s->mask)
      if (*s->mask) step[put++] = *s->tokens;
  } else {
    memcpy(step, s->tokens, (size_t)count * sizeof *step);
    s->tokens += count;
    if (s->mask) s->mask += count;
  }
  memset(step + count, 0, (size_t)(rows - count) * sizeof *step);
}

/* Says of which text each token to run is; 0 for padding. */
static void put_segments(slm_session *session, const sequence *s, int32_t rows) {
  if (!slm_plan.segment_types) return;
  int32_t *ids = (int32_t *)(session->base[SLM_SPACE_STATE] + slm_plan.segments_offset);
  memset(ids, 0, (size_t)rows * sizeof *ids);
  for (size_t i = 0, put = 0; s->segments && i < s->count; ++i)
    if (!leaves_out(s) || s->mask[i]) ids[put++] = s->segments[i];
}

/* Says which keys of the next `count` tokens, from `position` on, are hidden. */
static void limit_keys(slm_session *session, const sequence *s, int32_t position, int32_t count) {
  static const float hidden = -1e30f; /* HIDDEN_SCORE of the kernels */
  float *limits = slm_limits(session);
  if (!limits) return;
  for (int32_t i = 0; i < count; ++i)
    limits[position + i] = !s->mask || s->mask[i] ? INFINITY : hidden;
}

/* Moves `rows` hidden rows from row `first` on to the first place. */
static void move_rows(slm_session *session, int32_t first, int32_t rows) {
  char *hidden = session->base[SLM_SPACE_ARENA] + slm_plan.hidden_offset;
  size_t bytes = (size_t)slm_plan.hidden_size * sizeof(float);
  if (!slm_plan.device)
    memmove(hidden, hidden + (size_t)first * bytes, (size_t)rows * bytes);
  else if (session->failure == SLM_OK)
    session->failure = slm_plan.device->move_rows(session, first, rows);
}

/* Logits of the hidden rows from `first` on, `count` of them, to `logits` and the session's last. */
static void run_heads(slm_session *session, int32_t position, int32_t first, int32_t count,
                      float *logits) {
  const float *output = (const float *)session->base[SLM_SPACE_OUTPUT];
  size_t row = (size_t)slm_plan.output_size;
  for (int32_t done = 0, rows = 0; done < count; done += rows) {
    const slm_function *head =
        slm_choose(slm_plan.heads, slm_plan.head_count, count - done, INT32_MAX);
    rows = head->rows < count - done ? head->rows : count - done;
    /* A head reads from the first row on, which keeps its operands aligned whatever hidden_size is;
     * the rows that this overwrites have had their turn. */
    if (first + done > 0) move_rows(session, first + done, rows);
    slm_execute(session, head, position + first + done, slm_valid(session, rows));
    if (logits) memcpy(logits + (size_t)done * row, output, (size_t)rows * row * sizeof(float));
    session->logits = output + (size_t)(rows - 1) * row;
  }
}

/* How far the largest of the logits is ahead of the next one; exact, so the same everywhere. */
static float lead(const float *logits, int32_t count) {
  float first = -INFINITY, second = -INFINITY;
  for (int32_t i = 0; i < count; ++i) {
    if (logits[i] > first) {
      second = first;
      first = logits[i];
    } else if (logits[i] > second) {
      second = logits[i];
    }
  }
  return first - second;
}

/* Runs the one token of a step to the first exit that is sure of what follows, or to the end; leaves its
 * logits in the outputs. Layers behind an exit keep what they make of the row that it ended with. */
static void run_to_exit(slm_session *session, int32_t position) {
  const float *output = (const float *)session->base[SLM_SPACE_OUTPUT];
  int32_t valid = slm_valid(session, 1);
  const slm_exit *at = slm_plan.exits;
  for (int32_t i = 0; i < slm_plan.exit_count; ++i, ++at) {
    slm_execute(session, &at->stem, position, valid);
    slm_execute(session, &at->head, position, valid);
    if (lead(output, slm_plan.output_size) < at->margin) continue;
    slm_execute(session, &at->fill, position, valid);
    session->logits = output;
    session->exit = (int8_t)(i + 1);
    return;
  }
  slm_execute(session, &at->stem, position, valid);
  run_heads(session, position, 0, 1, NULL);
}

/* Runs `count` tokens of `s`. */
static void eval_tokens(slm_session *session, sequence s, int32_t count, float *logits, int all) {
  const int32_t *step = (const int32_t *)session->base[SLM_SPACE_TOKENS];
  for (int32_t rows = 0, left = count; left > 0; left -= rows) {
    int32_t position = session->position;
    const slm_function *body = slm_choose(slm_plan.bodies, slm_plan.body_count, left,
                                          slm_plan.capacity - position);
    rows = body->rows < left ? body->rows : left;
    if (!slm_plan.source_count) limit_keys(session, &s, position, rows);
    put_tokens(session, &s, rows, body->rows);
    slm_pool_begin(session->model->pool, (int)(body - slm_plan.bodies));
    int may_exit = slm_plan.exit_count && count == 1 && !all && !session->whole;
    session->exit = 0;
    if (may_exit)
      run_to_exit(session, position);
    else
      slm_execute(session, body, position, slm_valid(session, rows));
    if (may_exit) {
      if (logits) memcpy(logits, session->logits, (size_t)slm_plan.output_size * sizeof *logits);
    } else if (all) {
      run_heads(session, position, 0, rows, logits);
      logits += (size_t)rows * (size_t)slm_plan.output_size;
    } else if (rows == left) {
      run_heads(session, position, rows - 1, 1, logits);
    }
    slm_pool_end(session->model->pool);
    slm_note_written(session, position + body->rows);
    memcpy(session->history + position, step, (size_t)rows * sizeof *step);
    session->position = position + rows;
  }
}

static void encode_tokens(slm_session *session, sequence s, int32_t count) {
  /* The smallest function that takes them all: an encoder cannot be run in pieces. */
  const slm_function *function = slm_plan.encoder
                                     ? &slm_plan.bodies[slm_plan.body_count - 1]
                                     : &slm_plan.sources[slm_plan.source_count - 1];
  while (function->rows < count) --function;
  limit_keys(session, &s, 0, count);
  put_segments(session, &s, function->rows);
  put_tokens(session, &s, count, function->rows);
  slm_pool_begin(session->model->pool, slm_plan.encoder
                                           ? (int)(function - slm_plan.bodies)
                                           : slm_plan.body_count + (int)(function - slm_plan.sources));
  slm_execute(session, function, 0, count);
  slm_pool_end(session->model->pool);
  if (slm_plan.encoder) return;
  /* Another source is another context. */
  session->source = count;
  session->position = session->written = 0;
  session->has_logits = 0;
}

/* Moves the rows of visible tokens to their places, if they lie together at the beginning, and makes
 * those of hidden tokens 0. */
static void spread_rows(const sequence *s, size_t visible, size_t width, float *rows) {
  int together = leaves_out(s);
  for (size_t i = s->count, from = visible; i-- > 0;) {
    if (!s->mask[i])
      memset(rows + i * width, 0, width * sizeof *rows);
    else if (together && --from != i)
      memcpy(rows + i * width, rows + from * width, width * sizeof *rows);
  }
}

/* Where output `index` lies after an encoding. */
static float *encoded(const slm_session *session, int32_t index) {
  return (float *)(session->base[SLM_SPACE_OUTPUT] + slm_plan.outputs[index].offset);
}

/* Encodes `s` into the session's outputs, and copies the first one, or a source's hidden rows. */
static void encode(slm_session *session, const sequence *s, size_t visible, float *output) {
  encode_tokens(session, *s, (int32_t)(leaves_out(s) ? visible : s->count));
  float *first = (float *)session->base[SLM_SPACE_OUTPUT];
  size_t rows = s->count, width = (size_t)slm_plan.hidden_size;
  if (slm_plan.encoder) {
    session->rows = (int32_t)s->count;
    for (int32_t i = 0; s->mask && i < slm_plan.output_count; ++i)
      if (!slm_plan.outputs[i].pooled)
        spread_rows(s, visible, (size_t)slm_plan.outputs[i].features, encoded(session, i));
    first = encoded(session, 0);
    width = (size_t)slm_plan.outputs[0].features;
    if (slm_plan.outputs[0].pooled) rows = 1;
  } else if (s->mask) {
    spread_rows(s, visible, width, first);
  }
  if (output) memcpy(output, first, rows * width * sizeof *output);
}

static void run_checked(slm_session *session, const sequence *s, float *output, output_mode mode) {
  size_t visible = count_visible(s);
  if (mode == ENCODE) {
    encode(session, s, visible, output);
    return;
  }
  int32_t count = (int32_t)(leaves_out(s) ? visible : s->count);
  eval_tokens(session, *s, count, output, mode == ALL_ROWS);
  session->has_logits = !s->mask || s->mask[s->count - 1];
  if (s->mask && mode == ALL_ROWS)
    spread_rows(s, visible, (size_t)slm_plan.output_size, output);
}

static int32_t run(slm_session *session, sequence s, float *output, output_mode mode) {
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  code = check_call(session, output, mode);
  if (code == SLM_OK) code = check_tokens(session, &s, mode);
  if (code == SLM_OK) code = check_mask(&s, mode);
  if (code == SLM_OK) code = check_final(&s);
  if (code == SLM_OK) code = slm_pool_acquire(session->model->pool);
  if (code == SLM_OK) {
    int32_t position = session->position, source = session->source;
    session->failure = SLM_OK;
    run_checked(session, &s, output, mode);
    slm_pool_release(session->model->pool);
    code = session->failure;
    if (code != SLM_OK) {
      session->position = slm_can_resume(session, position) ? position : 0;
      session->source = mode == ENCODE ? 0 : source; /* its keys may be half written */
      session->has_logits = session->rows = 0;
    }
  }
  slm_leave(session);
  return code;
}

int32_t slm_check_next(const slm_session *session, const int32_t *token) {
  sequence s = {token, NULL, 1, NULL};
  int32_t code = check_call(session, NULL, LAST_ROW);
  return code == SLM_OK ? check_tokens(session, &s, LAST_ROW) : code;
}

int32_t slm_eval_next(slm_session *session, const int32_t *token, float *logits) {
  sequence s = {token, NULL, 1, NULL};
  session->failure = SLM_OK;
  run_checked(session, &s, logits, LAST_ROW);
  return session->failure;
}

void slm_show_key(slm_session *session) {
  sequence s = {NULL, NULL, 1, NULL};
  if (!slm_plan.source_count) limit_keys(session, &s, session->position, 1);
}

int32_t slm_use_exits(slm_session *session, int32_t use) {
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  session->whole = !use;
  slm_leave(session);
  return SLM_OK;
}

int32_t slm_exit_taken(const slm_session *session) {
  int32_t code = slm_check_session(session);
  return code != SLM_OK ? code : session->exit;
}

int32_t slm_eval(slm_session *session, const int32_t *tokens, size_t count, float *logits) {
  return run(session, (sequence){tokens, NULL, count, NULL}, logits, LAST_ROW);
}

int32_t slm_eval_all(slm_session *session, const int32_t *tokens, size_t count, float *logits) {
  return run(session, (sequence){tokens, NULL, count, NULL}, logits, ALL_ROWS);
}

int32_t slm_encode(slm_session *session, const int32_t *tokens, size_t count, float *output) {
  return run(session, (sequence){tokens, NULL, count, NULL}, output, ENCODE);
}

int32_t slm_eval_masked(slm_session *session, const int32_t *tokens, const uint8_t *mask,
                        size_t count, float *logits) {
  return run(session, (sequence){tokens, mask, count, NULL}, logits, LAST_ROW);
}

int32_t slm_eval_all_masked(slm_session *session, const int32_t *tokens, const uint8_t *mask,
                            size_t count, float *logits) {
  return run(session, (sequence){tokens, mask, count, NULL}, logits, ALL_ROWS);
}

int32_t slm_encode_masked(slm_session *session, const int32_t *tokens, const uint8_t *mask,
                          size_t count, float *output) {
  return run(session, (sequence){tokens, mask, count, NULL}, output, ENCODE);
}

int32_t slm_encode_segments(slm_session *session, const int32_t *tokens, const int32_t *segments,
                            const uint8_t *mask, size_t count, float *output) {
  return run(session, (sequence){tokens, mask, count, segments}, output, ENCODE);
}
