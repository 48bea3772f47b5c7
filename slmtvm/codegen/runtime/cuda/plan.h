/* How the steps of slm_plan are launched on a GPU; the generated file of a library defines it. */
#ifndef SLM_CUDA_PLAN_H
#define SLM_CUDA_PLAN_H

#include <stdint.h>

#include "../plan_tables.h"

/* A launch: one step or several. Its pointers are refs of this plan, as slm_plan has its own. */
typedef struct slm_cuda_launch {
  uint16_t entry;
  uint16_t args;
  uint16_t threads;      /* of a block of threads */
  uint16_t shared_bytes; /* of such a block */
  uint32_t blocks;       /* of threads */
  uint32_t first_ref;
  int32_t grid;
  int32_t number; /* that the persistent kernel knows it by; -1 where it does not */
} slm_cuda_launch;

typedef struct slm_cuda_list {
  uint32_t first, count; /* launches */
} slm_cuda_list;

/* The kernel that does all launches of a function at once. */
typedef struct slm_cuda_persistent {
  const char *entry; /* NULL: there is none */
  uint32_t blocks;   /* the most that are useful */
  uint16_t threads, shared_bytes;
} slm_cuda_persistent;

typedef struct slm_cuda_plan {
  const char *const *entries;      /* of the image */
  const slm_cuda_list *functions;  /* bodies, heads, sources */
  const slm_cuda_launch *launches;
  const uint64_t *refs;
  const void *image;      /* a cubin */
  const char *ptx;        /* of the same, for later GPUs; empty where there is none */
  const char *arch;       /* that it is for, as "sm_87" */
  uint64_t scratch_bytes; /* of a session, for the launch with most teams */
  uint64_t arena_bytes;   /* the plan's, and what launches need behind it */
  /* Behind the plan's outputs: a head of one row leaves two floats there, its greatest logit and the
   * first place of that. 0: none does. */
  uint64_t chosen_offset;
  int32_t entry_count;
  uint32_t ref_count;
  slm_cuda_persistent persistent;
} slm_cuda_plan;

extern const slm_cuda_plan slm_cuda __attribute__((visibility("hidden")));

#endif
