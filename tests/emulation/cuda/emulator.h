/* CUDA C++ on a CPU: a fiber for each thread of a block, which meet where a warp's operation names
 * them. Include it before a kernel's text, compile that as C++.
 *
 * It shows indexing, synchronisation (every order of threads must give the same bytes), which threads
 * meet, and all arithmetic; not what a GPU's compiler makes of it.
 */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x;
};

namespace emu {

enum { WARP = 32, MAX_THREADS = 1024, SHARED = 48 << 10, GUARD = 4 << 10, STACK = 64 << 10 };
/* Which of the threads that can run runs next: the first, the last, or, by a seed, any (of an odd one),
 * or as long as it can one that is preferred for a while (of an even one). Only by seeds are several
 * blocks of a launch there at once: as many as MAX_THREADS allows. */
enum { FORWARD, BACKWARD, SEED };

struct Block {
  uint3 index;
  unsigned first;           /* of its threads */
  std::vector<char> shared; /* what lies behind its end must stay as it is */
};

struct Thread {
  uint3 index;
  Block *block;
  jmp_buf here;
  ucontext_t start;
  std::vector<char> stack;
  bool started, done;
  const char *waits_at; /* nullptr: can run */
  uint32_t preferred;
  unsigned mask;
  uint32_t given, taken[WARP];
};

inline std::vector<Thread> threads;
inline std::vector<Block> blocks;
inline std::vector<int> ready, spinning;
inline Thread *self;
inline uint3 grid, block_size;
inline jmp_buf scheduler;
inline const std::function<void()> *body;
inline uint32_t order, state;
inline long events; /* what a thread that spins may wait for */
inline char message[256];

/* Ends the launch. */
[[noreturn]] inline void fail(const char *what) {
  std::snprintf(message, sizeof message, "%s (block %u, thread %u)", what, self->block->index.x,
                self->index.x);
  _longjmp(scheduler, 2);
}

__attribute__((noinline)) inline void yield() {
  if (!_setjmp(self->here)) _longjmp(scheduler, 1);
}

/* Lets the others run first. */
inline void spin() {
  spinning.push_back((int)(self - threads.data()));
  yield();
}

/* What the threads of `mask` gave here, by lane of the warp; it returns when all have come. */
inline const uint32_t *meet(unsigned mask, const char *where, uint32_t given) {
  unsigned own = self->index.x / WARP * WARP, first = self->block->first + own, arrived = 0;
  if (!(mask >> self->index.x % WARP & 1)) fail("a thread is not in the mask that it names");
  self->waits_at = where;
  self->mask = mask;
  self->given = given;
  for (unsigned i = 0; i < WARP; ++i) {
    if (!(mask >> i & 1)) continue;
    if (own + i >= block_size.x || threads[first + i].done) fail("waits for a thread that has ended");
    Thread &t = threads[first + i];
    if (!t.waits_at) continue;
    if (t.mask != mask || std::strcmp(t.waits_at, where)) fail("threads meet at different places");
    arrived |= 1u << i;
  }
  if (arrived == mask) {
    for (unsigned i = 0; i < WARP; ++i) {
      if (!(mask >> i & 1)) continue;
      Thread &t = threads[first + i];
      for (unsigned k = 0; k < WARP; ++k)
        if (mask >> k & 1) t.taken[k] = threads[first + k].given;
      t.waits_at = nullptr;
      ready.push_back((int)(first + i));
    }
  }
  yield();
  return self->taken;
}

/* Waits for all threads of the block. */
inline void meet_block() {
  Block &b = *self->block;
  unsigned arrived = 0;
  self->waits_at = "__syncthreads";
  self->mask = 0;
  for (unsigned i = 0; i < block_size.x; ++i) {
    Thread &t = threads[b.first + i];
    if (t.done) fail("waits for a thread that has ended");
    arrived += t.waits_at && !t.mask;
  }
  if (arrived == block_size.x)
    for (unsigned i = 0; i < block_size.x; ++i) {
      threads[b.first + i].waits_at = nullptr;
      ready.push_back((int)(b.first + i));
    }
  yield();
}

inline void enter() {
  (*body)();
  self->done = true;
  ++events;
  _longjmp(scheduler, 1);
}

inline uint32_t any_number() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

/* Whether thread `a` is to run before thread `b`. */
inline bool before(int a, int b) {
  if (order == FORWARD) return a < b;
  if (order == BACKWARD) return a > b;
  return threads[(size_t)a].preferred > threads[(size_t)b].preferred;
}

/* Takes one of the threads that can run. */
inline int next() {
  enum { ONE_OF = 32 };
  size_t at = 0;
  if (order >= SEED && order % 2)
    at = any_number() % ready.size();
  else
    for (size_t i = 1; i < ready.size(); ++i)
      if (before(ready[i], ready[at])) at = i;
  int chosen = ready[at];
  if (order >= SEED && any_number() % ONE_OF == 0) threads[(size_t)chosen].preferred = any_number();
  ready[at] = ready.back();
  ready.pop_back();
  return chosen;
}

/* What follows may happen after what other threads do meanwhile. */
inline void step() {
  enum { ONE_OF = 8 };
  if (order < SEED || any_number() % ONE_OF) return;
  ready.push_back((int)(self - threads.data()));
  yield();
}

/* Runs `count` blocks at once. */
inline const char *run_blocks(const unsigned *which, unsigned count, size_t shared) {
  static long seen;
  static int stuck;
  ready.clear();
  spinning.clear();
  stuck = 0;
  if (threads.size() < count * block_size.x) threads.resize(count * block_size.x);
  blocks.resize(count);
  for (unsigned n = 0; n < count; ++n) {
    blocks[n].index.x = which[n];
    blocks[n].first = n * block_size.x;
    blocks[n].shared.assign(shared + GUARD, (char)0xa5);
  }
  for (unsigned i = 0; i < count * block_size.x; ++i) {
    Thread &t = threads[i];
    t.index.x = i % block_size.x;
    t.block = &blocks[i / block_size.x];
    t.started = t.done = false;
    t.waits_at = nullptr;
    t.preferred = any_number();
    if (t.stack.empty()) t.stack.resize(STACK);
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.data();
    t.start.uc_stack.ss_size = t.stack.size();
    t.start.uc_link = nullptr;
    makecontext(&t.start, enter, 0);
    ready.push_back((int)i);
  }
  if (_setjmp(scheduler) == 2) return message;
  if (ready.empty() && !spinning.empty()) {
    stuck = events == seen ? stuck + 1 : 0;
    seen = events;
    if (stuck > 2) return "threads wait for one another";
    ready.swap(spinning);
  }
  if (!ready.empty()) {
    self = &threads[(size_t)next()];
    if (self->started) _longjmp(self->here, 1);
    self->started = true;
    setcontext(&self->start);
  }
  for (unsigned i = 0; i < count * block_size.x; ++i)
    if (!threads[i].done) return "threads wait for one another";
  for (const Block &b : blocks)
    for (size_t k = shared; k < b.shared.size(); ++k)
      if (b.shared[k] != (char)0xa5) return "shared memory was written behind its end";
  return nullptr;
}

/* Ends the launch of a kernel that touches what is not there, as a GPU does. */
inline void touched(int) { fail("an illegal address"); }

/* While it exists, kernels that touch what is not there do not end the process. */
class Guard {
 public:
  Guard() {
    static char own[32 << 10]; /* a fiber's stack may be what is touched */
    stack_t other = {};
    other.ss_sp = own;
    other.ss_size = sizeof own;
    sigaltstack(&other, &stack_);
    struct sigaction action = {};
    action.sa_handler = touched;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_[0]);
    sigaction(SIGBUS, &action, &before_[1]);
  }
  ~Guard() {
    sigaction(SIGSEGV, &before_[0], nullptr);
    sigaction(SIGBUS, &before_[1], nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  stack_t stack_;
  struct sigaction before_[2];
};

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **params, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A> *>(params[I])...);
}

}  // namespace emu

