/* The named outputs of a model, and what a session last computed of them. */
#include <string.h>

#include "error.h"
#include "session.h"

int32_t slm_output_count(void) { return slm_plan.output_count; }

static int32_t check_index(int32_t index) {
  if (index < 0 || index >= slm_plan.output_count)
    return slm_fail(SLM_ERR_ARGUMENT, "output %d, must be 0 to %d", index,
                    slm_plan.output_count - 1);
  return SLM_OK;
}

int32_t slm_output_info(int32_t index, slm_output *output) {
  int32_t code = check_index(index);
  if (code != SLM_OK) return code;
  if (!output) return slm_fail(SLM_ERR_ARGUMENT, "slm_output_info: an argument is NULL");
  if (output->size < sizeof *output)
    return slm_fail(SLM_ERR_ARGUMENT, "slm_output.size is %u, must be sizeof(slm_output), %zu",
                    output->size, sizeof *output);
  const slm_plan_output *o = &slm_plan.outputs[index];
  *output = (slm_output){sizeof *output, o->features, o->pooled, o->name};
  return SLM_OK;
}

static int32_t get(const slm_session *session, int32_t index, float *values) {
  const slm_plan_output *o = &slm_plan.outputs[index];
  int ready = slm_plan.encoder ? session->rows > 0 : session->has_logits;
  if (!ready)
    return slm_fail(SLM_ERR_LOGITS, "no output yet: run the model with %s first",
                    slm_plan.encoder ? "slm_encode" : "slm_eval");
  int32_t rows = slm_plan.encoder && !o->pooled ? session->rows : 1;
  const char *from = session->base[SLM_SPACE_OUTPUT] + o->offset;
  if (!slm_plan.encoder) {
    /* The last row of the head that ran last: as many rows in as the first output's. */
    size_t row = (size_t)(session->logits - (const float *)session->base[SLM_SPACE_OUTPUT]) /
                 (size_t)slm_plan.output_size;
    from += row * (size_t)o->features * sizeof *values;
  }
  if (values) memcpy(values, from, (size_t)rows * (size_t)o->features * sizeof *values);
  return rows;
}

int32_t slm_output_get(slm_session *session, int32_t index, float *values) {
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  code = check_index(index);
  if (code == SLM_OK) code = get(session, index, values);
  slm_leave(session);
  return code;
}
