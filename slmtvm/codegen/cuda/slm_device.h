/* What kernels ask of a GPU beyond C. A team is 16 threads, half a warp, that hold a vector's lanes;
 * teams of a warp may take different ways, so all that they do together names its own half. */
#ifndef SLM_DEVICE_H
#define SLM_DEVICE_H

#define SLM_LANES 16
#define SLM_DEVICE static __device__ __forceinline__

/* A thread's place. */
typedef struct {
  int lane;      /* of the vectors that its team holds */
  int index;     /* the team's, of all teams of the launch */
  int count;     /* teams of the launch */
  unsigned mask; /* the team's threads of the warp */
  char *memory;  /* the team's own, in shared memory */
} slm_team;

extern __shared__ __align__(16) char slm_shared[];

SLM_DEVICE slm_team slm_this_team(int bytes) {
  int own = (int)(threadIdx.x / SLM_LANES), each = (int)(blockDim.x / SLM_LANES);
  slm_team team;
  team.lane = (int)(threadIdx.x % SLM_LANES);
  team.index = (int)blockIdx.x * each + own;
  team.count = (int)gridDim.x * each;
  team.mask = 0xffffu << own % 2 * SLM_LANES;
  team.memory = slm_shared + own * bytes;
  return team;
}

/* Masks are constants: of others NVIDIA's compiler makes calls of a function. */
#define SLM_HALVES(t, operation) \
  ((t).mask == 0xffffu ? operation(0xffffu) : operation(0xffff0000u))

/* What a team's threads wrote before, all of them see after. */
SLM_DEVICE void slm_sync(slm_team t) { SLM_HALVES(t, __syncwarp); }

/* Another lane's value. */
SLM_DEVICE float slm_from(slm_team t, float v, int lane) {
#define SLM_SHUFFLE(mask) __shfl_sync(mask, v, lane, SLM_LANES)
  return SLM_HALVES(t, SLM_SHUFFLE);
#undef SLM_SHUFFLE
}
SLM_DEVICE int slm_from(slm_team t, int v, int lane) {
#define SLM_SHUFFLE(mask) __shfl_sync(mask, v, lane, SLM_LANES)
  return SLM_HALVES(t, SLM_SHUFFLE);
#undef SLM_SHUFFLE
}

/* The sum of `lanes` lanes, a power of two; every thread gets it. */
SLM_DEVICE int slm_sum(slm_team t, int v, int lanes) {
  for (int half = lanes / 2; half; half /= 2) v += slm_from(t, v, t.lane ^ half);
  return v;
}

SLM_DEVICE int slm_floordiv(int a, int b) { return a / b - (a % b != 0 && (a ^ b) < 0); }
SLM_DEVICE int slm_floormod(int a, int b) { return a - slm_floordiv(a, b) * b; }
SLM_DEVICE int slm_dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
SLM_DEVICE float slm_float(int bits) { return __int_as_float(bits); }
SLM_DEVICE float slm_float(unsigned bits) { return __int_as_float((int)bits); }
SLM_DEVICE int slm_bits(float v) { return __float_as_int(v); }

/* Floats of 16 bits are held as their bits. */
#ifdef __CUDA_ARCH__
SLM_DEVICE float slm_widen(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
SLM_DEVICE unsigned short slm_narrow(float v) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
#endif

#endif
