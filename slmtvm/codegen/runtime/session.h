/* A session: the context of one conversation, and the memory that a model computes in. */
#ifndef SLM_SESSION_H
#define SLM_SESSION_H

#include <stdatomic.h>
#include <stdint.h>

#include "model.h"
#include "plan_tables.h"

/* A token that slm_sample may choose. */
typedef struct slm_candidate {
  float logit;
  int32_t token;
} slm_candidate;

struct slm_session {
  uint32_t mark; /* SLM_SESSION_MARK */
  int32_t position;
  int16_t has_logits;
  int8_t whole; /* no token ends early */
  int8_t exit;  /* at which the last token ended, from 1 on; 0: behind all layers */
  int32_t source; /* tokens of the source that was read; 0 before */
  int32_t rows;   /* tokens of the last encoding, hidden ones included; 0 before */
  atomic_int in_use; /* a call is running: two threads in one session would write over each other */
  int32_t failure; /* of the device, during this call; SLM_OK where there was none */
  int32_t written; /* end of the positions that steps wrote since position 0, padding included */
  slm_model *model;
  void *device; /* what slm_plan.device keeps of the session */
  char *base[SLM_SPACES]; /* scratch: that of thread 0 */
  const float *logits;    /* after the last token of the context: a row of SLM_SPACE_OUTPUT */
  int32_t *history;       /* the context's tokens */
  slm_candidate *candidates;
  uint8_t *seen; /* by token: is it in the context */
};

enum { SLM_SESSION_MARK = 0x534d4c53 };

/* SLM_OK where `session` looks like one. */
int32_t slm_check_session(const slm_session *session);

/* The limits of keys' scores, by position of what may be masked; NULL where no key can be hidden. */
float *slm_limits(const slm_session *session);

/* Whether the session can go on from `position`: layers that keep a window of positions still have
 * those that it sees. */
int slm_can_resume(const slm_session *session, int32_t position);

/* A step wrote positions up to `end`. */
void slm_note_written(slm_session *session, int32_t end);

/* Makes the session this call's own until slm_leave; fails where another thread has it. */
int32_t slm_enter(slm_session *session);
void slm_leave(slm_session *session);

#endif
