/* Running one function of the plan. */
#ifndef SLM_EXECUTE_H
#define SLM_EXECUTE_H

#include "session.h"

/* Runs all steps of `function` on the session's memory; the model's pool must be acquired. Where a
 * device fails, session->failure says so, and nothing runs until that is SLM_OK again. */
void slm_execute(slm_session *session, const slm_function *function, int32_t position,
                 int32_t valid);

/* The same of a function whose rows are the next tokens of `count` sessions of one model, at most as many
 * as it has rows; the first session's memory holds them. */
void slm_execute_batch(slm_session *const *sessions, int32_t count, const slm_function *function);

/* What "valid" stands for in a step of `rows` tokens: those of the source that cross-attention sees, or
 * the step's. */
int32_t slm_valid(const slm_session *session, int32_t rows);

/* The function of the `count` at `functions` (most rows first) that takes the least time for each of
 * the `left` rows, and has no more than `room` rows. */
const slm_function *slm_choose(const slm_function *functions, int32_t count, int32_t left,
                               int32_t room);

#endif
