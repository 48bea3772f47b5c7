/* A few threads that compute one step at a time together with their caller.
 *
 * A step is cut into parts, as many for each thread; every thread claims its own parts first, so that
 * block i of a grid meets the same cache in every run, and then what others have not begun. So a
 * thread that the kernel is not running holds nobody up, and the caller waits only for parts that
 * were begun. Where even those waits eat what the threads gain, fewer take part (pace.c).
 *
 * A step of a small model takes microseconds, so a waiting thread first spins, for a bounded time,
 * and only then sleeps in the kernel. Only pthread_create and pthread_join come from libpthread
 * (weak: see error.c); sleeping is a futex.
 *
 * Memory: parts are numbered over all steps. The caller raises a seat's `granted`, which releases what
 * it wrote of the step; who reads it and raises `claimed` below it owns that part. Workers add the
 * parts that they computed to `finished`, which releases what they wrote. The caller grants new parts
 * only when all are finished, when nobody holds a claim. A thread that comes late finds nothing to
 * claim, or parts of a newer step, which are as good.
 *
 * Handing a step over and back costs transfers of cache lines between cores, some 50 ns each, where a
 * step may take 2 us. Two are needed: of what the caller writes to a seat, and of `finished`. So what
 * a worker claims by has a line of its own, which others read only where somebody is late: the caller
 * is patient for a moment before it looks for parts that were not begun, unless there lately were some.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "error.h"
#include "pace.h"
#include "slm.h"

#pragma weak pthread_create
#pragma weak pthread_join

/* Tests define it as a call that takes time at some parts. */
#ifndef SLM_POOL_DELAY
#define SLM_POOL_DELAY(thread, part)
#endif

enum {
  CACHE_LINE = 128, /* two of 64: cores fetch them in pairs, or have lines of 128 */
  SPIN_NANOSECONDS = 50000,
  PAUSES_PER_CLOCK_READ = 64,
  /* A wait that is longer is no difference between threads that all run. */
  STALL_NANOSECONDS = 50000,
  /* Of cores that differ in speed, a fast one takes over what a slow one has not begun. */
  PARTS_OF_MIXED_CORES = 4,
  PATIENT_PAUSES = 32, /* a microsecond or less */
  EAGER_STEPS = 64     /* after one in which a thread was late */
};

/* A thread's place. */
typedef struct {
  /* Written by the caller at each step that the thread may join. */
  alignas(CACHE_LINE) _Atomic uint32_t epoch; /* changes with the step */
  _Atomic uint32_t granted;                   /* its own parts, of all steps; wraps around */
  _Atomic int32_t helps;                      /* threads whose parts it may take over, or 0 */
  _Atomic uint32_t ending;
  int32_t each, parts; /* of the step: parts of a thread, of all */
  slm_task task;
  void *context;
  /* Written by the thread, and by who takes over its parts. */
  alignas(CACHE_LINE) _Atomic uint32_t claimed; /* of the granted ones */
  /* Written by the thread, and by the caller where it wakes it. */
  alignas(CACHE_LINE) _Atomic uint64_t sleeping; /* 1 + the epoch that the thread sleeps in, or 0 */
  /* Not changed while the thread runs. */
  slm_pool *pool;
  int index;
  pthread_t thread;
} seat;

struct slm_pool {
  int threads, each;
  int64_t spin_nanoseconds;
  pid_t process; /* that has the workers: a child made by fork() has none */
  slm_cores cores;
  _Atomic uint32_t lock; /* 0 free, 1 taken, 2 taken and waited for */
  slm_pace *paces; /* by kind of work */
  /* The caller's own. */
  alignas(CACHE_LINE) uint32_t epoch;
  uint32_t wanted; /* what `finished` is to become; both wrap around */
  slm_pace *pace;  /* of the present kind; NULL where all threads always take part */
  slm_preemptions preemptions;
  int eager; /* steps for which nobody is patient */
  alignas(CACHE_LINE) _Atomic uint32_t sleepers; /* workers that sleep, or are about to */
  /* Written by the workers, read by the caller. */
  alignas(CACHE_LINE) _Atomic uint32_t finished; /* parts, of all steps */
  _Atomic uint32_t sleeping_caller;
  seat seats[];
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

/* Spins while *word is `value`, until *deadline, which is `nanoseconds` from the first reading of the
 * clock where it is 0; whether *word differs. */
static int spin_while(_Atomic uint32_t *word, uint32_t value, int64_t nanoseconds,
                      int64_t *deadline) {
  if (nanoseconds > 0) {
    do {
      for (int i = 0; i < PAUSES_PER_CLOCK_READ; ++i) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
        pause_briefly();
      }
      if (*deadline == 0) *deadline = slm_now_nanoseconds() + nanoseconds;
    } while (slm_now_nanoseconds() < *deadline);
  }
  return atomic_load_explicit(word, memory_order_acquire) != value;
}

