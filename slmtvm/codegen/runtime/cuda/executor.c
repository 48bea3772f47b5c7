/* A plan on a GPU: weights and a session's memory on the device, one CUDA graph a function.
 *
 * Tokens, position and outputs lie in memory that both processors see, so a step of a function is one
 * launch and one wait. What went wrong in a kernel stays: the driver refuses all that follows. */
#include <stdlib.h>
#include <string.h>

#include "../device.h"
#include "../error.h"
#include "driver.h"
#include "plan.h"

/* Pointers of a kernel: its buffers, and the ambient scalars. */
enum { MAX_POINTERS = SLM_MAX_ARGS + 1, AMBIENT_BYTES = 64, MAPPED = 2, NON_BLOCKING = 1 };

typedef struct {
  slm_cuda_driver cu;
  int device;
  void *context, *module;
  void **functions; /* by kernel */
  slm_cuda_pointer weights;
} cuda_model;

typedef struct {
  void *stream;
  void *host; /* ambient scalars, tokens, outputs */
  slm_cuda_pointer memory[SLM_SPACES], ambient;
  void **graphs; /* by function: bodies, heads, sources; NULL before the first run */
} cuda_session;

/* Runs `call`, with what it is for where it fails; does nothing after a failure. */
#define TRY(call, what) \
  if (code == SLM_OK) code = slm_cuda_check(&m->cu, m->cu.call, what)

static cuda_model *model_of(const slm_session *session) { return session->model->device; }

static int32_t enter(cuda_model *m) {
  return slm_cuda_check(&m->cu, m->cu.cuCtxPushCurrent_v2(m->context), "using the GPU");
}

static void leave(cuda_model *m) {
  void *context;
  m->cu.cuCtxPopCurrent_v2(&context);
}

static int32_t load(cuda_model *m, const void *weights) {
  int32_t code = SLM_OK;
  TRY(cuModuleLoadData(&m->module, slm_cuda.image), "loading kernels");
  for (int32_t i = 0; i < slm_plan.kernel_count; ++i)
    TRY(cuModuleGetFunction(&m->functions[i], m->module, slm_cuda.kernels[i]), "finding a kernel");
  TRY(cuMemAlloc_v2(&m->weights, slm_plan.weights_bytes), "memory for weights");
  TRY(cuMemcpyHtoDAsync_v2(m->weights, weights, slm_plan.weights_bytes, NULL), "copying weights");
  TRY(cuStreamSynchronize(NULL), "copying weights");
  return code;
}

static void close_model(slm_model *model) {
  cuda_model *m = model->device;
  if (!m) return;
  if (m->context && enter(m) == SLM_OK) {
    if (m->weights) m->cu.cuMemFree_v2(m->weights);
    if (m->module) m->cu.cuModuleUnload(m->module);
    leave(m);
  }
  if (m->context) m->cu.cuDevicePrimaryCtxRelease_v2(m->device);
  slm_cuda_driver_close(&m->cu);
  free(m->functions);
  free(m);
  model->device = NULL;
}

static int32_t open_model(slm_model *model) {
  cuda_model *m = calloc(1, sizeof *m);
  if (!m) return slm_fail(SLM_ERR_MEMORY, "no memory for the model");
  model->device = m;
  m->functions = calloc((size_t)slm_plan.kernel_count, sizeof *m->functions);
  int32_t code =
      m->functions ? slm_cuda_driver_open(&m->cu) : slm_fail(SLM_ERR_MEMORY, "no memory for kernels");
  TRY(cuDeviceGet(&m->device, 0), "finding a GPU");
  TRY(cuDevicePrimaryCtxRetain(&m->context, m->device), "opening the GPU");
  if (code == SLM_OK) code = enter(m);
  if (code == SLM_OK) {
    code = load(m, model->weights);
    leave(m);
  }
  if (code != SLM_OK) close_model(model);
  return code;
}

static int32_t function_count(void) {
  return slm_plan.body_count + slm_plan.head_count + slm_plan.source_count;
}

