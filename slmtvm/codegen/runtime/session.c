/* A session's memory: one mapping, laid out once. */
#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "device.h"
#include "error.h"

/* The pieces of a session's mapping, each at an offset that is a multiple of ALIGNMENT.
 * slmtvm/codegen/memory.py predicts the same numbers for the manifest. */
typedef struct {
  size_t session, state, arena, scratch, tokens, output, history, candidates, seen, total;
} layout;

enum { ALIGNMENT = 64, LEAST_FOR_LARGE_PAGES = 4 << 20 };

_Static_assert(sizeof(slm_session) > 64 && sizeof(slm_session) <= 128, "see memory.py");

static size_t append(layout *l, size_t bytes) {
  size_t offset = l->total;
  l->total += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return offset;
}

static layout plan_memory(int threads) {
  const slm_plan_tables *p = &slm_plan;
  size_t token_rows = (size_t)p->bodies[0].rows;
  if (p->source_count && p->sources[0].rows > p->bodies[0].rows)
    token_rows = (size_t)p->sources[0].rows;
  size_t vocabulary = p->encoder ? 0 : (size_t)p->vocab_size;
  size_t context = p->encoder ? 0 : (size_t)p->context;
  layout l = {0};
  l.session = append(&l, sizeof(slm_session));
  l.tokens = append(&l, token_rows * sizeof(int32_t));
  l.arena = append(&l, p->arena_bytes);
  l.scratch = append(&l, p->scratch_bytes * (size_t)threads);
  l.output = append(&l, p->output_bytes);
  l.history = append(&l, context * sizeof(int32_t));
  l.seen = append(&l, vocabulary);
  l.candidates = append(&l, vocabulary * sizeof(slm_candidate));
  l.state = append(&l, p->state_bytes);
  return l;
}

int32_t slm_check_session(const slm_session *session) {
  if (!session || session->mark != SLM_SESSION_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the session is NULL or not open");
  return SLM_OK;
}

float *slm_limits(const slm_session *session) {
  if (slm_plan.mask != SLM_MASK_KEYS) return NULL;
  return (float *)(session->base[SLM_SPACE_STATE] + slm_plan.limits_offset);
}

int32_t slm_enter(slm_session *session) {
  int32_t code = slm_check_session(session);
  if (code != SLM_OK) return code;
  if (atomic_exchange_explicit(&session->in_use, 1, memory_order_acquire))
    return slm_fail(SLM_ERR_BUSY, "another thread is using the session: one at a time");
  return SLM_OK;
}

void slm_leave(slm_session *session) {
  atomic_store_explicit(&session->in_use, 0, memory_order_release);
}

int64_t slm_session_bytes(const slm_model *model) {
  int32_t code = slm_check_model(model);
  return code != SLM_OK ? code : (int64_t)plan_memory(slm_pool_threads(model->pool)).total;
}

int32_t slm_session_new(slm_model *model, slm_session **result) {
  if (!result) return slm_fail(SLM_ERR_ARGUMENT, "slm_session_new: an argument is NULL");
  *result = NULL;
  int32_t code = slm_check_model(model);
  if (code != SLM_OK) return code;
  layout l = plan_memory(slm_pool_threads(model->pool));
  /* Fresh pages are zero and cost nothing until they are touched. */
  char *memory = mmap(NULL, l.total, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    return slm_fail(SLM_ERR_MEMORY, "no memory for a session of %zu bytes: %s", l.total,
                    strerror(errno));
#ifdef MADV_HUGEPAGE
  /* A long context is read a tenth faster by large pages. Small caches would only grow by them. */
  if (l.total >= LEAST_FOR_LARGE_PAGES) madvise(memory, l.total, MADV_HUGEPAGE);
#endif
  slm_session *s = (slm_session *)(memory + l.session);
  s->model = model;
  s->base[SLM_SPACE_WEIGHTS] = (char *)model->weights;
  s->base[SLM_SPACE_STATE] = memory + l.state;
  s->base[SLM_SPACE_ARENA] = memory + l.arena;
  s->base[SLM_SPACE_SCRATCH] = memory + l.scratch;
  s->base[SLM_SPACE_TOKENS] = memory + l.tokens;
  s->base[SLM_SPACE_OUTPUT] = memory + l.output;
  s->history = (int32_t *)(memory + l.history);
  s->seen = (uint8_t *)(memory + l.seen);
  s->candidates = (slm_candidate *)(memory + l.candidates);
  if (slm_plan.device) {
    code = slm_plan.device->session_new(s);
    if (code != SLM_OK) {
      munmap(memory, l.total);
      return code;
    }
  }
  s->mark = SLM_SESSION_MARK;
  atomic_fetch_add(&model->sessions, 1);
  *result = s;
  return SLM_OK;
}

int32_t slm_session_free(slm_session *session) {
  if (!session) return SLM_OK;
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  slm_model *model = session->model;
  if (slm_plan.device) slm_plan.device->session_free(session);
  session->mark = 0;
  munmap(session, plan_memory(slm_pool_threads(model->pool)).total);
  atomic_fetch_sub(&model->sessions, 1);
  return SLM_OK;
}

int slm_can_resume(const slm_session *session, int32_t position) {
  return !slm_plan.ring || position == 0 || session->written <= slm_plan.ring ||
         position >= session->written - slm_plan.seek_reach;
}

void slm_note_written(slm_session *session, int32_t end) {
  if (session->written < end) session->written = end;
}

int32_t slm_position(const slm_session *session) {
  int32_t code = slm_check_session(session);
  return code != SLM_OK ? code : session->position;
}

int32_t slm_seek(slm_session *session, int32_t position) {
  int32_t code = slm_enter(session);
  if (code != SLM_OK) return code;
  if (position < 0 || position > session->position) {
    code = slm_fail(SLM_ERR_ARGUMENT, "cannot seek to position %d: the context holds %d tokens",
                    position, session->position);
  } else if (!slm_can_resume(session, position)) {
    code = slm_fail(SLM_ERR_CONTEXT, "cannot seek to position %d: layers with a window keep what is "
                                     "seen from position %d on; seek to 0 and evaluate the tokens "
                                     "again, or compile the model with --kv-keep all",
                    position, session->written - slm_plan.seek_reach);
  } else {
    if (position == 0) session->written = 0;
    if (position != session->position) session->has_logits = 0;
    session->position = position;
  }
  slm_leave(session);
  return code;
}
