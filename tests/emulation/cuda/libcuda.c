/* libcuda.so.1 on a machine without a GPU: checks what a driver checks, runs kernels on the CPU.
 *
 * EMULATED_KERNELS names a library with `emu_NAME` and `emu_params_NAME` for each kernel, EMULATED_ORDER
 * is an order of threads. As late as allowed: work runs when its stream is waited for. As strict as it
 * can be: the host cannot touch the device's memory, which begins as garbage and ends at a page that
 * nobody can touch. EMULATED_FAIL=NAME:N makes the Nth call of a function fail. EMULATED_ARCH=87 is what
 * the GPU can run the machine code of (of any where it is not set). EMULATED_FAULT=N makes the Nth kernel
 * touch what is not there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef const char *(*emulated)(unsigned grid, unsigned size, size_t shared, void **params);
enum { MAX_PARAMS = 100, MAX_WORK = 4096, MAX_MEMORY = 256, PAGE = 4096 };
typedef struct {
  emulated run;
  int params;
  size_t sizes[MAX_PARAMS];
} function;
typedef struct {
  void *function;
  unsigned grid[3], block[3], shared_bytes;
  void **params, **extra;
} node;
typedef struct {
  function *f;
  unsigned grid, size, shared;
  uint64_t values[MAX_PARAMS];
} launch;
typedef struct {
  launch *work;
  int count;
} graph;
typedef struct {
  int kind; /* 0 a graph, 1 a copy, 2 a fill */
  graph *g;
  int once; /* the graph goes with it */
  char *to;
  const void *from;
  size_t bytes;
  int value;
} task;

enum { OK, INVALID = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, BAD_CONTEXT = 201,
       NO_BINARY = 209, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719 };

static int initialized, contexts, broken;
static void *library;
static struct {
  char *base, *pointer;
  size_t map, size;
  int mapped; /* the host sees it */
} memory[MAX_MEMORY];
static task tasks[MAX_WORK];
static int task_count;

static int injected(const char *name) {
  static int calls;
  const char *want = getenv("EMULATED_FAIL");
  size_t n = strlen(name);
  return want && !strncmp(want, name, n) && want[n] == ':' && ++calls == atoi(want + n + 1);
}
#define ENTER(error)                                   \
  if (!initialized) return NOT_INITIALIZED;            \
  if (broken) return broken;                           \
  if (injected(__func__)) return error
#define NEEDS_CONTEXT \
  if (!contexts) return BAD_CONTEXT

static void protect(int access) {
  for (int i = 0; i < MAX_MEMORY; ++i)
    if (memory[i].base && !memory[i].mapped) mprotect(memory[i].base, memory[i].map - PAGE, access);
}

int cuInit(unsigned flags) {
  if (injected(__func__)) return NO_DEVICE;
  initialized = 1;
  return flags ? INVALID : OK;
}
int cuGetErrorName(int code, const char **name) {
  *name = code == OUT_OF_MEMORY    ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == NO_DEVICE      ? "CUDA_ERROR_NO_DEVICE"
          : code == NOT_FOUND      ? "CUDA_ERROR_NOT_FOUND"
          : code == LAUNCH_FAILED  ? "CUDA_ERROR_LAUNCH_FAILED"
          : code == NO_BINARY      ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == BAD_CONTEXT    ? "CUDA_ERROR_INVALID_CONTEXT"
                                   : "CUDA_ERROR_INVALID_VALUE";
  return OK;
}
int cuDeviceGet(int *device, int i) {
  ENTER(NO_DEVICE);
  *device = i;
  return i ? INVALID : OK;
}
int cuDeviceGetName(char *name, int size, int device) {
  snprintf(name, (size_t)size, "emulated");
  return device ? INVALID : OK;
}
int cuDriverGetVersion(int *version) {
  *version = 12090;
  return OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, COOPERATIVE = 95 };
  const char *together = getenv("EMULATED_COOPERATIVE"), *arch = getenv("EMULATED_ARCH");
  ENTER(INVALID);
  switch (attribute) {
  case MULTIPROCESSORS: *value = 3; break;
  case COOPERATIVE: *value = together ? atoi(together) : 1; break;
  case MAJOR: *value = arch ? atoi(arch) / 10 : 9; break;
  case MINOR: *value = arch ? atoi(arch) % 10 : 0; break;
  case 13: case 18: case 36: case 37: case 38: *value = 0; break; /* clocks, caches, memory */
  default: return INVALID;
  }
  return device ? INVALID : OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *f, int size, size_t shared) {
  ENTER(INVALID);
  NEEDS_CONTEXT;
  *blocks = 1;
  return f && size && shared <= 48 << 10 ? OK : INVALID;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  ENTER(OUT_OF_MEMORY);
  *context = &contexts;
  return device ? INVALID : OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return device ? INVALID : OK; }
