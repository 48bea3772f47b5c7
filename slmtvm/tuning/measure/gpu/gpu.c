/* Kernels of a GPU: their buffers lie on the device, each beside a copy that the host has. */
#define _GNU_SOURCE
#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "driver.h"
#include "error.h"
#include "slm.h"

enum { MOST_PIECES = 64, MOST_POINTERS = 34 };

typedef struct {
  char *host;
  size_t bytes;
  slm_cuda_pointer device;
} piece;

static slm_cuda_driver cu;
static void *module, *context;
static slm_cuda_pointer ambient;
static piece pieces[MOST_PIECES];
static int piece_count;
static void **functions;

static _Noreturn void end(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(3);
}

static void check(int code, const char *what) {
  if (slm_cuda_check(&cu, code, what) != SLM_OK) end(slm_last_error());
}

static void copied(slm_cuda_pointer to, const void *from, size_t bytes) {
  check(cu.cuMemcpyHtoDAsync_v2(to, from, bytes, NULL), "copying to the GPU");
  check(cu.cuStreamSynchronize(NULL), "copying to the GPU");
}

static void start(void) {
  int device = 0;
  const int32_t scalars[] = {slm_measured_position, slm_measured_valid};
  if (slm_cuda_driver_open(&cu) != SLM_OK) end(slm_last_error());
  check(cu.cuDeviceGet(&device, 0), "finding a GPU");
  check(cu.cuDevicePrimaryCtxRetain(&context, device), "opening the GPU");
  check(cu.cuCtxPushCurrent_v2(context), "using the GPU");
  check(cu.cuModuleLoadData(&module, slm_gpu_image), "loading kernels");
  if (!(functions = calloc((size_t)slm_candidate_count, sizeof *functions))) end("no memory");
  for (int i = 0; i < slm_candidate_count; ++i)
    check(cu.cuModuleGetFunction(&functions[i], module, slm_gpu_launches[i].entry),
          "finding a kernel");
  check(cu.cuMemAlloc_v2(&ambient, sizeof scalars), "memory for scalars");
  copied(ambient, scalars, sizeof scalars);
}

static void *memory(size_t bytes) {
  if (piece_count == MOST_PIECES) end("too many pieces of memory");
  piece *p = &pieces[piece_count++];
  p->bytes = bytes;
  p->host = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p->host == MAP_FAILED) end("no memory for the buffers");
  check(cu.cuMemAlloc_v2(&p->device, bytes), "memory for the buffers");
  copied(p->device, p->host, bytes);
  return p->host;
}

/* Where the device has what the host has at `data`. */
static slm_cuda_pointer on_device(const void *data) {
  const char *at = data;
  for (int i = 0; i < piece_count; ++i)
    if (at >= pieces[i].host && at < pieces[i].host + pieces[i].bytes)
      return pieces[i].device + (size_t)(at - pieces[i].host);
  end("memory that is not the GPU's");
}

static void written(const void *data, size_t bytes) { copied(on_device(data), data, bytes); }

static void wanted(void *data, size_t bytes) {
  check(cu.cuMemcpyDtoH_v2(data, on_device(data), bytes), "copying from the GPU");
}

static void wait_for_all(void) { check(cu.cuStreamSynchronize(NULL), "running kernels"); }

void slm_gpu_run(int candidate, void **args) {
  const slm_gpu_launch *l = &slm_gpu_launches[candidate];
  slm_cuda_pointer pointers[MOST_POINTERS];
  void *params[MOST_POINTERS + 2];
  for (int i = 0; i < l->args; ++i) {
    pointers[i] = on_device(args[i]);
    params[i] = &pointers[i];
  }
  params[l->args] = &ambient;
  params[l->args + 1] = (void *)&l->grid;
  check(cu.cuLaunchKernel(functions[candidate], l->blocks, 1, 1, l->threads, 1, 1, l->shared_bytes,
                          NULL, params, NULL),
        "running kernels");
}

const slm_place slm_gpu = {start, memory, written, wanted, wait_for_all};