/* Where a function's graph is kept. */
static void **graph_of(cuda_session *s, const slm_function *function) {
  const slm_function *lists[] = {slm_plan.bodies, slm_plan.heads, slm_plan.sources};
  int32_t counts[] = {slm_plan.body_count, slm_plan.head_count, slm_plan.source_count}, at = 0;
  for (int i = 0; i < 3; ++i)
    for (int32_t k = 0; k < counts[i]; ++k, ++at)
      if (&lists[i][k] == function) return &s->graphs[at];
  return NULL;
}

static void free_session(slm_session *session) {
  cuda_model *m = model_of(session);
  cuda_session *s = session->device;
  if (!s) return;
  if (enter(m) == SLM_OK) {
    for (int32_t i = 0; s->graphs && i < function_count(); ++i)
      if (s->graphs[i]) m->cu.cuGraphExecDestroy(s->graphs[i]);
    for (int i = SLM_SPACE_STATE; i <= SLM_SPACE_SCRATCH; ++i)
      if (s->memory[i]) m->cu.cuMemFree_v2(s->memory[i]);
    if (s->host) m->cu.cuMemFreeHost(s->host);
    if (s->stream) m->cu.cuStreamDestroy_v2(s->stream);
    leave(m);
  }
  free(s->graphs);
  free(s);
  session->device = NULL;
}

static size_t tokens_bytes(void) {
  int32_t rows = slm_plan.bodies[0].rows;
  if (slm_plan.source_count && slm_plan.sources[0].rows > rows) rows = slm_plan.sources[0].rows;
  return ((size_t)rows * sizeof(int32_t) + 63) / 64 * 64;
}

static int32_t place_memory(cuda_model *m, cuda_session *s, slm_session *session) {
  int32_t code = SLM_OK;
  const uint64_t sizes[] = {slm_plan.state_bytes, slm_plan.arena_bytes, slm_cuda.scratch_bytes};
  size_t outputs = AMBIENT_BYTES + tokens_bytes();
  TRY(cuStreamCreate(&s->stream, NON_BLOCKING), "a stream");
  for (int i = 0; i < 3; ++i) {
    slm_cuda_pointer *to = &s->memory[SLM_SPACE_STATE + i];
    if (!sizes[i]) continue;
    TRY(cuMemAlloc_v2(to, sizes[i]), "memory for a session");
    TRY(cuMemsetD8Async(*to, 0, sizes[i], s->stream), "clearing a session's memory");
  }
  TRY(cuMemHostAlloc(&s->host, outputs + slm_plan.output_bytes, MAPPED), "memory for outputs");
  TRY(cuMemHostGetDevicePointer_v2(&s->ambient, s->host, 0), "memory for outputs");
  TRY(cuStreamSynchronize(s->stream), "clearing a session's memory");
  if (code != SLM_OK) return code;
  memset(s->host, 0, outputs + slm_plan.output_bytes);
  s->memory[SLM_SPACE_WEIGHTS] = m->weights;
  s->memory[SLM_SPACE_TOKENS] = s->ambient + AMBIENT_BYTES;
  s->memory[SLM_SPACE_OUTPUT] = s->ambient + outputs;
  session->base[SLM_SPACE_TOKENS] = (char *)s->host + AMBIENT_BYTES;
  session->base[SLM_SPACE_OUTPUT] = (char *)s->host + outputs;
  return SLM_OK;
}

static int32_t new_session(slm_session *session) {
  cuda_model *m = model_of(session);
  cuda_session *s = calloc(1, sizeof *s);
  if (!s) return slm_fail(SLM_ERR_MEMORY, "no memory for a session");
  session->device = s;
  s->graphs = calloc((size_t)function_count(), sizeof *s->graphs);
  int32_t code = s->graphs ? enter(m) : slm_fail(SLM_ERR_MEMORY, "no memory for a session");
  if (s->graphs && code == SLM_OK) {
    code = place_memory(m, s, session);
    leave(m);
  }
  if (code != SLM_OK) free_session(session);
  return code;
}