namespace emu {

/* Runs a kernel as cuLaunchKernel does: `params` holds a pointer to each of its arguments; where
 * `together`, as cuLaunchCooperativeKernel, all blocks at once. Returns what went wrong, or nullptr. */
template <class... A>
const char *launch(void (*kernel)(A...), unsigned count, unsigned size, size_t shared,
                   void **params, bool together) {
  std::function<void()> bound = [&] { call(kernel, params, std::index_sequence_for<A...>{}); };
  if (size == 0 || size > MAX_THREADS || shared > SHARED) return "such a launch is not possible";
  body = &bound;
  grid.x = count;
  block_size.x = size;
  std::vector<unsigned> which(count);
  for (unsigned i = 0; i < count; ++i) which[i] = order == BACKWARD ? count - 1 - i : i;
  for (unsigned i = count; order >= SEED && i > 1; --i)
    std::swap(which[i - 1], which[any_number() % i]);
  Guard guard;
  unsigned at_once = together ? count : order >= SEED ? MAX_THREADS / size : 1;
  const char *wrong = nullptr;
  for (unsigned i = 0; i < count && !wrong; i += at_once)
    wrong = run_blocks(&which[i], std::min(at_once, count - i), shared);
  return wrong;
}

/* Bytes of each of a kernel's arguments; how many there are. */
template <class... A>
int sizes(void (*)(A...), size_t *to) {
  size_t own[] = {sizeof(A)...};
  std::memcpy(to, own, sizeof own);
  return (int)sizeof...(A);
}

}  // namespace emu

