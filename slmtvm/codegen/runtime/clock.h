/* A clock that only goes forward. */
#ifndef SLM_CLOCK_H
#define SLM_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t slm_now_nanoseconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

#endif
