/* A few threads that compute one step at a time together with their caller.
 *
 * A step of a small model takes microseconds, so a waiting thread first spins, for a bounded time,
 * and only then sleeps in the kernel. With more threads than cores it does not spin at all: the
 * thread it waits for needs the core. Only pthread_create and pthread_join come from libpthread
 * (weak: see error.c); sleeping is a futex.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "error.h"
#include "slm.h"

#pragma weak pthread_create
#pragma weak pthread_join

enum { CACHE_LINE = 64, SPIN_NANOSECONDS = 100000, PAUSES_PER_CLOCK_READ = 64 };

typedef struct {
  slm_pool *pool;
  int index;
  pthread_t thread;
} worker;

struct slm_pool {
  int threads;
  int64_t spin_nanoseconds;
  pid_t process; /* that has the workers: a child made by fork() has none */
  _Atomic uint32_t lock; /* 0 free, 1 taken, 2 taken and waited for */
  /* Written by the caller for each task, read by the workers: one cache line, one transfer. */
  alignas(CACHE_LINE) _Atomic uint32_t epoch; /* counts tasks; workers wait for it to change */
  _Atomic uint32_t sleeping_workers;
  slm_task task; /* NULL ends the workers */
  void *context;
  /* Written by the workers, read by the caller. Only ever counts up: nobody has to reset it. */
  alignas(CACHE_LINE) _Atomic uint32_t finished; /* tasks that workers have finished, all together */
  _Atomic uint32_t sleeping_caller;
  alignas(CACHE_LINE) worker workers[SLM_MAX_THREADS];
};

static void futex_wait(_Atomic uint32_t *word, uint32_t expected) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#elif defined(__riscv)
  __asm__ volatile(".insn 0x0100000f"); /* pause (Zihintpause); a no-op on older cores */
#endif
}

/* Spins until *word differs from `value`, for at most `nanoseconds`; whether it does. */
static int spin_while(_Atomic uint32_t *word, uint32_t value, int64_t nanoseconds) {
  if (nanoseconds > 0) {
    int64_t end = 0;
    do {
      for (int i = 0; i < PAUSES_PER_CLOCK_READ; ++i) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
        pause_briefly();
      }
      if (end == 0) end = slm_now_nanoseconds() + nanoseconds;
    } while (slm_now_nanoseconds() < end);
  }
  return atomic_load_explicit(word, memory_order_acquire) != value;
}

/* What `finished` becomes when every worker has done the task of `epoch`; both may wrap around. */
static uint32_t all_finished(const slm_pool *pool, uint32_t epoch) {
  return epoch * ((uint32_t)pool->threads - 1);
}

static void *work(void *argument) {
  worker *self = argument;
  slm_pool *pool = self->pool;
  uint32_t seen = 0;
  for (;;) {
    if (!spin_while(&pool->epoch, seen, pool->spin_nanoseconds)) {
      /* The caller advances epoch before it reads sleeping_workers; both sides in one total order
       * (seq_cst), so either it sees this sleeper or the futex sees the new epoch. */
      atomic_fetch_add(&pool->sleeping_workers, 1);
      while (atomic_load(&pool->epoch) == seen) futex_wait(&pool->epoch, seen);
      atomic_fetch_sub(&pool->sleeping_workers, 1);
    }
    ++seen; /* one task at a time: the epoch is exactly one further */
    slm_task task = pool->task;
    if (!task) return NULL;
    task(pool->context, self->index, pool->threads);
    uint32_t finished = atomic_fetch_add(&pool->finished, 1) + 1;
    if (finished == all_finished(pool, seen) && atomic_load(&pool->sleeping_caller))
      futex_wake(&pool->finished, 1);
  }
}

/* Lets the workers run `task`; returns the epoch of it. */
static uint32_t start(slm_pool *pool, slm_task task, void *context) {
  pool->task = task;
  pool->context = context;
  uint32_t epoch = atomic_fetch_add(&pool->epoch, 1) + 1;
  if (atomic_load(&pool->sleeping_workers)) futex_wake(&pool->epoch, SLM_MAX_THREADS);
  return epoch;
}

void slm_pool_run(slm_pool *pool, slm_task task, void *context) {
  if (pool->threads == 1) {
    task(context, 0, 1);
    return;
  }
  uint32_t target = all_finished(pool, start(pool, task, context));
  task(context, 0, pool->threads);
  uint32_t finished;
  while ((finished = atomic_load_explicit(&pool->finished, memory_order_acquire)) != target) {
    if (spin_while(&pool->finished, finished, pool->spin_nanoseconds)) continue;
    atomic_store(&pool->sleeping_caller, 1);
    while ((finished = atomic_load(&pool->finished)) != target)
      futex_wait(&pool->finished, finished);
    atomic_store(&pool->sleeping_caller, 0);
  }
}

int32_t slm_pool_acquire(slm_pool *pool) {
  if (pool->threads == 1) return SLM_OK;
  if (pool->process != getpid())
    return slm_fail(SLM_ERR_BUSY,
                    "the model's worker threads stayed in the process that opened it; "
                    "open it again after fork()");
  /* Drepper, "Futexes Are Tricky", mutex 2. */
  uint32_t found = 0;
  if (atomic_compare_exchange_strong(&pool->lock, &found, 1)) return SLM_OK;
  if (found != 2) found = atomic_exchange(&pool->lock, 2);
  while (found != 0) {
    futex_wait(&pool->lock, 2);
    found = atomic_exchange(&pool->lock, 2);
  }
  return SLM_OK;
}

void slm_pool_release(slm_pool *pool) {
  if (pool->threads == 1) return;
  if (atomic_exchange(&pool->lock, 0) == 2) futex_wake(&pool->lock, 1);
}

int slm_pool_threads(const slm_pool *pool) { return pool->threads; }

static int usable_cores(void) {
  cpu_set_t set;
  long count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                           : sysconf(_SC_NPROCESSORS_ONLN);
  return count < 1 ? 1 : (int)count;
}

static void stop_workers(slm_pool *pool) {
  start(pool, NULL, NULL);
  for (int i = 1; i < pool->threads; ++i) pthread_join(pool->workers[i].thread, NULL);
}

int32_t slm_pool_new(int32_t threads, slm_pool **result) {
  int cores = usable_cores();
  if (threads == 0) threads = cores < SLM_MAX_THREADS ? cores : SLM_MAX_THREADS;
  if (!pthread_create || !pthread_join) threads = 1;
  slm_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool);
  if (!pool) return slm_fail(SLM_ERR_MEMORY, "no memory for the thread pool");
  memset(pool, 0, sizeof *pool);
  pool->threads = 1;
  pool->process = getpid();
  pool->spin_nanoseconds = threads <= cores ? SPIN_NANOSECONDS : 0;

  /* Signals are the application's: its own threads take them, never a worker. */
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, &before);
  int32_t code = SLM_OK;
  for (int i = 1; i < threads && code == SLM_OK; ++i) {
    worker *w = &pool->workers[i];
    w->pool = pool;
    w->index = i;
    int error = pthread_create(&w->thread, NULL, work, w);
    if (error)
      code = slm_fail(SLM_ERR_MEMORY, "cannot start thread %d of %d: %s", i, threads,
                      strerror(error));
    else
      pool->threads = i + 1;
  }
  sigprocmask(SIG_SETMASK, &before, NULL);
  if (code != SLM_OK)
    slm_pool_free(pool);
  else
    *result = pool;
  return code;
}

void slm_pool_free(slm_pool *pool) {
  if (pool->threads > 1 && pool->process == getpid()) stop_workers(pool);
  free(pool);
}
