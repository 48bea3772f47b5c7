/* Tokens in, logits or hidden states out. */
#include <string.h>

#include "error.h"
#include "execute.h"

static int32_t check_tokens(const slm_session *session, const int32_t *tokens, size_t count) {
  if (!tokens || count == 0) return slm_fail(SLM_ERR_ARGUMENT, "no tokens given");
  if (count > (size_t)(slm_plan.context - session->position))
    return slm_fail(SLM_ERR_CONTEXT, "%zu tokens at position %d do not fit the context of %d",
                    count, session->position, slm_plan.context);
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
    slm_execute(session, head, position + first + done, rows);
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
    slm_execute(session, body, position, rows);
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
  /* The smallest body that takes them all: an encoder cannot be run in pieces. */
  const slm_function *body = &slm_plan.bodies[slm_plan.body_count - 1];
  while (body->rows < count) --body;
  put_tokens(session, tokens, count, body->rows);
  slm_execute(session, body, 0, count);
  memcpy(output, session->base[SLM_SPACE_OUTPUT],
         (size_t)count * (size_t)slm_plan.output_size * sizeof(float));
}

typedef enum { LAST_ROW, ALL_ROWS, ENCODE } output_mode;

static int32_t run(slm_session *session, const int32_t *tokens, size_t count, float *output,
                   output_mode mode) {
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  if ((mode == ENCODE) != slm_plan.encoder)
    code = slm_fail(SLM_ERR_KIND, slm_plan.encoder ? "this model is an encoder: use slm_encode"
                                                   : "this model is a decoder: use slm_eval");
  else if (mode != LAST_ROW && !output)
    code = slm_fail(SLM_ERR_ARGUMENT, "the place for the output is NULL");
  else
    code = check_tokens(session, tokens, count);
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
