/* Tokens in, logits or hidden states out. */
#include <string.h>

#include "error.h"
#include "execute.h"

typedef enum { LAST_ROW, ALL_ROWS, ENCODE } output_mode;

static int32_t check_call(const slm_session *session, const float *output, output_mode mode) {
  int encodes = slm_plan.encoder || slm_plan.source_count;
  if (mode == ENCODE && !encodes)
    return slm_fail(SLM_ERR_KIND, "this model is a decoder: use slm_eval");
  if (mode != ENCODE && slm_plan.encoder)
    return slm_fail(SLM_ERR_KIND, "this model is an encoder: use slm_encode");
  if (mode != ENCODE && slm_plan.source_count && !session->source)
    return slm_fail(SLM_ERR_KIND, "this model is an encoder-decoder: slm_encode its source first");
  int optional = mode == LAST_ROW || (mode == ENCODE && slm_plan.source_count);
  if (!output && !optional)
    return slm_fail(SLM_ERR_ARGUMENT, "the place for the output is NULL");
  return SLM_OK;
}

static int32_t check_tokens(const slm_session *session, const int32_t *tokens, size_t count,
                            output_mode mode) {
  if (!tokens || count == 0) return slm_fail(SLM_ERR_ARGUMENT, "no tokens given");
  int32_t room = slm_plan.context - session->position;
  if (mode == ENCODE) room = slm_plan.encoder ? slm_plan.context : slm_plan.source_context;
  if (count > (size_t)room)
    return slm_fail(SLM_ERR_CONTEXT, "%zu tokens at position %d do not fit the context of %d",
                    count, mode == ENCODE ? 0 : session->position,
                    room + (mode == ENCODE ? 0 : session->position));
  for (size_t i = 0; i < count; ++i)
    if (tokens[i] < 0 || tokens[i] >= slm_plan.vocab_size)
      return slm_fail(SLM_ERR_TOKEN, "token %zu is %d, must be 0 to %d", i, tokens[i],
                      slm_plan.vocab_size - 1);
  return SLM_OK;
}

/* The step's tokens; padding is token 0. What padded rows leave in the KV cache lies behind the
 * context's end: it is masked until real tokens overwrite it. */
static void put_tokens(slm_session *session, const int32_t *tokens, int32_t count, int32_t rows) {
  int32_t *step = (int32_t *)session->base[SLM_SPACE_TOKENS];
  memcpy(step, tokens, (size_t)count * sizeof *step);
  memset(step + count, 0, (size_t)(rows - count) * sizeof *step);
}

/* What "valid" stands for: the tokens of the source that cross-attention sees, else the step's. */
static int32_t valid_positions(const slm_session *session, int32_t rows) {
  return slm_plan.source_count ? session->source : rows;
}

/* Logits of the hidden rows from `first` on, `count` of them, to `logits` and the session's last. */
static void run_heads(slm_session *session, int32_t position, int32_t first, int32_t count,
                      float *logits) {
  char *hidden = session->base[SLM_SPACE_ARENA] + slm_plan.hidden_offset;
  const float *output = (const float *)session->base[SLM_SPACE_OUTPUT];
  size_t row = (size_t)slm_plan.output_size;
  size_t hidden_row_bytes = (size_t)slm_plan.hidden_size * sizeof(float);
  for (int32_t done = 0, rows = 0; done < count; done += rows) {
    const slm_function *head =
        slm_choose(slm_plan.heads, slm_plan.head_count, count - done, INT32_MAX);
    rows = head->rows < count - done ? head->rows : count - done;
    /* A head reads from the first row on, which keeps its operands aligned whatever hidden_size is;
     * the rows that this overwrites have had their turn. */
    if (first + done > 0)
      memmove(hidden, hidden + (size_t)(first + done) * hidden_row_bytes,
              (size_t)rows * hidden_row_bytes);
    slm_execute(session, head, position + first + done, valid_positions(session, rows));
    if (logits) memcpy(logits + (size_t)done * row, output, (size_t)rows * row * sizeof(float));
    session->logits = output + (size_t)(rows - 1) * row;
  }
}

static void eval_tokens(slm_session *session, const int32_t *tokens, int32_t count, float *logits,
                        int all) {
  for (int32_t rows = 0, left = count; left > 0; left -= rows, tokens += rows) {
    int32_t position = session->position;
    const slm_function *body = slm_choose(slm_plan.bodies, slm_plan.body_count, left,
                                          slm_plan.capacity - position);
    rows = body->rows < left ? body->rows : left;
    put_tokens(session, tokens, rows, body->rows);
    slm_execute(session, body, position, valid_positions(session, rows));
    if (all) {
      run_heads(session, position, 0, rows, logits);
      logits += (size_t)rows * (size_t)slm_plan.output_size;
    } else if (rows == left) {
      run_heads(session, position, rows - 1, 1, logits);
    }
    memcpy(session->history + position, tokens, (size_t)rows * sizeof *tokens);
    session->position = position + rows;
  }
  session->has_logits = 1;
}

static void encode_tokens(slm_session *session, const int32_t *tokens, int32_t count,
                          float *output) {
  /* The smallest function that takes them all: an encoder cannot be run in pieces. */
  const slm_function *function = slm_plan.encoder
                                     ? &slm_plan.bodies[slm_plan.body_count - 1]
                                     : &slm_plan.sources[slm_plan.source_count - 1];
  int32_t width = slm_plan.encoder ? slm_plan.output_size : slm_plan.hidden_size;
  while (function->rows < count) --function;
  put_tokens(session, tokens, count, function->rows);
  slm_execute(session, function, 0, count);
  if (output)
    memcpy(output, session->base[SLM_SPACE_OUTPUT],
           (size_t)count * (size_t)width * sizeof(float));
  if (slm_plan.encoder) return;
  /* Another source is another context. */
  session->source = count;
  session->position = 0;
  session->has_logits = 0;
}

static int32_t run(slm_session *session, const int32_t *tokens, size_t count, float *output,
                   output_mode mode) {
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  code = check_call(session, output, mode);
  if (code == SLM_OK) code = check_tokens(session, tokens, count, mode);
  if (code == SLM_OK) code = slm_pool_acquire(session->model->pool);
  if (code == SLM_OK) {
    if (mode == ENCODE)
      encode_tokens(session, tokens, (int32_t)count, output);
    else
      eval_tokens(session, tokens, (int32_t)count, output, mode == ALL_ROWS);
    slm_pool_release(session->model->pool);
  }
  slm_leave(session);
  return code;
}

int32_t slm_eval(slm_session *session, const int32_t *tokens, size_t count, float *logits) {
  return run(session, tokens, count, logits, LAST_ROW);
}

int32_t slm_eval_all(slm_session *session, const int32_t *tokens, size_t count, float *logits) {
  return run(session, tokens, count, logits, ALL_ROWS);
}

int32_t slm_encode(slm_session *session, const int32_t *tokens, size_t count, float *output) {
  return run(session, tokens, count, output, ENCODE);
}
