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

#ifdef __CUDA_ARCH__
extern __shared__ __align__(16) char slm_shared[];
#endif

/* A thread's team where blocks of threads follow one another; the first `between` bytes of shared
 * memory are the whole block's, `bytes` behind them each team's own. */
SLM_DEVICE slm_team slm_this_team(int between, int bytes) {
  int own = (int)(threadIdx.x / SLM_LANES), each = (int)(blockDim.x / SLM_LANES);
  slm_team team;
  team.lane = (int)(threadIdx.x % SLM_LANES);
  team.index = (int)blockIdx.x * each + own;
  team.count = (int)gridDim.x * each;
  team.mask = 0xffffu << own % 2 * SLM_LANES;
  team.memory = slm_shared + between + own * bytes;
  return team;
}

/* The same, every multiprocessor's first team before any second one. */
SLM_DEVICE slm_team slm_spread_team(int between, int bytes) {
  slm_team team = slm_this_team(between, bytes);
  team.index = (int)(threadIdx.x / SLM_LANES * gridDim.x + blockIdx.x);
  return team;
}

/* The team among those of its block of threads. */
SLM_DEVICE slm_team slm_of_block(slm_team team) {
  team.index = (int)(threadIdx.x / SLM_LANES);
  team.count = (int)(blockDim.x / SLM_LANES);
  return team;
}

#ifdef __CUDA_ARCH__
SLM_DEVICE unsigned slm_poll(const unsigned *at) { return *(const volatile unsigned *)at; }
#endif

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

/* What the persistent kernel does: node number `node`, `grid` blocks, its pointers from the `first` on. */
typedef struct {
  int node, grid, first;
} slm_work;

/* What any block of threads of the launch wrote before, all of them see after. `all`: what `arrived`
 * counts, modulo 2**32, when every block is here. All blocks must run at once. */
SLM_DEVICE void slm_meet_grid(unsigned *arrived, unsigned all) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while ((int)(slm_poll(arrived) - all) < 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

/* The sum of `lanes` lanes, a power of two; every thread gets it. */
SLM_DEVICE int slm_sum(slm_team t, int v, int lanes) {
  for (int half = lanes / 2; half; half /= 2) v += slm_from(t, v, t.lane ^ half);
  return v;
}

SLM_DEVICE int slm_floordiv(int a, int b) { return a / b - (a % b != 0 && (a ^ b) < 0); }
SLM_DEVICE int slm_floormod(int a, int b) { return a - slm_floordiv(a, b) * b; }
SLM_DEVICE float slm_float(int bits) { return __int_as_float(bits); }
SLM_DEVICE float slm_float(unsigned bits) { return __int_as_float((int)bits); }
SLM_DEVICE int slm_bits(float v) { return __float_as_int(v); }

#ifdef __CUDA_ARCH__
SLM_DEVICE int slm_dp4a(int a, int b, int c) {
  int sum;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

/* d += A B of signed bytes: 16 by 32, and 32 by 8. */
SLM_DEVICE void slm_mma_16x8x32(int *d, const unsigned *a, const unsigned *b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else /* without such instructions: every thread fetches its operands */
  const int lane = (int)(threadIdx.x % 32);
  for (int k = 0; k < 8; ++k) {
    int left[2], right[2];
    for (int i = 0; i < 2; ++i) {
      left[i] = __shfl_sync(0xffffffffu, (int)a[k / 4 * 2 + i], lane / 4 * 4 + k % 4, 32);
      right[i] = __shfl_sync(0xffffffffu, (int)b[k / 4], (lane % 4 * 2 + i) * 4 + k % 4, 32);
    }
    for (int i = 0; i < 4; ++i) d[i] = slm_dp4a(left[i / 2], right[i % 2], d[i]);
  }
#endif
}
#endif

/* dp4a of four weights, two of every four values of k, and those of 8 values that the lowest byte of
 * `places` names. */
SLM_DEVICE int slm_dp4a_2of4(int weights, int places, int low, int high, int sum) {
  const unsigned pairs = ((unsigned)places & 0xfu) | ((unsigned)places & 0xf0u) << 4;
  const unsigned from = ((pairs | pairs << 2) & 0x3333u) | 0x4400u;
  return slm_dp4a(weights, (int)__byte_perm((unsigned)low, (unsigned)high, from), sum);
}

#ifdef __CUDA_ARCH__
/* d += A B of signed bytes, 16 by 64 and 64 by 8. Of every four in a row of A two are given; lane
 * 4 g + 2 h + i has the places of row g + 8 i, columns 32 h to 32 h + 31. */
SLM_DEVICE void slm_mma_sparse_16x8x64(int *d, const unsigned *a, const unsigned *b, unsigned e) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(e));
#else /* without such instructions: every thread fetches its operands */
  const int lane = (int)(threadIdx.x % 32);
  for (int window = 0; window < 8; ++window) {
    int left[2], places[2], low[2], high[2];
    for (int i = 0; i < 2; ++i) {
      const int column = lane % 4 * 2 + i, word = 2 * window;
      left[i] = __shfl_sync(0xffffffffu, (int)a[window / 4 * 2 + i], lane / 4 * 4 + window % 4, 32);
      places[i] = __shfl_sync(0xffffffffu, (int)e, lane / 4 * 4 + window / 4 * 2 + i, 32);
      low[i] = __shfl_sync(0xffffffffu, (int)b[word / 4], column * 4 + word % 4, 32);
      high[i] = __shfl_sync(0xffffffffu, (int)b[word / 4], column * 4 + word % 4 + 1, 32);
    }
    for (int i = 0; i < 4; ++i)
      d[i] = slm_dp4a_2of4(left[i / 2], places[i / 2] >> window % 4 * 8, low[i % 2], high[i % 2], d[i]);
  }
#endif
}
#endif

