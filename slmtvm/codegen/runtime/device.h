/* A plan that another processor runs: what the runtime calls instead of kernels of its own. */
#ifndef SLM_DEVICE_H
#define SLM_DEVICE_H

#include "session.h"

/* Each returns SLM_OK, or fails with a message. */
typedef struct slm_device {
  /* Sets model->device, with a copy of the mapped weights. */
  int32_t (*open)(slm_model *model);
  void (*close)(slm_model *model);
  /* Sets session->device, and the places of tokens and outputs, which the device reads and writes. */
  int32_t (*session_new)(slm_session *session);
  void (*session_free)(slm_session *session);
  int32_t (*run)(slm_session *session, const slm_function *function, int32_t position,
                 int32_t valid);
  /* Moves `rows` hidden rows from row `first` on to the first place. */
  int32_t (*move_rows)(slm_session *session, int32_t first, int32_t rows);
  /* Whether the first of the greatest of the session's logits was found there: NAN as its logit where
   * one is no number. */
  int (*likeliest)(const slm_session *session, slm_candidate *found);
} slm_device;

#endif
