/* The functions of a CUDA driver that are used, found when they are needed: no library must be there
 * at build time. All exist from CUDA 11.4 on. */
#ifndef SLM_CUDA_DRIVER_H
#define SLM_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t slm_cuda_pointer;

/* CUDA_KERNEL_NODE_PARAMS_v1. */
typedef struct slm_cuda_node {
  void *function;
  unsigned grid[3], block[3], shared_bytes;
  void **params, **extra;
} slm_cuda_node;

#define SLM_CUDA_FUNCTIONS(F)                                                              \
  F(cuInit, (unsigned))                                                                    \
  F(cuGetErrorName, (int, const char **))                                                  \
  F(cuDeviceGet, (int *, int))                                                             \
  F(cuDeviceGetAttribute, (int *, int, int))                                               \
  F(cuDevicePrimaryCtxRetain, (void **, int))                                              \
  F(cuDevicePrimaryCtxRelease_v2, (int))                                                   \
  F(cuCtxPushCurrent_v2, (void *))                                                         \
  F(cuCtxPopCurrent_v2, (void **))                                                         \
  F(cuModuleLoadData, (void **, const void *))                                             \
  F(cuModuleUnload, (void *))                                                              \
  F(cuModuleGetFunction, (void **, void *, const char *))                                  \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *, void *, int, size_t))             \
  F(cuLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,   \
                     unsigned, void *, void **, void **))                                  \
  F(cuLaunchCooperativeKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned,  \
                                unsigned, unsigned, void *, void **))                      \
  F(cuMemAlloc_v2, (slm_cuda_pointer *, size_t))                                           \
  F(cuMemFree_v2, (slm_cuda_pointer))                                                      \
  F(cuMemHostAlloc, (void **, size_t, unsigned))                                           \
  F(cuMemFreeHost, (void *))                                                               \
  F(cuMemHostGetDevicePointer_v2, (slm_cuda_pointer *, void *, unsigned))                  \
  F(cuMemcpyHtoDAsync_v2, (slm_cuda_pointer, const void *, size_t, void *))                \
  F(cuMemcpyDtoH_v2, (void *, slm_cuda_pointer, size_t))                                   \
  F(cuMemcpyDtoDAsync_v2, (slm_cuda_pointer, slm_cuda_pointer, size_t, void *))            \
  F(cuMemsetD8Async, (slm_cuda_pointer, unsigned char, size_t, void *))                    \
  F(cuStreamCreate, (void **, unsigned))                                                   \
  F(cuStreamSynchronize, (void *))                                                         \
  F(cuStreamDestroy_v2, (void *))                                                          \
  F(cuGraphCreate, (void **, unsigned))                                                    \
  F(cuGraphAddKernelNode, (void **, void *, void *const *, size_t, const slm_cuda_node *)) \
  F(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long))                    \
  F(cuGraphLaunch, (void *, void *))                                                       \
  F(cuGraphExecDestroy, (void *))                                                          \
  F(cuGraphDestroy, (void *))

typedef struct slm_cuda_driver {
  void *library;
#define SLM_CUDA_MEMBER(name, args) int(*name) args;
  SLM_CUDA_FUNCTIONS(SLM_CUDA_MEMBER)
#undef SLM_CUDA_MEMBER
} slm_cuda_driver;

/* Opens libcuda.so.1; SLM_ERR_DEVICE, with the reason, where there is none that will do. */
int32_t slm_cuda_driver_open(slm_cuda_driver *driver);
void slm_cuda_driver_close(slm_cuda_driver *driver);

/* SLM_OK where `code` is 0, else the driver's name of it, as what went wrong with `what`. */
int32_t slm_cuda_check(const slm_cuda_driver *driver, int code, const char *what);

#endif