/* Sums of 16 channels by the 8 rows of each of a warp's two teams. As the tensor cores leave them: of
 * team q, channel half h and row parity i in v[4 * q + 2 * h + i]. Settled: a thread's own channel, by
 * row. All threads of the warp do all of this together. */
typedef struct {
  int v[8];
} slm_tile;

/* Two registers and a bit of the lane's number change places. */
SLM_DEVICE void slm_exchange(int &first, int &second, int bit) {
  bool upper = threadIdx.x & bit;
  int kept = upper ? second : first, given = upper ? first : second;
  int got = __shfl_sync(0xffffffffu, given, (int)(threadIdx.x % 32) ^ bit, 32);
  first = upper ? got : kept;
  second = upper ? kept : got;
}
SLM_DEVICE slm_tile slm_mma_rows(slm_team t, slm_tile tile) {
  int *v = tile.v;
  for (int i = 0; i < 4; ++i) slm_exchange(v[i], v[i + 4], 16);
  for (int i = 0; i < 4; ++i) slm_exchange(v[i], v[i + 4], 2);
  for (int i = 0; i < 2; ++i) {
    slm_exchange(v[i], v[i + 2], 1);
    slm_exchange(v[i + 4], v[i + 6], 1);
  }
  return tile;
}

/* 32 values of k: weights of `bits`, a panel of 16 channels, by rows `stride` bytes apart; `rows` is the
 * team's own first one, the other team's lie beside them. Thread (g, c) of the tensor cores' fragments
 * takes k from 8 c on, in any order that both operands have, of two channels and of row g. */
SLM_DEVICE slm_tile slm_mma(slm_team t, const unsigned *weights, int bits, const signed char *rows,
                            int stride, slm_tile sums) {
  const int lane = (int)(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  const int channel = g % 4 * 4 + g / 4 * 2; /* where slm_mma_rows leaves it */
  const unsigned *own = weights + channel;
  unsigned a[4], b[2];
  for (int half = 0; half < 2; ++half) {
    if (bits == 8) {
      a[half] = own[2 * c * 16 + half];
      a[half + 2] = own[(2 * c + 1) * 16 + half];
    } else if (bits == 4) {
      const unsigned word = own[c * 16 + half];
      a[half] = word & 0x0f0f0f0fu;
      a[half + 2] = word >> 4 & 0x0f0f0f0fu;
    } else {
      const unsigned word = own[c / 2 * 16 + half] >> c % 2 * 4;
      a[half] = word & 0x03030303u;
      a[half + 2] = word >> 2 & 0x03030303u;
    }
  }
  const signed char *first = rows - (t.mask == 0xffffu ? 0 : 8 * stride) + g * stride + 8 * c;
  for (int team = 0; team < 2; ++team) {
    const unsigned *row = (const unsigned *)(const void *)(first + team * 8 * stride);
    b[0] = row[0];
    b[1] = row[1];
    slm_mma_16x8x32(sums.v + 4 * team, a, b);
  }
  return sums;
}
#define SLM_MMA(bits)                                                                          \
  SLM_DEVICE slm_tile slm_mma_##bits(slm_team t, const void *weights, const signed char *rows, \
                                     int stride, slm_tile sums) {                              \
    return slm_mma(t, (const unsigned *)weights, bits, rows, stride, sums);                    \
  }
SLM_MMA(2)
SLM_MMA(4)
SLM_MMA(8)

/* 64 values of k: `weights` and `rows` as slm_mma has them, of the weights two of every four; `places`
 * say which, 2 bits each, a word for 32 values of k. */
SLM_DEVICE slm_tile slm_mma_2of4(slm_team t, const void *weights, const void *places,
                                 const signed char *rows, int stride, slm_tile sums) {
  const int lane = (int)(threadIdx.x % 32), g = lane / 4, c = lane % 4;
  const int channel = g % 4 * 4 + g / 4 * 2;
  const unsigned *own = (const unsigned *)weights + channel;
  const unsigned where = ((const unsigned *)places + channel)[c / 2 * 16 + c % 2];
  unsigned a[4], b[4];
  for (int i = 0; i < 4; ++i) a[i] = own[(i / 2 * 4 + c) * 16 + i % 2];
  const signed char *first = rows - (t.mask == 0xffffu ? 0 : 8 * stride) + g * stride + 4 * c;
  for (int team = 0; team < 2; ++team) {
    const unsigned *row = (const unsigned *)(const void *)(first + team * 8 * stride);
    for (int i = 0; i < 4; ++i) b[i] = row[4 * i];
    slm_mma_sparse_16x8x64(sums.v + 4 * team, a, b, where);
  }
  return sums;
}

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