#define slm_shared (emu::self->block->shared.data())
#define threadIdx (emu::self->index)
#define blockIdx (emu::self->block->index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid)

#define __noinline__ __attribute__((noinline))
static inline void __syncthreads() { emu::meet_block(); }
static inline void __threadfence() {}
static inline unsigned atomicAdd(unsigned *at, unsigned value) {
  ++emu::events;
  return std::exchange(*at, *at + value);
}
static inline unsigned slm_poll(const unsigned *at) {
  emu::spin();
  return *at;
}
static inline void __syncwarp(unsigned mask) { emu::meet(mask, "__syncwarp", 0); }
template <class T> T __shfl_sync(unsigned mask, T value, int from, int width) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t *all = emu::meet(mask, "__shfl_sync", bits);
  int lane = (int)(emu::self->index.x % emu::WARP);
  int source = lane / width * width + (from & (width - 1));
  if (!(mask >> source & 1)) emu::fail("a lane is read that is not in the mask");
  std::memcpy(&value, &all[source], sizeof value);
  return value;
}
/* The tensor cores' product of signed bytes, 16 by 32 and 32 by 8: what each lane gave, then its sums. */
static inline void slm_mma_16x8x32(int *d, const unsigned *a, const unsigned *b) {
  uint32_t all[6][emu::WARP];
  for (int r = 0; r < 6; ++r)
    std::memcpy(all[r], emu::meet(~0u, "mma", r < 4 ? a[r] : b[r - 4]), sizeof all[r]);
  int lane = (int)(emu::self->index.x % emu::WARP);
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      int from = k % 16 / 4, half = k / 16, byte = k % 4 * 8;
      int left = (int8_t)(all[half * 2 + row / 8][row % 8 * 4 + from] >> byte);
      int right = (int8_t)(all[4 + half][column * 4 + from] >> byte);
      d[i] += left * right;
    }
  }
}
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned from) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned byte = from >> 4 * i & 7;
    result |= (byte < 4 ? low >> 8 * byte : high >> 8 * (byte - 4)) << 24 >> (24 - 8 * i);
  }
  return result;
}
/* The same of a left side of which two of every four are given, with their places. */
static inline void slm_mma_sparse_16x8x64(int *d, const unsigned *a, const unsigned *b, unsigned e) {
  uint32_t all[9][emu::WARP];
  for (int r = 0; r < 9; ++r)
    std::memcpy(all[r], emu::meet(~0u, "mma.sp", r < 4 ? a[r] : r < 8 ? b[r - 4] : e), sizeof all[r]);
  int lane = (int)(emu::self->index.x % emu::WARP);
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int four = 0; four < 16; ++four) { /* columns 4 * four to 4 * four + 3 of the left side */
      uint32_t places = all[8][row % 8 * 4 + four / 8 * 2 + row / 8] >> four % 8 * 4;
      if ((places & 3) >= (places >> 2 & 3)) emu::fail("places of a sparse operand are not in order");
      for (int n = 0; n < 2; ++n) {
        int k = four * 4 + (int)(places >> 2 * n & 3), given = four * 2 + n;
        int left = (int8_t)(all[given / 16 * 2 + row / 8][row % 8 * 4 + given % 16 / 4] >> given % 4 * 8);
        int right = (int8_t)(all[4 + k / 16][column * 4 + k % 16 / 4] >> k % 4 * 8);
        d[i] += left * right;
      }
    }
  }
}
static inline int slm_dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
  return c;
}
static inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline float slm_widen(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return (float)half;
}
static inline unsigned short slm_narrow(float value) {
  _Float16 half = (_Float16)value;
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

#endif
