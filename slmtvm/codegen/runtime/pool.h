/* A few threads that compute one step at a time together with their caller. */
#ifndef SLM_POOL_H
#define SLM_POOL_H

#include <stdint.h>

typedef struct slm_pool slm_pool;

/* What each thread runs: thread 0 is the caller. */
typedef void (*slm_task)(void *context, int thread, int threads);

enum { SLM_MAX_THREADS = 256 };

/* Starts `threads` - 1 workers; 0 threads means one for each core this process may use. Where
 * threads cannot be had at all (no libpthread loaded), the caller computes alone. */
int32_t slm_pool_new(int32_t threads, slm_pool **pool);
void slm_pool_free(slm_pool *pool);

/* Threads that compute, the caller included. */
int slm_pool_threads(const slm_pool *pool);

/* One caller at a time runs tasks; others wait here. Fails in a child process made by fork(). */
int32_t slm_pool_acquire(slm_pool *pool);
void slm_pool_release(slm_pool *pool);

/* Runs `task` once on each thread; returns when all are done. The pool must be acquired. */
void slm_pool_run(slm_pool *pool, slm_task task, void *context);

#endif
