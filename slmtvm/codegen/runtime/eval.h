/* Evaluating the next token of a session that is the caller's, see slm_enter. */
#ifndef SLM_EVAL_H
#define SLM_EVAL_H

#include "session.h"

/* SLM_OK where slm_eval would take `token`. */
int32_t slm_check_next(const slm_session *session, const int32_t *token);

/* slm_eval of a token that was checked; the model's pool must be acquired. The session has the token even
 * where a device fails. */
int32_t slm_eval_next(slm_session *session, const int32_t *token, float *logits);

/* Says that the key at the session's position is visible, where keys may be hidden. */
void slm_show_key(slm_session *session);

#endif
