/* A token of each of several sessions: weights are read once for all. */
#include <stdio.h>
#include <string.h>

#include "error.h"
#include "eval.h"
#include "execute.h"

/* Says of what failed which session it was. */
static int32_t fail_at(int32_t code, size_t index) {
  char why[256];
  snprintf(why, sizeof why, "%s", slm_last_error());
  return slm_fail(code, "session %zu: %s", index, why);
}

/* Makes sessions[index] the call's own; those before it are already. */
static int32_t enter(slm_session *const *sessions, size_t index) {
  int32_t code = slm_enter(sessions[index]);
  for (size_t i = 0; code == SLM_ERR_BUSY && i < index; ++i)
    if (sessions[i] == sessions[index])
      return slm_fail(SLM_ERR_ARGUMENT, "session %zu is session %zu again: one token each", index, i);
  if (code != SLM_OK) return fail_at(code, index);
  if (sessions[index]->model == sessions[0]->model) return SLM_OK;
  slm_leave(sessions[index]);
  return slm_fail(SLM_ERR_ARGUMENT, "session %zu is of another model than session 0", index);
}

static int32_t check(slm_session *const *sessions, const int32_t *tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    int32_t code = slm_check_next(sessions[i], tokens + i);
    if (code != SLM_OK) return fail_at(code, i);
  }
  return SLM_OK;
}

/* What the head left of row `row` in the first session's outputs becomes the session's own. */
static void take_outputs(const slm_session *first, int32_t row, slm_session *session) {
  for (int32_t i = 0; first != session && i < slm_plan.output_count; ++i) {
    const slm_plan_output *o = &slm_plan.outputs[i];
    size_t bytes = (size_t)o->features * sizeof(float);
    memcpy(session->base[SLM_SPACE_OUTPUT] + o->offset,
           first->base[SLM_SPACE_OUTPUT] + o->offset + (size_t)row * bytes, bytes);
  }
  session->logits = (const float *)session->base[SLM_SPACE_OUTPUT];
}

static void run_batch(slm_session *const *sessions, const int32_t *tokens, int32_t count,
                      int32_t index, float *logits) {
  const slm_function *body = &slm_plan.batches[index], *head = &slm_plan.batch_heads[index];
  slm_session *first = sessions[0];
  int32_t *step = (int32_t *)first->base[SLM_SPACE_TOKENS];
  size_t row = (size_t)slm_plan.output_size;
  memcpy(step, tokens, (size_t)count * sizeof *step);
  memset(step + count, 0, (size_t)(body->rows - count) * sizeof *step);
  for (int32_t i = 0; i < count; ++i) slm_show_key(sessions[i]);
  slm_pool_begin(first->model->pool, slm_plan.body_count + slm_plan.source_count + index);
  slm_execute_batch(sessions, count, body);
  slm_execute_batch(sessions, count, head);
  slm_pool_end(first->model->pool);
  for (int32_t i = 0; i < count; ++i) {
    slm_session *session = sessions[i];
    take_outputs(first, i, session);
    if (logits) memcpy(logits + (size_t)i * row, session->logits, row * sizeof *logits);
    session->history[session->position++] = tokens[i];
    slm_note_written(session, session->position);
    session->has_logits = 1;
  }
}

/* A device failed: no session has its token. */
static void undo(slm_session *const *sessions, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    --sessions[i]->position;
    sessions[i]->has_logits = 0;
  }
}

static int32_t run(slm_session *const *sessions, const int32_t *tokens, size_t count,
                   float *logits) {
  for (size_t done = 0; done < count;) {
    size_t more = count - done;
    int32_t left = more < INT32_MAX ? (int32_t)more : INT32_MAX, taken = 1, code = SLM_OK;
    const slm_function *batch =
        left > 1 ? slm_choose(slm_plan.batches, slm_plan.batch_count, left, INT32_MAX) : NULL;
    if (batch) {
      taken = batch->rows < left ? batch->rows : left;
      run_batch(sessions + done, tokens + done, taken, (int32_t)(batch - slm_plan.batches), logits);
    } else {
      code = slm_eval_next(sessions[done], tokens + done, logits);
    }
    done += (size_t)taken;
    if (code != SLM_OK) {
      undo(sessions, done);
      return code;
    }
    if (logits) logits += (size_t)taken * (size_t)slm_plan.output_size;
  }
  return SLM_OK;
}

int32_t slm_eval_batch(slm_session *const *sessions, const int32_t *tokens, size_t count,
                       float *logits) {
  if (!sessions || !tokens || count == 0)
    return slm_fail(SLM_ERR_ARGUMENT, "no sessions or no tokens given");
  int32_t code = SLM_OK;
  size_t entered = 0;
  while (entered < count && (code = enter(sessions, entered)) == SLM_OK) ++entered;
  if (code == SLM_OK) code = check(sessions, tokens, count);
  slm_pool *pool = code == SLM_OK ? sessions[0]->model->pool : NULL;
  if (code == SLM_OK) code = slm_pool_acquire(pool);
  if (code == SLM_OK) {
    code = run(sessions, tokens, count, logits);
    slm_pool_release(pool);
  }
  for (size_t i = 0; i < entered; ++i) slm_leave(sessions[i]);
  return code;
}
