/* A few threads that compute one step at a time together with their caller. */
#ifndef SLM_POOL_H
#define SLM_POOL_H

#include <stdint.h>

#include "cores.h"

typedef struct slm_pool slm_pool;

/* Computes part `part` of `parts`, as thread `thread`: the caller is 0. */
typedef void (*slm_task)(void *context, int thread, int part, int parts);

enum { SLM_MAX_THREADS = 256 };

/* Starts workers for the threads that `cores` chose, less the caller, for work of `kinds` kinds. Where
 * threads cannot be had at all (no libpthread loaded), the caller computes alone. */
int32_t slm_pool_new(const slm_cores *cores, int kinds, slm_pool **pool);
void slm_pool_free(slm_pool *pool);

/* Threads that may compute, the caller included. */
int slm_pool_threads(const slm_pool *pool);

/* One caller at a time runs tasks; others wait here. Fails in a child process made by fork(). */
int32_t slm_pool_acquire(slm_pool *pool);
void slm_pool_release(slm_pool *pool);

/* Around all tasks of a piece of work of a kind, 0 to `kinds` - 1: how many threads take part is decided
 * from the time that pieces of that kind take. */
void slm_pool_begin(slm_pool *pool, int kind);
void slm_pool_end(slm_pool *pool);

/* Runs all parts of `task`; returns when they are done. The pool must be acquired. How many parts
 * there are, and which thread computes which, is the pool's to choose. */
void slm_pool_run(slm_pool *pool, slm_task task, void *context);

#endif
