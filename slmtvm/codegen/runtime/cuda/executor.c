/* A plan on a GPU: weights and a session's memory on the device, one CUDA graph a function; where the
 * plan has a persistent kernel, that does functions of one row.
 *
 * Tokens, position and outputs lie in memory that both processors see, so a step of a function is one
 * launch and one wait. What went wrong in a kernel stays: the driver refuses all that follows.
 * The environment's SLM_CUDA_LAUNCH=graph does without the persistent kernel, and =direct without
 * graphs, too: a launch of its own for each kernel, for tools that look at them. */
#include <stdlib.h>
#include <string.h>

#include "../device.h"
#include "../error.h"
#include "driver.h"
#include "plan.h"

/* Pointers of a launch: buffers of a few steps, and the ambient scalars. */
enum { MAX_POINTERS = 3 * SLM_MAX_ARGS + 1, AMBIENT_BYTES = 64, MAPPED = 2, NON_BLOCKING = 1 };
enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, COOPERATIVE = 95 }; /* attributes of a device */
enum { NO_BINARY_FOR_GPU = 209 };
typedef enum { BY_GRAPH, DIRECT, PERSISTENT } launch_way;

typedef struct {
  slm_cuda_driver cu;
  int device;
  void *context, *module;
  void **entries;
  void *persistent; /* NULL: functions of one row run as the others do */
  unsigned blocks;  /* of it that run at once */
  launch_way way;   /* of other functions */
  slm_cuda_pointer weights;
} cuda_model;

/* What the persistent kernel reads of a launch; slm_device.h of the kernels has the same. */
typedef struct {
  int32_t number, grid, first_ref;
} work;

