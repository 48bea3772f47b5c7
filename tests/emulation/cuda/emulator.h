/* CUDA C++ on a CPU: a fiber for each thread of a block, which meet where a warp's operation names
 * them. Include it before a kernel's text, compile that as C++.
 *
 * It shows indexing, synchronisation (every order of threads must give the same bytes), which threads
 * meet, and all arithmetic; not what a GPU's compiler makes of it.
 */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <setjmp.h>
#include <ucontext.h>

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
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x;
};

namespace emu {

enum { WARP = 32, MAX_THREADS = 1024, SHARED = 48 << 10, GUARD = 4 << 10, STACK = 64 << 10 };
/* Which of the threads that can run runs next: the first, the last, or any, by a seed. */
enum { FORWARD, BACKWARD, RANDOM };

struct Thread {
  uint3 index;
  jmp_buf here;
  ucontext_t start;
  std::vector<char> stack;
  bool started, done;
  const char *waits_at; /* nullptr: can run */
  unsigned mask;
  uint32_t given, taken[WARP];
};

inline std::vector<Thread> threads(MAX_THREADS);
inline std::vector<int> ready;
inline Thread *self;
inline uint3 block, grid, block_size;
inline jmp_buf scheduler;
inline const std::function<void()> *body;
inline uint32_t order, state;
inline char message[256];

/* Ends the launch. */
[[noreturn]] inline void fail(const char *what) {
  std::snprintf(message, sizeof message, "%s (block %u, thread %u)", what, block.x, self->index.x);
  _longjmp(scheduler, 2);
}

__attribute__((noinline)) inline void yield() {
  if (!_setjmp(self->here)) _longjmp(scheduler, 1);
}

/* What the threads of `mask` gave here, by lane of the warp; it returns when all have come. */
inline const uint32_t *meet(unsigned mask, const char *where, uint32_t given) {
  unsigned first = self->index.x / WARP * WARP, arrived = 0;
  if (!(mask >> self->index.x % WARP & 1)) fail("a thread is not in the mask that it names");
  self->waits_at = where;
  self->mask = mask;
  self->given = given;
  for (unsigned i = 0; i < WARP; ++i) {
    Thread &t = threads[first + i];
    if (!(mask >> i & 1)) continue;
    if (first + i >= block_size.x || t.done) fail("waits for a thread that has ended");
    if (!t.waits_at) continue;
    if (t.mask != mask || std::strcmp(t.waits_at, where)) fail("threads meet at different places");
    arrived |= 1u << i;
  }
  if (arrived == mask) {
    for (unsigned i = 0; i < WARP; ++i) {
      if (!(mask >> i & 1)) continue;
      Thread &t = threads[first + i];
      for (unsigned k = 0; k < WARP; ++k) t.taken[k] = threads[first + k].given;
      t.waits_at = nullptr;
      if (&t != self) ready.push_back((int)(first + i));
    }
    ready.push_back((int)self->index.x);
  }
  yield();
  return self->taken;
}

inline void enter() {
  (*body)();
  self->done = true;
  _longjmp(scheduler, 1);
}

/* Takes one of the threads that can run. */
inline int next() {
  size_t at = 0;
  for (size_t i = 1; i < ready.size() && order < RANDOM; ++i)
    if ((ready[i] < ready[at]) == (order == FORWARD)) at = i;
  if (order >= RANDOM) {
    state = state * 1664525u + 1013904223u;
    at = (state >> 8) % ready.size();
  }
  int chosen = ready[at];
  ready.erase(ready.begin() + (long)at);
  return chosen;
}

inline const char *run_block(unsigned index) {
  block.x = index;
  ready.clear();
  for (unsigned i = 0; i < block_size.x; ++i) {
    Thread &t = threads[i];
    t.index.x = i;
    t.started = t.done = false;
    t.waits_at = nullptr;
    if (t.stack.empty()) t.stack.resize(STACK);
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.data();
    t.start.uc_stack.ss_size = t.stack.size();
    t.start.uc_link = nullptr;
    makecontext(&t.start, enter, 0);
    ready.push_back((int)i);
  }
  if (_setjmp(scheduler) == 2) return message;
  if (!ready.empty()) {
    self = &threads[(size_t)next()];
    if (self->started) _longjmp(self->here, 1);
    self->started = true;
    setcontext(&self->start);
  }
  for (unsigned i = 0; i < block_size.x; ++i)
    if (!threads[i].done) return "threads wait for one another";
  return nullptr;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **params, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A> *>(params[I])...);
}

}  // namespace emu

/* Of one block, which runs alone; what lies behind it must stay as it is. */
__align__(16) char slm_shared[emu::SHARED + emu::GUARD];

namespace emu {

/* Runs a kernel as cuLaunchKernel does: `params` holds a pointer to each of its arguments. Returns
 * what went wrong, or nullptr. */
template <class... A>
const char *launch(void (*kernel)(A...), unsigned blocks, unsigned size, size_t shared,
                   void **params) {
  std::function<void()> bound = [&] { call(kernel, params, std::index_sequence_for<A...>{}); };
  if (size == 0 || size > MAX_THREADS || shared > SHARED) return "such a launch is not possible";
  body = &bound;
  grid.x = blocks;
  block_size.x = size;
  state = order;
  for (unsigned i = 0; i < blocks; ++i) {
    std::memset(slm_shared, 0xa5, sizeof slm_shared);
    const char *wrong = run_block(order == BACKWARD ? blocks - 1 - i : i);
    if (wrong) return wrong;
    for (size_t k = shared; k < sizeof slm_shared; ++k)
      if (slm_shared[k] != (char)0xa5) return "shared memory was written behind its end";
  }
  return nullptr;
}

}  // namespace emu

#define threadIdx (emu::self->index)
#define blockIdx (emu::block)
#define blockDim (emu::block_size)
#define gridDim (emu::grid)

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
static inline int __dp4a(int a, int b, int c) {
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
