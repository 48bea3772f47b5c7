/* What a program that measures kernels of a GPU is told about them: the compiler writes a table of this. */
#ifndef SLM_MEASURE_GPU_H
#define SLM_MEASURE_GPU_H

#include <stdint.h>

#include "measure.h"

typedef struct {
  const char *entry;
  int32_t args; /* pointers */
  uint32_t blocks, threads, shared_bytes;
  int32_t grid;
} slm_gpu_launch;

extern const void *const slm_gpu_image; /* a cubin */
extern const slm_gpu_launch slm_gpu_launches[]; /* by candidate */
extern const slm_place slm_gpu;

/* Asks the GPU to run a candidate on the host's copies of its buffers. */
void slm_gpu_run(int candidate, void **args);

#endif
