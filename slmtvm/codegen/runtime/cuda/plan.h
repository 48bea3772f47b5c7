/* How the steps of slm_plan are launched on a GPU; the generated file of a library defines it. */
#ifndef SLM_CUDA_PLAN_H
#define SLM_CUDA_PLAN_H

#include <stdint.h>

#include "../plan_tables.h"

typedef struct slm_cuda_launch {
  uint32_t blocks; /* of threads */
  uint16_t threads;
  uint16_t shared_bytes; /* of a block */
} slm_cuda_launch;

typedef struct slm_cuda_plan {
  const char *const *kernels; /* entries of the image, by kernel */
  const slm_cuda_launch *launches; /* by step */
  const void *image; /* a cubin */
  uint64_t scratch_bytes; /* of a session, for the launch with most teams */
} slm_cuda_plan;

extern const slm_cuda_plan slm_cuda __attribute__((visibility("hidden")));

#endif
