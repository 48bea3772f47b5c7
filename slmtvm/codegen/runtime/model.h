/* An open bundle. */
#ifndef SLM_MODEL_H
#define SLM_MODEL_H

#include <stdatomic.h>
#include <stdint.h>

#include "pool.h"
#include "slm.h"

struct slm_model {
  uint32_t mark; /* SLM_MODEL_MARK: catches most pointers that are no model */
  atomic_int sessions;
  const void *weights;
  slm_pool *pool;
  void *device; /* what slm_plan.device keeps of the model */
  slm_kernel_time *profile; /* by kernel; NULL unless opened with SLM_PROFILE */
  char info[512];           /* JSON, of slm_model_info */
};

enum { SLM_MODEL_MARK = 0x4d4d4c53 };

/* SLM_OK where `model` looks like one. */
int32_t slm_check_model(const slm_model *model);

#endif