int cuCtxPushCurrent_v2(void *context) {
  ENTER(INVALID);
  if (context != &contexts) return BAD_CONTEXT;
  ++contexts;
  return OK;
}
int cuCtxPopCurrent_v2(void **context) {
  *context = &contexts;
  return contexts ? (--contexts, OK) : BAD_CONTEXT;
}

int cuModuleLoadData(void **module, const void *image) {
  ENTER(OUT_OF_MEMORY);
  NEEDS_CONTEXT;
  const unsigned char *elf = image;
  const char *ptx = image, *target = ".target sm_";
  const char *wanted = !strncmp(ptx, "//", 2) ? strstr(ptx, target) : NULL;
  enum { CUDA = 190 };
  if (wanted) {
    if (atoi(wanted + strlen(target)) > atoi(getenv("EMULATED_ARCH"))) return NO_BINARY;
    goto good;
  }
  if (memcmp(elf, "\177ELF", 4) || (elf[18] | elf[19] << 8) != CUDA) return 200;
  /* Of the same generation, and no later one. */
  int own = elf[48], here = getenv("EMULATED_ARCH") ? atoi(getenv("EMULATED_ARCH")) : own;
  if (own / 10 != here / 10 || own > here) return NO_BINARY;
good:
  library = dlopen(getenv("EMULATED_KERNELS"), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "EMULATED_KERNELS: %s\n", dlerror());
    return NOT_FOUND;
  }
  void (*set)(unsigned) = (void (*)(unsigned))dlsym(library, "emu_order");
  if (getenv("EMULATED_ORDER")) set((unsigned)atoi(getenv("EMULATED_ORDER")));
  *module = library;
  return OK;
}
int cuModuleUnload(void *module) { return module == library ? OK : INVALID; }
int cuModuleGetFunction(void **to, void *module, const char *name) {
  ENTER(NOT_FOUND);
  char symbol[512];
  function *f = calloc(1, sizeof *f);
  snprintf(symbol, sizeof symbol, "emu_%s", name);
  *(void **)&f->run = dlsym(module, symbol);
  snprintf(symbol, sizeof symbol, "emu_sizes_%s", name);
  int (*sizes)(size_t *);
  *(void **)&sizes = dlsym(module, symbol);
  if (!f->run || !sizes) return NOT_FOUND;
  f->params = sizes(f->sizes);
  *to = f;
  return OK;
}

