/* How many threads take part in a kind of work: as many as pay at the moment.
 *
 * Where other processes run too, the kernel takes a thread's core away for a time slice of
 * milliseconds, in which a small model computes dozens of tokens. If it is a worker in the middle of its
 * part, the caller sees a stall; if it is the caller, which may have to share a core because a worker
 * has the other, the kernel counts it. A leaky bucket sums both. When it overflows, fewer threads are
 * tried for a few milliseconds, and stay if they take less time for a call. More are tried again
 * after a while, which doubles each time that a trial fails, as senders on a busy network do. So an
 * idle machine sees no trial, but one at the start: some work is too small to share.
 */
#define _GNU_SOURCE
#include "pace.h"

#include <pthread.h>
#include <sys/resource.h>

#pragma weak pthread_self

enum {
  NANOSECONDS_PER_MS = 1000000,
  FIRST_HOLD = 8 * NANOSECONDS_PER_MS,
  LONGEST_HOLD = 512 * NANOSECONDS_PER_MS,
  /* Of computing after which a number that was chosen has proved itself. */
  PROVING_HOLDS = 8,
  /* Computing by which a number of threads is judged: a few time slices. */
  TRIAL = 8 * NANOSECONDS_PER_MS,
  /* Of computing that a mean remembers. */
  MEMORY = 64 * NANOSECONDS_PER_MS,
  UNSETTLED_CALLS = 64,
  GAIN_PERCENT = 104, /* that more threads must bring */
  TOLERATED_PERCENT = 10,
  BUCKET = 3 * NANOSECONDS_PER_MS, /* less than two time slices, more than what interrupts take */
  SLICE = 2 * NANOSECONDS_PER_MS,
  /* What one stall counts at most: a process that was stopped (SIGSTOP, a quota) learns nothing. */
  LONGEST_STALL = 2 * SLICE,
  CHECK_INTERVAL = NANOSECONDS_PER_MS
};

void slm_pace_init(slm_pace *p, int most) {
  *p = (slm_pace){.most = most, .threads = most, .chosen = most, .hold = FIRST_HOLD};
}

static void lose(slm_pace *p, int64_t lost, int64_t now) {
  p->lost -= (now - p->counted) / 100 * TOLERATED_PERCENT;
  if (p->lost < 0) p->lost = 0;
  p->lost += lost;
  p->counted = now;
}

/* How often the kernel has taken the calling thread's core away since this was asked last. */
static int64_t new_preemptions(slm_preemptions *p) {
  struct rusage usage;
  if (getrusage(RUSAGE_THREAD, &usage) != 0) return 0;
  uintptr_t thread = pthread_self ? (uintptr_t)pthread_self() : 0;
  int64_t before = thread == p->thread ? p->count : usage.ru_nivcsw;
  p->thread = thread;
  p->count = usage.ru_nivcsw;
  return usage.ru_nivcsw - before;
}

void slm_pace_begin(slm_pace *p, slm_preemptions *preemptions, int64_t now) {
  p->begun = now;
  if (p->threads == 1) preemptions->thread = 0; /* those of one thread are nobody's fault */
  if (p->threads == 1 || now - preemptions->checked < CHECK_INTERVAL) return;
  preemptions->checked = now;
  int64_t count = new_preemptions(preemptions);
  if (count > 0) lose(p, count * SLICE, now);
}

void slm_pace_stalled(slm_pace *p, int64_t nanoseconds, int64_t now) {
  lose(p, nanoseconds < LONGEST_STALL ? nanoseconds : LONGEST_STALL, now);
}

static double of_a_call(const slm_mean *mean) { return mean->nanoseconds / mean->calls; }

static void add_call(slm_mean *mean, double nanoseconds) {
  mean->nanoseconds += nanoseconds;
  mean->calls += 1;
  if (mean->nanoseconds > MEMORY && mean->calls >= 2) {
    mean->nanoseconds /= 2;
    mean->calls /= 2;
  }
}

static void run_with(slm_pace *p, int threads, int64_t now) {
  p->threads = threads;
  p->mean = (slm_mean){0, 0};
  p->computed = 0;
  p->lost = 0;
  p->counted = now;
}

static void try(slm_pace *p, int threads, int64_t now) {
  p->before = p->mean;
  run_with(p, threads, now);
}

/* One fewer, half or one: with two others at work one fewer may be no better, and half is. */
static int fewer(slm_pace *p) {
  unsigned way = p->downs++ % 3;
  int threads = way == 0 ? p->chosen - 1 : way == 1 ? p->chosen / 2 : 1;
  return threads < 1 ? 1 : threads;
}

/* The number that was tried stays, or the one before comes back. */
static void judge(slm_pace *p, int64_t now) {
  int more = p->threads > p->chosen;
  const slm_mean *large = more ? &p->mean : &p->before, *small = more ? &p->before : &p->mean;
  int pays = of_a_call(small) * 100 >= of_a_call(large) * GAIN_PERCENT;
  int stays = more == pays, proved = p->kept > PROVING_HOLDS * (double)p->hold;
  if (stays && (more || proved))
    p->hold = FIRST_HOLD;
  else if (p->hold < LONGEST_HOLD)
    p->hold *= 2;
  p->until = now + p->hold;
  p->settled = pays;
  if (stays) {
    p->chosen = p->threads;
    p->kept = 0;
    p->lost = 0;
  } else {
    slm_mean mean = p->before;
    run_with(p, p->chosen, now);
    p->mean = mean;
  }
}

void slm_pace_end(slm_pace *p, int64_t now) {
  double nanoseconds = (double)(now - p->begun);
  add_call(&p->mean, nanoseconds);
  p->computed += nanoseconds;
  if (p->threads == p->chosen) p->kept += nanoseconds;
  if (p->computed < TRIAL) return;
  if (p->threads != p->chosen) {
    judge(p, now);
    return;
  }
  if (now < p->until) return;
  int overflow = p->lost > BUCKET || (!p->settled && p->mean.calls >= UNSETTLED_CALLS);
  if (p->threads > 1 && overflow)
    try(p, fewer(p), now);
  else if (p->threads < p->most)
    try(p, p->threads + 1, now);
}