/* Claims and computes parts of `owner` until none is left; how many it were. */
static uint32_t compute(slm_pool *pool, int thread, int owner) {
  seat *s = &pool->seats[owner];
  uint32_t done = 0;
  for (;;) {
    uint32_t granted = atomic_load_explicit(&s->granted, memory_order_acquire);
    uint32_t claimed = atomic_load_explicit(&s->claimed, memory_order_relaxed);
    /* More are claimed than were granted then, where a step has passed between the two loads. */
    if ((int32_t)(granted - claimed) <= 0) return done;
    if (!atomic_compare_exchange_weak_explicit(&s->claimed, &claimed, claimed + 1,
                                               memory_order_relaxed, memory_order_relaxed))
      continue;
    int part = (owner + 1) * s->each - (int)(granted - claimed);
    SLM_POOL_DELAY(thread, part);
    s->task(s->context, thread, part, s->parts);
    ++done;
  }
}

/* The same of the other `seated` threads, those after this one first. */
static uint32_t compute_others(slm_pool *pool, int thread, int seated) {
  uint32_t done = 0;
  for (int owner = thread + 1; owner < seated; ++owner) done += compute(pool, thread, owner);
  for (int owner = 0; owner < thread && owner < seated; ++owner)
    done += compute(pool, thread, owner);
  return done;
}

static void finish(slm_pool *pool, uint32_t done) {
  if (done == 0) return;
  atomic_fetch_add(&pool->finished, done);
  if (atomic_load(&pool->sleeping_caller)) futex_wake(&pool->finished, 1);
}

/* Sleeps until the seat's epoch is no longer `seen`. The caller advances the epoch before it looks
 * for sleepers, a worker says that it sleeps before it looks at the epoch, both in one total order:
 * one of the two sees the other. */
static void sleep_while(seat *self, uint32_t seen) {
  slm_pool *pool = self->pool;
  atomic_fetch_add(&pool->sleepers, 1);
  for (;;) {
    atomic_store(&self->sleeping, (uint64_t)seen + 1);
    if (atomic_load(&self->epoch) != seen) break;
    futex_wait(&self->epoch, seen);
  }
  atomic_store(&self->sleeping, 0);
  atomic_fetch_sub(&pool->sleepers, 1);
}

static void *work(void *argument) {
  seat *self = argument;
  slm_pool *pool = self->pool;
  slm_cores_bind(&pool->cores);
  uint32_t seen = 0;
  for (;;) {
    int64_t deadline = 0;
    if (!spin_while(&self->epoch, seen, pool->spin_nanoseconds, &deadline)) sleep_while(self, seen);
    seen = atomic_load_explicit(&self->epoch, memory_order_acquire);
    if (atomic_load_explicit(&self->ending, memory_order_relaxed)) return NULL;
    /* The caller may be waiting for these: what others left comes after they are counted. */
    finish(pool, compute(pool, self->index, self->index));
    int helps = atomic_load_explicit(&self->helps, memory_order_relaxed);
    finish(pool, compute_others(pool, self->index, helps));
  }
}

/* Wakes those of the first `seated` threads that sleep. */
static void wake(slm_pool *pool, int seated) {
  if (!atomic_load_explicit(&pool->sleepers, memory_order_relaxed)) return;
  for (int i = 1; i < seated; ++i) {
    seat *s = &pool->seats[i];
    /* Woken once, however many steps pass until the kernel runs it; but not out of a sleep after this
     * very step, from which the next one has to wake it. */
    uint64_t sleeping = atomic_load(&s->sleeping);
    if (sleeping && sleeping != (uint64_t)pool->epoch + 1 &&
        atomic_compare_exchange_strong(&s->sleeping, &sleeping, 0))
      futex_wake(&s->epoch, 1);
  }
}

/* Waits until all parts are finished. */
static void wait(slm_pool *pool) {
  int64_t deadline = 0;
  uint32_t finished;
  while ((finished = atomic_load_explicit(&pool->finished, memory_order_acquire)) != pool->wanted) {
    if (spin_while(&pool->finished, finished, pool->spin_nanoseconds, &deadline)) continue;
    atomic_store(&pool->sleeping_caller, 1);
    while (atomic_load(&pool->finished) == finished) futex_wait(&pool->finished, finished);
    atomic_store(&pool->sleeping_caller, 0);
  }
  if (deadline == 0 || !pool->pace) return;
  int64_t now = slm_now_nanoseconds(), waited = now - (deadline - pool->spin_nanoseconds);
  if (waited > STALL_NANOSECONDS) slm_pace_stalled(pool->pace, waited, now);
}

/* Whether all parts are finished within a moment. */
static int are_finished_soon(slm_pool *pool) {
  for (int i = 0; i < PATIENT_PAUSES; ++i) {
    if (atomic_load_explicit(&pool->finished, memory_order_acquire) == pool->wanted) return 1;
    pause_briefly();
  }
  return 0;
}

/* Takes over what others have not begun. */
static void help(slm_pool *pool, int threads) {
  uint32_t done = compute_others(pool, 0, threads);
  pool->wanted -= done;
  if (done) pool->eager = EAGER_STEPS;
  else if (pool->eager) --pool->eager;
}

