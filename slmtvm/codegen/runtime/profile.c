/* Time by kernel, where a model is opened with SLM_PROFILE. */
#include "profile.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "model.h"
#include "plan_tables.h"

int32_t slm_profile_new(uint32_t flags, slm_kernel_time **profile) {
  *profile = NULL;
  if (!(flags & SLM_PROFILE)) return SLM_OK;
  *profile = calloc((size_t)slm_plan.kernel_count, sizeof **profile);
  return *profile ? SLM_OK : slm_fail(SLM_ERR_MEMORY, "no memory for a profile");
}

int32_t slm_profile(slm_model *model, slm_kernel_time *times, size_t count) {
  int32_t code = slm_check_model(model);
  if (code != SLM_OK) return code;
  if (!model->profile)
    return slm_fail(SLM_ERR_ARGUMENT, "the model was not opened with SLM_PROFILE");
  if (!times && count > 0) return slm_fail(SLM_ERR_ARGUMENT, "slm_profile: times is NULL");
  size_t kernels = (size_t)slm_plan.kernel_count;
  if (count > 0)
    memcpy(times, model->profile, (count < kernels ? count : kernels) * sizeof *times);
  memset(model->profile, 0, kernels * sizeof *times);
  return slm_plan.kernel_count;
}