static int allocate(char **to, size_t size, int mapped) {
  size_t padded = (size + 255) / 256 * 256, map = (padded + PAGE - 1) / PAGE * PAGE + PAGE;
  for (int i = 0; i < MAX_MEMORY; ++i) {
    if (memory[i].base) continue;
    char *base = mmap(NULL, map, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || !size) return OUT_OF_MEMORY;
    memset(base, 0xa5, map - PAGE);
    mprotect(base + map - PAGE, PAGE, PROT_NONE);
    memory[i].base = base;
    memory[i].map = map;
    memory[i].size = size;
    memory[i].mapped = mapped;
    *to = memory[i].pointer = base + map - PAGE - padded;
    protect(PROT_NONE);
    return OK;
  }
  return OUT_OF_MEMORY;
}
static int release(char *pointer) {
  for (int i = 0; i < MAX_MEMORY; ++i) {
    if (!memory[i].base || memory[i].pointer != pointer) continue;
    munmap(memory[i].base, memory[i].map);
    memory[i].base = NULL;
    return OK;
  }
  return INVALID;
}
/* Whether `bytes` from `pointer` on lie in one piece of memory. */
static int inside(const char *pointer, size_t bytes) {
  for (int i = 0; i < MAX_MEMORY; ++i)
    if (memory[i].base && pointer >= memory[i].pointer &&
        pointer + bytes <= memory[i].pointer + memory[i].size)
      return 1;
  return 0;
}
int cuMemAlloc_v2(uint64_t *to, size_t size) {
  ENTER(OUT_OF_MEMORY);
  NEEDS_CONTEXT;
  char *pointer = NULL;
  int code = allocate(&pointer, size, 0);
  *to = (uint64_t)(uintptr_t)pointer;
  return code;
}
int cuMemFree_v2(uint64_t pointer) { return release((char *)(uintptr_t)pointer); }
int cuMemHostAlloc(void **to, size_t size, unsigned flags) {
  ENTER(OUT_OF_MEMORY);
  NEEDS_CONTEXT;
  char *pointer = NULL;
  int code = flags == 2 ? allocate(&pointer, size, 1) : INVALID;
  *to = pointer;
  return code;
}
int cuMemFreeHost(void *pointer) { return release(pointer); }
int cuMemHostGetDevicePointer_v2(uint64_t *to, void *pointer, unsigned flags) {
  ENTER(INVALID);
  *to = (uint64_t)(uintptr_t)pointer;
  return flags ? INVALID : OK;
}

static int add(task t) {
  if (task_count == MAX_WORK) return OUT_OF_MEMORY;
  tasks[task_count++] = t;
  return OK;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
  (void)stream;
  ENTER(INVALID);
  NEEDS_CONTEXT;
  char *place = (char *)(uintptr_t)to;
  return inside(place, bytes) ? add((task){1, NULL, 0, place, from, bytes, 0}) : INVALID;
}
int cuStreamSynchronize(void *stream);
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
  ENTER(INVALID);
  NEEDS_CONTEXT;
  const char *source = (const char *)(uintptr_t)from;
  int code = inside(source, bytes) ? cuStreamSynchronize(NULL) : INVALID;
  if (code != OK) return code;
  protect(PROT_READ);
  memcpy(to, source, bytes);
  protect(PROT_NONE);
  return OK;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
  (void)stream;
  ENTER(INVALID);
  NEEDS_CONTEXT;
  char *place = (char *)(uintptr_t)to, *source = (char *)(uintptr_t)from;
  if (!inside(place, bytes) || !inside(source, bytes)) return INVALID;
  if (place < source + bytes && source < place + bytes) return INVALID; /* undefined */
  return add((task){1, NULL, 0, place, source, bytes, 0});
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream) {
  (void)stream;
  ENTER(INVALID);
  NEEDS_CONTEXT;
  char *place = (char *)(uintptr_t)to;
  return inside(place, bytes) ? add((task){2, NULL, 0, place, NULL, bytes, value}) : INVALID;
}
int cuStreamCreate(void **stream, unsigned flags) {
  ENTER(OUT_OF_MEMORY);
  NEEDS_CONTEXT;
  *stream = malloc(1);
  return flags > 1 ? INVALID : OK;
}
int cuStreamDestroy_v2(void *stream) {
  free(stream);
  return OK;
}
static int run_graph(const graph *g) {
  for (int i = 0; i < g->count; ++i) {
    launch *l = &g->work[i];
    void *params[MAX_PARAMS];
    for (int p = 0; p < l->f->params; ++p) params[p] = &l->values[p];
    static int kernels;
    const char *fault = getenv("EMULATED_FAULT");
    uint64_t first = l->values[0];
    if (fault && ++kernels == atoi(fault)) l->values[0] += (uint64_t)1 << 44;
    const char *wrong = l->f->run(l->grid, l->size, l->shared, params);
    l->values[0] = first;
    if (!wrong) continue;
    fprintf(stderr, "emulated GPU: %s\n", wrong);
    return broken = strstr(wrong, "illegal address") ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
  }
  return OK;
}
static int drop(graph *g) {
  free(g->work);
  free(g);
  return OK;
}
int cuStreamSynchronize(void *stream) {
  (void)stream;
  ENTER(LAUNCH_FAILED);
  NEEDS_CONTEXT;
  int code = OK;
  protect(PROT_READ | PROT_WRITE);
  for (int i = 0; i < task_count && code == OK; ++i) {
    task *t = &tasks[i];
    if (t->kind == 0) code = run_graph(t->g);
    if (t->once) drop(t->g);
    if (t->kind == 1) memcpy(t->to, t->from, t->bytes);
    if (t->kind == 2) memset(t->to, t->value, t->bytes);
  }
  protect(PROT_NONE);
  task_count = 0;
  return code;
}