/* Grants a thread its parts of a step, of which it has begun `begun`. */
static void grant(slm_pool *pool, int thread, int threads, uint32_t begun, slm_task task,
                  void *context) {
  seat *s = &pool->seats[thread];
  s->task = task;
  s->context = context;
  s->each = pool->each;
  s->parts = threads * pool->each;
  /* Nobody claims of a seat without parts: all before are finished. */
  uint32_t granted = atomic_load_explicit(&s->granted, memory_order_relaxed);
  if (begun) atomic_store_explicit(&s->claimed, granted + begun, memory_order_relaxed);
  atomic_store_explicit(&s->granted, granted + (uint32_t)pool->each, memory_order_release);
}

void slm_pool_run(slm_pool *pool, slm_task task, void *context) {
  int threads = pool->pace ? pool->pace->threads : pool->threads, parts = threads * pool->each;
  if (threads == 1) {
    task(context, 0, 0, 1);
    return;
  }
  int eager = pool->each > 1 || pool->eager;
  ++pool->epoch;
  for (int i = 1; i < threads; ++i) {
    grant(pool, i, threads, 0, task, context);
    atomic_store_explicit(&pool->seats[i].helps, eager ? threads : 0, memory_order_relaxed);
    atomic_store_explicit(&pool->seats[i].epoch, pool->epoch, memory_order_release);
  }
  /* The caller's first part is its own at once; where it has no other, nobody looks at its seat. */
  if (pool->each > 1) grant(pool, 0, threads, 1, task, context);
  wake(pool, threads);
  SLM_POOL_DELAY(0, 0);
  task(context, 0, 0, parts);
  /* Again, for a thread that was about to sleep (see sleep_while): a fence before the first part
   * would wait until the seats have reached the other cores. */
  atomic_thread_fence(memory_order_seq_cst);
  wake(pool, threads);
  pool->wanted += (uint32_t)parts - 1 - (pool->each > 1 ? compute(pool, 0, 0) : 0);
  if (!eager && are_finished_soon(pool)) return;
  help(pool, threads);
  wait(pool);
}

void slm_pool_begin(slm_pool *pool, int kind) {
  if (pool->threads == 1 || pool->cores.all) return;
  pool->pace = &pool->paces[kind];
  slm_pace_begin(pool->pace, &pool->preemptions, slm_now_nanoseconds());
}

void slm_pool_end(slm_pool *pool) {
  if (pool->pace) slm_pace_end(pool->pace, slm_now_nanoseconds());
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

static void stop_workers(slm_pool *pool) {
  ++pool->epoch;
  for (int i = 1; i < pool->threads; ++i) {
    atomic_store_explicit(&pool->seats[i].ending, 1, memory_order_relaxed);
    atomic_store_explicit(&pool->seats[i].epoch, pool->epoch, memory_order_release);
  }
  atomic_thread_fence(memory_order_seq_cst); /* see sleep_while */
  wake(pool, pool->threads);
  for (int i = 1; i < pool->threads; ++i) pthread_join(pool->seats[i].thread, NULL);
}

int32_t slm_pool_new(const slm_cores *cores, int kinds, slm_pool **result) {
  int threads = pthread_create && pthread_join ? cores->threads : 1;
  size_t size = sizeof(slm_pool) + (size_t)threads * sizeof(seat);
  slm_pool *pool = aligned_alloc(CACHE_LINE, size);
  slm_pace *paces = calloc((size_t)kinds, sizeof *paces);
  if (!pool || !paces) {
    free(pool);
    free(paces);
    return slm_fail(SLM_ERR_MEMORY, "no memory for the thread pool");
  }
  memset(pool, 0, size);
  pool->paces = paces;
  pool->threads = 1;
  pool->each = cores->mixed ? PARTS_OF_MIXED_CORES : 1;
  pool->cores = *cores;
  pool->process = getpid();
  pool->spin_nanoseconds = threads <= cores->count ? SPIN_NANOSECONDS : 0;

  /* Signals are the application's: its own threads take them, never a worker. */
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, &before);
  int32_t code = SLM_OK;
  for (int i = 1; i < threads && code == SLM_OK; ++i) {
    seat *s = &pool->seats[i];
    s->pool = pool;
    s->index = i;
    int error = pthread_create(&s->thread, NULL, work, s);
    if (error)
      code = slm_fail(SLM_ERR_MEMORY, "cannot start thread %d of %d: %s", i, threads,
                      strerror(error));
    else
      pool->threads = i + 1;
  }
  sigprocmask(SIG_SETMASK, &before, NULL);
  for (int i = 0; i < kinds; ++i) slm_pace_init(&paces[i], pool->threads);
  if (code != SLM_OK)
    slm_pool_free(pool);
  else
    *result = pool;
  return code;
}

void slm_pool_free(slm_pool *pool) {
  if (pool->threads > 1 && pool->process == getpid()) stop_workers(pool);
  free(pool->paces);
  free(pool);
}
