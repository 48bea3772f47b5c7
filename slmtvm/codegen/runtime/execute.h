/* Running one function of the plan. */
#ifndef SLM_EXECUTE_H
#define SLM_EXECUTE_H

#include "session.h"

/* Runs all steps of `function` on the session's memory; the model's pool must be acquired. Where a
 * device fails, session->failure says so, and nothing runs until that is SLM_OK again. */
void slm_execute(slm_session *session, const slm_function *function, int32_t position,
                 int32_t valid);

/* The function of the `count` at `functions` (most rows first) that takes the least time for each of
 * the `left` rows, and has no more than `room` rows. */
const slm_function *slm_choose(const slm_function *functions, int32_t count, int32_t left,
                               int32_t room);

#endif