/* A node for each step, one after the other; the driver copies what parameters point to. */
static int32_t add_steps(cuda_model *m, cuda_session *s, void *graph, const slm_function *function) {
  int32_t code = SLM_OK;
  void *last = NULL;
  for (uint32_t i = function->first_step; i < function->first_step + function->steps; ++i) {
    const slm_step *step = &slm_plan.steps[i];
    const slm_cuda_launch *launch = &slm_cuda.launches[i];
    slm_cuda_pointer pointers[MAX_POINTERS];
    void *params[MAX_POINTERS + 1], *node = NULL;
    int32_t grid = step->grid;
    for (int k = 0; k < step->args; ++k) {
      uint64_t ref = slm_plan.refs[step->first_ref + (uint32_t)k];
      pointers[k] = s->memory[SLM_REF_SPACE(ref)] + SLM_REF_OFFSET(ref);
      params[k] = &pointers[k];
    }
    params[step->args] = &s->ambient;
    params[step->args + 1] = &grid;
    slm_cuda_node described = {m->functions[step->kernel],
                               {launch->blocks, 1, 1},
                               {launch->threads, 1, 1},
                               launch->shared_bytes,
                               params,
                               NULL};
    TRY(cuGraphAddKernelNode(&node, graph, last ? &last : NULL, last != NULL, &described),
        "preparing a kernel");
    last = node;
  }
  return code;
}

static int32_t build_graph(cuda_model *m, cuda_session *s, const slm_function *function,
                           void **built) {
  int32_t code = SLM_OK;
  void *graph = NULL;
  TRY(cuGraphCreate(&graph, 0), "preparing a step");
  if (code == SLM_OK) code = add_steps(m, s, graph, function);
  TRY(cuGraphInstantiateWithFlags(built, graph, 0), "preparing a step");
  if (graph) m->cu.cuGraphDestroy(graph);
  return code;
}

/* What the caller said of tokens lies in the host's copy of the state. */
static int32_t copy_state(cuda_model *m, cuda_session *s, const slm_session *session, uint64_t offset,
                          int32_t count) {
  int32_t code = SLM_OK;
  TRY(cuMemcpyHtoDAsync_v2(s->memory[SLM_SPACE_STATE] + offset,
                           session->base[SLM_SPACE_STATE] + offset, (size_t)count * 4, s->stream),
      "copying what tokens are");
  return code;
}

static int32_t run(slm_session *session, const slm_function *function, int32_t position,
                   int32_t valid) {
  cuda_model *m = model_of(session);
  cuda_session *s = session->device;
  void **graph = graph_of(s, function);
  int32_t code = enter(m);
  if (code != SLM_OK) return code;
  if (!*graph) code = build_graph(m, s, function, graph);
  if (code == SLM_OK && slm_plan.mask == SLM_MASK_KEYS) {
    int32_t most = slm_plan.source_count ? slm_plan.source_context
                   : slm_plan.encoder    ? slm_plan.context
                                         : slm_plan.capacity;
    code = copy_state(m, s, session, slm_plan.limits_offset, most);
  }
  if (code == SLM_OK && slm_plan.segment_types)
    code = copy_state(m, s, session, slm_plan.segments_offset, function->rows);
  ((int32_t *)s->host)[0] = position;
  ((int32_t *)s->host)[1] = valid;
  TRY(cuGraphLaunch(*graph, s->stream), "running kernels");
  TRY(cuStreamSynchronize(s->stream), "running kernels");
  leave(m);
  return code;
}

static int32_t move_rows(slm_session *session, int32_t first, int32_t rows) {
  cuda_model *m = model_of(session);
  cuda_session *s = session->device;
  slm_cuda_pointer hidden = s->memory[SLM_SPACE_ARENA] + slm_plan.hidden_offset;
  size_t row = (size_t)slm_plan.hidden_size * sizeof(float);
  int32_t code = enter(m);
  if (code != SLM_OK) return code;
  /* A copy's two places must not overlap: as many rows at a time as lie before `first`. */
  for (int32_t done = 0; done < rows && code == SLM_OK; done += first) {
    size_t count = (size_t)(rows - done < first ? rows - done : first);
    TRY(cuMemcpyDtoDAsync_v2(hidden + (size_t)done * row, hidden + (size_t)(first + done) * row,
                             count * row, s->stream),
        "moving rows");
  }
  leave(m);
  return code;
}

const slm_device slm_cuda_device = {open_model, close_model, new_session,
                                    free_session, run, move_rows};
