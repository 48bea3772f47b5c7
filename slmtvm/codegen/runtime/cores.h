/* Which cores this process may really use, and how many threads pay. */
#ifndef SLM_CORES_H
#define SLM_CORES_H

#include <stdint.h>

typedef struct slm_cores {
  int threads; /* that compute, the caller included */
  int count;   /* cores' worth of computing that there is for them */
  int mixed;   /* whether the cores of `set` differ in speed */
  int all;     /* whether all threads take part whatever that costs */
  int pinned;  /* whether threads are to be bound to `set` */
  uint64_t set[16]; /* cpu_set_t, which not every file may name */
  char list[128];   /* `set` in words: "0-3,6" */
  char why[160];    /* what bounds `threads` */
} slm_cores;

/* Chooses for `asked` threads, 0 for as many as pay: no more than cores that the process may run on
 * and than its control group's quota allows, and of cores that differ in speed the fast ones. `list`
 * ("4-7,9") names the cores to use, NULL all. With `all`, as many threads as asked for whatever there
 * is. `root` stands before /proc and /sys, "" but in tests. Fails with SLM_ERR_ARGUMENT where the
 * list is none or names no core that the process may use. */
int32_t slm_cores_choose(int asked, const char *list, int all, const char *root, slm_cores *cores);

/* Binds the calling thread to the set where that is asked for. */
void slm_cores_bind(const slm_cores *cores);

#endif
