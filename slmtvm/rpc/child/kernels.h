/* What slmtvm/rpc/program.py writes beside main.c: the kernels of one program. */
#ifndef SLM_RPC_KERNELS_H
#define SLM_RPC_KERNELS_H

#include <stdint.h>

typedef void (*slm_rpc_call)(void *const *buffers, const int32_t *scalars, int32_t begin,
                             int32_t end);

typedef struct slm_rpc_kernel {
  const char *name;
  slm_rpc_call call;
  int32_t buffers; /* that a client gives; scratch comes after them */
  int32_t scalars; /* besides begin and end */
  int32_t grid;
  const uint64_t *sizes;  /* bytes of each buffer */
  const uint8_t *written; /* whether the kernel writes it */
  uint64_t scratch_bytes; /* for each thread, 0 for none */
} slm_rpc_kernel;

extern const slm_rpc_kernel slm_rpc_kernels[];
extern const int32_t slm_rpc_kernel_count;
extern const char *const slm_rpc_requires[]; /* CPU features, ends with NULL */

#endif
