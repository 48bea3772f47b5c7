/* Opening and closing a bundle. */
#include "model.h"

#include <stdlib.h>

#include "cpu.h"
#include "error.h"
#include "plan_tables.h"
#include "profile.h"
#include "weights.h"

uint32_t slm_abi_version(void) { return SLM_ABI_VERSION; }

const char *slm_info(void) { return slm_plan.info; }

int32_t slm_output_size(void) { return slm_plan.output_size; }

int32_t slm_context_size(void) { return slm_plan.context; }

int32_t slm_check_model(const slm_model *model) {
  if (!model || model->mark != SLM_MODEL_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the model is NULL or not open");
  return SLM_OK;
}

static int32_t check_options(const slm_options *options) {
  if (options->size < sizeof *options)
    return slm_fail(SLM_ERR_ARGUMENT, "slm_options.size is %u, must be sizeof(slm_options), %zu",
                    options->size, sizeof *options);
  if (options->threads < 0 || options->threads > SLM_MAX_THREADS)
    return slm_fail(SLM_ERR_ARGUMENT, "threads is %d, must be 0 (one for each core) to %d",
                    options->threads, SLM_MAX_THREADS);
  if (options->flags & ~(uint32_t)(SLM_SKIP_CHECKSUM | SLM_PROFILE))
    return slm_fail(SLM_ERR_ARGUMENT, "unknown flags %#x", options->flags);
  return SLM_OK;
}

int32_t slm_open(const char *bundle, const slm_options *options, slm_model **result) {
  const slm_options defaults = {sizeof defaults, 1, 0};
  if (!options) options = &defaults;
  if (!bundle || !result) return slm_fail(SLM_ERR_ARGUMENT, "slm_open: an argument is NULL");
  *result = NULL;
  int32_t code = check_options(options);
  if (code != SLM_OK) return code;
  const char *missing = slm_cpu_missing(slm_plan.requires);
  if (missing)
    return slm_fail(SLM_ERR_CPU,
                    "this CPU lacks %s, which the library for %s needs; use the library of another "
                    "target, or compile the model for this CPU",
                    missing, slm_plan.target);

  slm_model *model = calloc(1, sizeof *model);
  if (!model) return slm_fail(SLM_ERR_MEMORY, "no memory for the model");
  code = slm_profile_new(options->flags, &model->profile);
  if (code == SLM_OK)
    code = slm_weights_map(bundle, !(options->flags & SLM_SKIP_CHECKSUM), &model->weights);
  if (code == SLM_OK) {
    code = slm_pool_new(options->threads, &model->pool);
    if (code != SLM_OK) slm_weights_unmap(model->weights);
  }
  if (code != SLM_OK) {
    free(model->profile);
    free(model);
    return code;
  }
  model->mark = SLM_MODEL_MARK;
  *result = model;
  return SLM_OK;
}

int32_t slm_close(slm_model *model) {
  if (!model) return SLM_OK;
  int32_t code = slm_check_model(model);
  if (code != SLM_OK) return code;
  int sessions = atomic_load(&model->sessions);
  if (sessions)
    return slm_fail(SLM_ERR_BUSY, "%d sessions of the model are still there: free them first",
                    sessions);
  slm_pool_free(model->pool);
  slm_weights_unmap(model->weights);
  model->mark = 0;
  free(model->profile);
  free(model);
  return SLM_OK;
}
