/* Running one function of the plan: each step on all threads, or on the caller where it is small. */
#include "execute.h"

#include <stddef.h>
#include <string.h>

#include "clock.h"
#include "device.h"
#include "slm.h"

typedef struct {
  const slm_session *session;
  const slm_step *step;
  int32_t position, valid;
  slm_session *const *sessions; /* of the rows, where these are of different ones */
  int32_t count, rows;          /* sessions, and rows of the function: the rest is padding */
} part;

int32_t slm_valid(const slm_session *session, int32_t rows) {
  return slm_plan.source_count ? session->source : rows;
}

/* Blocks `begin` to `end` of a step's row `row`. What a kernel would write of padding is made 0, as rows
 * must hold numbers: what lies there is what other steps left. */
static void run_row(const part *p, int thread, int32_t row, int32_t begin, int32_t end) {
  const slm_step *step = p->step;
  void *args[SLM_MAX_ARGS];
  const uint64_t *refs = slm_plan.refs + step->first_ref, *rows = refs + step->args;
  const slm_session *session = row < p->count ? p->sessions[row] : NULL;
  for (int i = 0; i < step->args; ++i) {
    int space = SLM_REF_SPACE(refs[i]);
    const slm_session *owner = space == SLM_SPACE_STATE && session ? session : p->session;
    size_t bytes = SLM_REF_OFFSET(rows[i]);
    args[i] = owner->base[space] + SLM_REF_OFFSET(refs[i]) + bytes * (size_t)row;
    if (space == SLM_SPACE_SCRATCH)
      args[i] = (char *)args[i] + slm_plan.scratch_bytes * (size_t)thread;
    if (!session && begin == 0 && SLM_REF_SPACE(rows[i])) memset(args[i], 0, bytes);
  }
  if (session)
    slm_plan.kernels[step->kernel](args, session->position, slm_valid(session, 1), begin, end);
}

/* The blocks of all rows, one row's after the other's, divided like those of a step. */
static void run_rows(const part *p, int thread, int index, int parts) {
  int64_t grid = p->step->grid, all = grid * p->rows;
  int64_t begin = all * index / parts, end = all * (index + 1) / parts;
  while (begin < end) {
    int64_t row = begin / grid, first = row * grid, last = first + grid < end ? first + grid : end;
    run_row(p, thread, (int32_t)row, (int32_t)(begin - first), (int32_t)(last - first));
    begin = last;
  }
}

static void run_part(void *context, int thread, int index, int parts) {
  const part *p = context;
  const slm_step *step = p->step;
  if (step->flags & SLM_STEP_BY_SESSION) {
    run_rows(p, thread, index, parts);
    return;
  }
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

static void execute_plainly(part *p, uint32_t steps) {
  slm_pool *pool = p->session->model->pool;
  for (uint32_t i = 0; i < steps; ++i, ++p->step) {
    if (p->step->flags & SLM_STEP_PARALLEL)
      slm_pool_run(pool, run_part, p);
    else
      run_part(p, 0, 0, 1);
  }
}

static void execute_measured(part *p, uint32_t steps) {
  for (uint32_t i = 0; i < steps; ++i, ++p->step) {
    int64_t begin = slm_now_nanoseconds();
    if (p->step->flags & SLM_STEP_PARALLEL)
      slm_pool_run(p->session->model->pool, run_part_measured, p);
    else
      run_part_measured(p, 0, 0, 1);
    slm_kernel_time *time = &p->session->model->profile[p->step->kernel];
    time->nanoseconds += (uint64_t)(slm_now_nanoseconds() - begin);
    time->calls += p->step->flags & SLM_STEP_BY_SESSION ? (uint64_t)p->count : 1;
  }
}

static void execute(part *p, uint32_t steps) {
  if (p->session->model->profile)
    execute_measured(p, steps);
  else
    execute_plainly(p, steps);
}

void slm_execute(slm_session *session, const slm_function *function, int32_t position,
                 int32_t valid) {
  if (slm_plan.device) {
    if (session->failure == SLM_OK)
      session->failure = slm_plan.device->run(session, function, position, valid);
    return;
  }
  part p = {session, slm_plan.steps + function->first_step, position, valid, NULL, 0, 0};
  execute(&p, function->steps);
}

void slm_execute_batch(slm_session *const *sessions, int32_t count, const slm_function *function) {
  /* Kernels of all rows know no position; of `valid` rows there are as many as sessions. */
  part p = {sessions[0], slm_plan.steps + function->first_step, 0, count, sessions, count,
            function->rows};
  execute(&p, function->steps);
}

const slm_function *slm_choose(const slm_function *functions, int32_t count, int32_t left,
                               int32_t room) {
  /* In rows, measured on an int4 decoder of 6 M parameters: what a function costs however few rows it
   * has, reading all weights above all, is 4 and a sixteenth of those it is for; a row of padding is a
   * quarter, where linear layers know of it and leave it out, as an encoder-decoder's do not. */
  enum { ROW = 16, FIXED_COST_IN_ROWS = 4, PADDING = 4 };
  const int padding = slm_plan.source_count ? ROW : PADDING;
  const slm_function *best = NULL;
  int64_t best_cost = 0, best_useful = 1;
  for (int32_t i = 0; i < count; ++i) {
    const slm_function *f = &functions[i];
    if (f->rows > room) continue;
    int64_t useful = f->rows < left ? f->rows : left;
    int64_t cost = ROW * (useful + FIXED_COST_IN_ROWS) + f->rows + padding * (f->rows - useful);
    if (!best || cost * best_useful < best_cost * useful) {
      best = f;
      best_cost = cost;
      best_useful = useful;
    }
  }
  return best;
}
