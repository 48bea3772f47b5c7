/* Running one function of the plan: each step on all threads, or on the caller where it is small. */
#include "execute.h"

#include <stddef.h>

#include "clock.h"
#include "device.h"
#include "slm.h"

typedef struct {
  const slm_session *session;
  const slm_step *step;
  int32_t position, valid;
} part;

static void run_part(void *context, int thread, int index, int parts) {
  const part *p = context;
  const slm_step *step = p->step;
  int32_t begin = (int32_t)((int64_t)step->grid * index / parts);
  int32_t end = (int32_t)((int64_t)step->grid * (index + 1) / parts);
  if (begin == end) return;
  void *args[SLM_MAX_ARGS];
  const uint64_t *refs = slm_plan.refs + step->first_ref;
  for (int i = 0; i < step->args; ++i) {
    int space = SLM_REF_SPACE(refs[i]);
    args[i] = p->session->base[space] + SLM_REF_OFFSET(refs[i]);
    if (space == SLM_SPACE_SCRATCH)
      args[i] = (char *)args[i] + slm_plan.scratch_bytes * (size_t)thread;
  }
  slm_plan.kernels[step->kernel](args, p->position, p->valid, begin, end);
}

static void run_part_measured(void *context, int thread, int index, int parts) {
  const part *p = context;
  if (thread != 0) {
    run_part(context, thread, index, parts);
    return;
  }
  int64_t begin = slm_now_nanoseconds();
  run_part(context, thread, index, parts);
  slm_kernel_time *time = &p->session->model->profile[p->step->kernel];
  time->own_nanoseconds += (uint64_t)(slm_now_nanoseconds() - begin);
}

static void execute(part *p, uint32_t steps) {
  slm_pool *pool = p->session->model->pool;
  for (uint32_t i = 0; i < steps; ++i, ++p->step) {
    if (p->step->parallel)
      slm_pool_run(pool, run_part, p);
    else
      run_part(p, 0, 0, 1);
  }
}

static void execute_measured(part *p, uint32_t steps) {
  for (uint32_t i = 0; i < steps; ++i, ++p->step) {
    int64_t begin = slm_now_nanoseconds();
    if (p->step->parallel)
      slm_pool_run(p->session->model->pool, run_part_measured, p);
    else
      run_part_measured(p, 0, 0, 1);
    slm_kernel_time *time = &p->session->model->profile[p->step->kernel];
    time->nanoseconds += (uint64_t)(slm_now_nanoseconds() - begin);
    ++time->calls;
  }
}

void slm_execute(slm_session *session, const slm_function *function, int32_t position,
                 int32_t valid) {
  if (slm_plan.device) {
    if (session->failure == SLM_OK)
      session->failure = slm_plan.device->run(session, function, position, valid);
    return;
  }
  part p = {session, slm_plan.steps + function->first_step, position, valid};
  if (session->model->profile)
    execute_measured(&p, function->steps);
  else
    execute(&p, function->steps);
}

const slm_function *slm_choose(const slm_function *functions, int32_t count, int32_t left,
                               int32_t room) {
  /* What a function costs however few rows it has, reading all weights above all, in rows: measured
   * as 4 on an int4 decoder of 6 M parameters. */
  enum { FIXED_COST_IN_ROWS = 4 };
  const slm_function *best = NULL;
  int64_t best_cost = 0, best_useful = 1;
  for (int32_t i = 0; i < count; ++i) {
    const slm_function *f = &functions[i];
    if (f->rows > room) continue;
    int64_t cost = f->rows + FIXED_COST_IN_ROWS, useful = f->rows < left ? f->rows : left;
    if (!best || cost * best_useful < best_cost * useful) {
      best = f;
      best_cost = cost;
      best_useful = useful;
    }
  }
  return best;
}
