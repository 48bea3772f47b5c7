/* Opening and closing a bundle. */
#include "model.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "device.h"
#include "error.h"
#include "plan_tables.h"
#include "profile.h"
#include "trust.h"
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

/* Copies what the caller's slm_options has, an older one too; the rest is zero. */
static int32_t take_options(const slm_options *given, slm_options *options) {
  /* What was there before `cores` was, before `public_keys` were, before `weights_key`, and now. */
  const size_t sizes[] = {offsetof(slm_options, flags) + sizeof given->flags,
                          offsetof(slm_options, public_keys), offsetof(slm_options, weights_key),
                          sizeof *options};
  enum { SIZES = sizeof sizes / sizeof *sizes };
  *options = (slm_options){.size = sizeof *options, .threads = 1};
  if (!given) return SLM_OK;
  if (given->size < sizes[0])
    return slm_fail(SLM_ERR_ARGUMENT, "slm_options.size is %u, must be sizeof(slm_options), %zu",
                    given->size, sizeof *given);
  size_t taken = sizes[0];
  for (int i = 1; i < SIZES && given->size >= sizes[i]; ++i) taken = sizes[i];
  memcpy(options, given, taken);
  if (options->threads < 0 || options->threads > SLM_MAX_THREADS)
    return slm_fail(SLM_ERR_ARGUMENT, "threads is %d, must be 0 (one for each core) to %d",
                    options->threads, SLM_MAX_THREADS);
  if (options->flags &
      ~(uint32_t)(SLM_SKIP_CHECKSUM | SLM_PROFILE | SLM_ALL_THREADS | SLM_MAY_SWAP))
    return slm_fail(SLM_ERR_ARGUMENT, "unknown flags %#x", options->flags);
  return SLM_OK;
}

/* Maps the weights; where keys are given, nothing of the bundle is used that was not signed. */
static int32_t map_weights(const char *bundle, const slm_options *options, const void **weights) {
  static const char file[] = "weights.bin";
  /* A checksum besides SHA-256 would say nothing more. Kernels that read places from weights must
   * not be led astray by a damaged file, whatever the caller wants. */
  int check = (!(options->flags & SLM_SKIP_CHECKSUM) || slm_plan.weights_have_places) &&
              !options->public_keys;
  slm_manifest manifest;
  slm_weights_file mapped;
  int32_t code = SLM_OK;
  if (options->public_keys) {
    code = slm_manifest_trust(bundle, options->public_keys, options->least_counter, &manifest);
    if (code != SLM_OK) return code;
    code = slm_manifest_check_files(&manifest, bundle, slm_plan.target, file);
  }
  if (code == SLM_OK) code = slm_weights_map(bundle, &mapped);
  if (code == SLM_OK && options->public_keys) {
    /* What is mapped, not the file of that name again, which may be another by now. */
    code = slm_manifest_check(&manifest, bundle, file, mapped.data, mapped.bytes);
    if (code != SLM_OK) slm_weights_drop(&mapped);
  }
  if (code == SLM_OK) code = slm_weights_take(&mapped, options, check, weights);
  if (options->public_keys) slm_manifest_free(&manifest);
  return code;
}

/* Starts the workers, and says of the model how many and why. */
static int32_t start_pool(slm_model *model, const slm_options *options) {
  slm_cores cores;
  int32_t code = slm_cores_choose(options->threads, options->cores,
                                  (options->flags & SLM_ALL_THREADS) != 0, "", &cores);
  if (code == SLM_OK && !options->threads && slm_plan.threads && slm_plan.threads < cores.threads) {
    cores.threads = slm_plan.threads;
    snprintf(cores.why, sizeof cores.why, "more did not pay where it was tuned");
  }
  if (code == SLM_OK)
    code = slm_pool_new(&cores, slm_plan.body_count + slm_plan.source_count + slm_plan.batch_count,
                        &model->pool);
  if (code != SLM_OK) return code;
  slm_cores_bind(&cores);
  snprintf(model->info, sizeof model->info,
           "{\"threads\": %d, \"asked\": %d, \"cores\": \"%s\", \"why\": \"%s\"}",
           slm_pool_threads(model->pool), options->threads, cores.list, cores.why);
  return SLM_OK;
}

const char *slm_model_info(const slm_model *model) {
  return slm_check_model(model) == SLM_OK ? model->info : NULL;
}

int32_t slm_open(const char *bundle, const slm_options *given, slm_model **result) {
  if (!bundle || !result) return slm_fail(SLM_ERR_ARGUMENT, "slm_open: an argument is NULL");
  *result = NULL;
  slm_options options;
  int32_t code = take_options(given, &options);
  if (code != SLM_OK) return code;
  const char *missing = slm_cpu_missing(slm_plan.requires);
  if (missing)
    return slm_fail(SLM_ERR_CPU,
                    "this CPU lacks %s, which the library for %s needs; use the library of another "
                    "target, or compile the model for this CPU",
                    missing, slm_plan.target);

  slm_model *model = calloc(1, sizeof *model);
  if (!model) return slm_fail(SLM_ERR_MEMORY, "no memory for the model");
  code = slm_profile_new(options.flags, &model->profile);
  if (code == SLM_OK) code = map_weights(bundle, &options, &model->weights);
  if (code == SLM_OK) {
    code = start_pool(model, &options);
    if (code == SLM_OK && slm_plan.device) {
      code = slm_plan.device->open(model);
      if (code != SLM_OK) slm_pool_free(model->pool);
    }
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
  if (slm_plan.device) slm_plan.device->close(model);
  slm_pool_free(model->pool);
  slm_weights_unmap(model->weights);
  model->mark = 0;
  free(model->profile);
  free(model);
  return SLM_OK;
}