/* The driver copies a launch's arguments. */
static int describe(launch *l, const node *n) {
  if (n->grid[0] == 0 || n->block[0] == 0 || n->block[0] > 256 || n->shared_bytes > 48 << 10)
    return INVALID;
  *l = (launch){n->function, n->grid[0], n->block[0], n->shared_bytes, {0}};
  for (int p = 0; p < l->f->params; ++p) {
    memcpy(&l->values[p], n->params[p], l->f->sizes[p]);
    if (l->f->sizes[p] == sizeof(uint64_t) && !inside((char *)(uintptr_t)l->values[p], 1))
      return INVALID;
  }
  return OK;
}
static int launch_once(node n) {
  graph *g = calloc(1, sizeof *g);
  g->work = calloc(1, sizeof *g->work);
  g->count = 1;
  int code = describe(g->work, &n);
  return code == OK ? add((task){0, g, 1, NULL, NULL, 0, 0}) : (drop(g), code);
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **params, void **extra) {
  (void)stream;
  ENTER(LAUNCH_FAILED);
  NEEDS_CONTEXT;
  return launch_once((node){f, {gx, gy, gz}, {bx, by, bz}, shared, params, extra});
}
int cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned shared, void *stream,
                              void **params) {
  enum { TOO_LARGE = 720 };
  (void)stream;
  ENTER(LAUNCH_FAILED);
  NEEDS_CONTEXT;
  if (gx > 3) return TOO_LARGE; /* one on each multiprocessor, as it is told */
  return launch_once((node){f, {gx, gy, gz}, {bx, by, bz}, shared, params, NULL});
}

int cuGraphCreate(void **to, unsigned flags) {
  ENTER(OUT_OF_MEMORY);
  graph *g = calloc(1, sizeof *g);
  g->work = calloc(MAX_WORK, sizeof *g->work);
  *to = g;
  return flags ? INVALID : OK;
}
int cuGraphAddKernelNode(void **to, void *into, void *const *after, size_t count, const node *n) {
  ENTER(INVALID);
  NEEDS_CONTEXT;
  graph *g = into;
  /* A straight line: each node after the one before it. */
  if ((count == 1 ? after[0] : NULL) != (g->count ? &g->work[g->count - 1] : NULL)) return INVALID;
  *to = &g->work[g->count];
  return describe(&g->work[g->count++], n);
}
int cuGraphInstantiateWithFlags(void **to, void *from, unsigned long long flags) {
  ENTER(OUT_OF_MEMORY);
  const graph *g = from;
  graph *copy = malloc(sizeof *copy);
  copy->count = g->count;
  copy->work = malloc((size_t)(g->count + 1) * sizeof *copy->work);
  memcpy(copy->work, g->work, (size_t)g->count * sizeof *copy->work);
  *to = copy;
  return flags ? INVALID : OK;
}
int cuGraphLaunch(void *exec, void *stream) {
  (void)stream;
  ENTER(LAUNCH_FAILED);
  NEEDS_CONTEXT;
  return add((task){0, exec, 0, NULL, NULL, 0, 0});
}
int cuGraphExecDestroy(void *exec) { return drop(exec); }
int cuGraphDestroy(void *g) { return drop(g); }