typedef struct {
  void *stream;
  void *host; /* ambient scalars, tokens, outputs */
  slm_cuda_pointer memory[SLM_SPACES], ambient;
  void **graphs; /* by function: bodies, heads, sources; NULL before the first run */
  slm_cuda_pointer pointers, works, arrived; /* the persistent kernel's */
  unsigned passed;                           /* what `arrived` holds */
  int chosen; /* the last function left what is likeliest */
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

/* Finds out how many blocks of the persistent kernel run at once; none where the GPU cannot hold any
 * together. */
static int32_t find_persistent(cuda_model *m) {
  const slm_cuda_persistent *p = &slm_cuda.persistent;
  int32_t code = SLM_OK;
  int each = 0, processors = 0, together = 0;
  void *entry = NULL;
  TRY(cuModuleGetFunction(&entry, m->module, p->entry), "finding a kernel");
  TRY(cuDeviceGetAttribute(&processors, MULTIPROCESSORS, m->device), "looking at the GPU");
  TRY(cuDeviceGetAttribute(&together, COOPERATIVE, m->device), "looking at the GPU");
  TRY(cuOccupancyMaxActiveBlocksPerMultiprocessor(&each, entry, p->threads, p->shared_bytes),
      "looking at the GPU");
  if (code != SLM_OK || !together || each < 1 || processors < 1) return code;
  m->blocks = (unsigned)(each * processors);
  if (m->blocks > p->blocks) m->blocks = p->blocks;
  m->persistent = entry;
  return SLM_OK;
}

/* Loads the kernels; says which GPU they are for where this is another one. */
static int32_t load_module(cuda_model *m) {
  int major = 0, minor = 0, failed = m->cu.cuModuleLoadData(&m->module, slm_cuda.image);
  if (failed == NO_BINARY_FOR_GPU && *slm_cuda.ptx &&
      m->cu.cuModuleLoadData(&m->module, slm_cuda.ptx) == 0)
    return SLM_OK;
  if (failed != NO_BINARY_FOR_GPU) return slm_cuda_check(&m->cu, failed, "loading kernels");
  m->cu.cuDeviceGetAttribute(&major, MAJOR, m->device);
  m->cu.cuDeviceGetAttribute(&minor, MINOR, m->device);
  return slm_fail(SLM_ERR_DEVICE,
                  "loading kernels: this GPU is an sm_%d%d, the kernels are for %s; compile the model "
                  "for a target of this GPU",
                  major, minor, slm_cuda.arch);
}

static int32_t load(cuda_model *m, const void *weights) {
  const char *way = getenv("SLM_CUDA_LAUNCH");
  m->way = way && !strcmp(way, "direct") ? DIRECT : BY_GRAPH;
  int32_t code = load_module(m);
  for (int32_t i = 0; i < slm_cuda.entry_count; ++i)
    TRY(cuModuleGetFunction(&m->entries[i], m->module, slm_cuda.entries[i]), "finding a kernel");
  if (code == SLM_OK && slm_cuda.persistent.entry && !(way && *way)) code = find_persistent(m);
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
  free(m->entries);
  free(m);
  model->device = NULL;
}

static int32_t open_model(slm_model *model) {
  cuda_model *m = calloc(1, sizeof *m);
  if (!m) return slm_fail(SLM_ERR_MEMORY, "no memory for the model");
  model->device = m;
  m->entries = calloc((size_t)slm_cuda.entry_count, sizeof *m->entries);
  int32_t code =
      m->entries ? slm_cuda_driver_open(&m->cu) : slm_fail(SLM_ERR_MEMORY, "no memory for kernels");
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

/* The number of a function among bodies, heads and sources; -1 where it is none of them. */
static int32_t number_of(const slm_function *function) {
  const slm_function *lists[] = {slm_plan.bodies, slm_plan.heads, slm_plan.sources};
  int32_t counts[] = {slm_plan.body_count, slm_plan.head_count, slm_plan.source_count}, at = 0;
  for (int i = 0; i < 3; ++i)
    for (int32_t k = 0; k < counts[i]; ++k, ++at)
      if (&lists[i][k] == function) return at;
  return -1;
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
    const slm_cuda_pointer own[] = {s->pointers, s->works, s->arrived};
    for (int i = 0; i < 3; ++i)
      if (own[i]) m->cu.cuMemFree_v2(own[i]);
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

/* The plan's, and the two floats of what is likeliest. */
static size_t outputs_bytes(void) {
  return slm_cuda.chosen_offset ? slm_cuda.chosen_offset + 2 * sizeof(float) : slm_plan.output_bytes;
}

static int32_t place_memory(cuda_model *m, cuda_session *s, slm_session *session) {
  int32_t code = SLM_OK;
  const uint64_t sizes[] = {slm_plan.state_bytes, slm_cuda.arena_bytes, slm_cuda.scratch_bytes};
  size_t outputs = AMBIENT_BYTES + tokens_bytes(), all = outputs + outputs_bytes();
  TRY(cuStreamCreate(&s->stream, NON_BLOCKING), "a stream");
  for (int i = 0; i < 3; ++i) {
    slm_cuda_pointer *to = &s->memory[SLM_SPACE_STATE + i];
    if (!sizes[i]) continue;
    TRY(cuMemAlloc_v2(to, sizes[i]), "memory for a session");
    TRY(cuMemsetD8Async(*to, 0, sizes[i], s->stream), "clearing a session's memory");
  }
  TRY(cuMemHostAlloc(&s->host, all, MAPPED), "memory for outputs");
  TRY(cuMemHostGetDevicePointer_v2(&s->ambient, s->host, 0), "memory for outputs");
  TRY(cuStreamSynchronize(s->stream), "clearing a session's memory");
  if (code != SLM_OK) return code;
  memset(s->host, 0, all);
  s->memory[SLM_SPACE_WEIGHTS] = m->weights;
  s->memory[SLM_SPACE_TOKENS] = s->ambient + AMBIENT_BYTES;
  s->memory[SLM_SPACE_OUTPUT] = s->ambient + outputs;
  session->base[SLM_SPACE_TOKENS] = (char *)s->host + AMBIENT_BYTES;
  session->base[SLM_SPACE_OUTPUT] = (char *)s->host + outputs;
  return SLM_OK;
}

static slm_cuda_pointer place_of(const cuda_session *s, uint64_t ref) {
  return s->memory[SLM_REF_SPACE(ref)] + SLM_REF_OFFSET(ref);
}

static uint32_t launch_count(void) {
  uint32_t count = 0;
  for (int32_t i = 0; i < function_count(); ++i) count += slm_cuda.functions[i].count;
  return count;
}

/* Tables of the persistent kernel: what all launches are, and where their buffers lie. */
static int32_t place_tables(cuda_model *m, cuda_session *s) {
  int32_t code = SLM_OK;
  uint32_t count = launch_count();
  slm_cuda_pointer *pointers = calloc(slm_cuda.ref_count, sizeof *pointers);
  work *works = calloc(count, sizeof *works);
  if (!pointers || !works) code = slm_fail(SLM_ERR_MEMORY, "no memory for a session");
  for (uint32_t i = 0; code == SLM_OK && i < slm_cuda.ref_count; ++i)
    pointers[i] = place_of(s, slm_cuda.refs[i]);
  for (uint32_t i = 0; code == SLM_OK && i < count; ++i) {
    const slm_cuda_launch *l = &slm_cuda.launches[i];
    works[i] = (work){l->number, l->grid, (int32_t)l->first_ref};
  }
  TRY(cuMemAlloc_v2(&s->pointers, slm_cuda.ref_count * sizeof *pointers), "memory for a session");
  TRY(cuMemAlloc_v2(&s->works, count * sizeof *works), "memory for a session");
  TRY(cuMemAlloc_v2(&s->arrived, sizeof(unsigned)), "memory for a session");
  TRY(cuMemcpyHtoDAsync_v2(s->pointers, pointers, slm_cuda.ref_count * sizeof *pointers, s->stream),
      "copying tables");
  TRY(cuMemcpyHtoDAsync_v2(s->works, works, count * sizeof *works, s->stream), "copying tables");
  TRY(cuMemsetD8Async(s->arrived, 0, sizeof(unsigned), s->stream), "clearing a session's memory");
  /* What is copied must not be freed before, also where something failed. */
  if (code != SLM_OK) m->cu.cuStreamSynchronize(s->stream);
  TRY(cuStreamSynchronize(s->stream), "copying tables");
  free(pointers);
  free(works);
  return code;
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
    if (code == SLM_OK && m->persistent) code = place_tables(m, s);
    leave(m);
  }
  if (code != SLM_OK) free_session(session);
  return code;
}

/* The arguments of a launch; `params` point to `pointers` and into tables. */
static void fill(const cuda_session *s, const slm_cuda_launch *l, slm_cuda_pointer *pointers,
                 void **params) {
  for (int k = 0; k < l->args; ++k) {
    pointers[k] = place_of(s, slm_cuda.refs[l->first_ref + (uint32_t)k]);
    params[k] = &pointers[k];
  }
  params[l->args] = (void *)&s->ambient;
  params[l->args + 1] = (void *)&l->grid;
}

/* A node for each launch, one after the other; the driver copies what parameters point to. */
static int32_t add_nodes(cuda_model *m, const cuda_session *s, void *graph, slm_cuda_list list) {
  int32_t code = SLM_OK;
  void *last = NULL;
  for (uint32_t i = list.first; i < list.first + list.count; ++i) {
    const slm_cuda_launch *l = &slm_cuda.launches[i];
    slm_cuda_pointer pointers[MAX_POINTERS];
    void *params[MAX_POINTERS + 1], *node = NULL;
    fill(s, l, pointers, params);
    slm_cuda_node described = {m->entries[l->entry], {l->blocks, 1, 1}, {l->threads, 1, 1},
                               l->shared_bytes,      params,            NULL};
    TRY(cuGraphAddKernelNode(&node, graph, last ? &last : NULL, last != NULL, &described),
        "preparing a kernel");
    last = node;
  }
  return code;
}

static int32_t launch_each(cuda_model *m, const cuda_session *s, slm_cuda_list list) {
  int32_t code = SLM_OK;
  for (uint32_t i = list.first; i < list.first + list.count; ++i) {
    const slm_cuda_launch *l = &slm_cuda.launches[i];
    slm_cuda_pointer pointers[MAX_POINTERS];
    void *params[MAX_POINTERS + 1];
    fill(s, l, pointers, params);
    TRY(cuLaunchKernel(m->entries[l->entry], l->blocks, 1, 1, l->threads, 1, 1, l->shared_bytes,
                       s->stream, params, NULL),
        "running kernels");
  }
  return code;
}

static int32_t launch_persistent(cuda_model *m, cuda_session *s, slm_cuda_list list) {
  int32_t code = SLM_OK, count = (int32_t)list.count;
  slm_cuda_pointer works = s->works + list.first * sizeof(work);
  void *params[] = {&works, &s->pointers, &s->arrived, &s->ambient, &count, &s->passed};
  const slm_cuda_persistent *p = &slm_cuda.persistent;
  TRY(cuLaunchCooperativeKernel(m->persistent, m->blocks, 1, 1, p->threads, 1, 1, p->shared_bytes,
                                s->stream, params),
      "running kernels");
  /* Its blocks meet between launches. */
  if (code == SLM_OK) s->passed += m->blocks * (list.count - 1);
  return code;
}

static int32_t build_graph(cuda_model *m, const cuda_session *s, slm_cuda_list list, void **built) {
  int32_t code = SLM_OK;
  void *graph = NULL;
  TRY(cuGraphCreate(&graph, 0), "preparing a step");
  if (code == SLM_OK) code = add_nodes(m, s, graph, list);
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
  int32_t number = number_of(function);
  if (number < 0) return slm_fail(SLM_ERR_DEVICE, "a function that no GPU runs");
  const slm_cuda_list list = slm_cuda.functions[number];
  const launch_way way = m->persistent && function->rows == 1 ? PERSISTENT : m->way;
  void **graph = &s->graphs[number];
  const int is_head = number >= slm_plan.body_count &&
                      number < slm_plan.body_count + slm_plan.head_count;
  int32_t code = enter(m);
  s->chosen = is_head && function->rows == 1 && slm_cuda.chosen_offset;
  if (code != SLM_OK) return code;
  if (way == BY_GRAPH && !*graph) code = build_graph(m, s, list, graph);
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
  if (code == SLM_OK && way == PERSISTENT) code = launch_persistent(m, s, list);
  if (code == SLM_OK && way == DIRECT) code = launch_each(m, s, list);
  if (way == BY_GRAPH) TRY(cuGraphLaunch(*graph, s->stream), "running kernels");
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

static int likeliest(const slm_session *session, slm_candidate *found) {
  const cuda_session *s = session->device;
  const float *chosen = (const float *)(session->base[SLM_SPACE_OUTPUT] + slm_cuda.chosen_offset);
  if (!s->chosen || !(chosen[1] >= 0 && chosen[1] < (float)slm_plan.vocab_size)) return 0;
  *found = (slm_candidate){chosen[0], (int32_t)chosen[1]};
  return 1;
}

const slm_device slm_cuda_device = {open_model, close_model, new_session, free_session,
                                    run,        move_rows,   likeliest};
