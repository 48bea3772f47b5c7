/* How many threads take part in a kind of work: as many as pay at the moment. */
#ifndef SLM_PACE_H
#define SLM_PACE_H

#include <stdint.h>

/* The mean time of a call, of late. */
typedef struct slm_mean {
  double nanoseconds, calls;
} slm_mean;

/* Of work of one kind, such as a step of one row; all times in nanoseconds. */
typedef struct slm_pace {
  int most;        /* threads that there are */
  int threads;     /* that take part, 1 to `most` */
  int chosen;      /* the same, but while another number is tried */
  int settled;     /* whether a smaller number was tried and was no better */
  unsigned downs;  /* trials of smaller numbers */
  slm_mean mean;   /* of calls by `threads` */
  slm_mean before; /* of calls by `chosen`, while another number is tried */
  double computed; /* since `threads` changed */
  double kept;     /* the same of `chosen`, trials left out */
  int64_t begun;   /* when the present call did */
  int64_t lost;    /* lately, beyond what is tolerated */
  int64_t counted; /* when `lost` was last brought up to date */
  int64_t hold;    /* how long no other number is tried */
  int64_t until;   /* till then */
} slm_pace;

/* How often the kernel has taken a thread's core away. */
typedef struct slm_preemptions {
  int64_t checked; /* when that was read */
  int64_t count;
  uintptr_t thread;
} slm_preemptions;

void slm_pace_init(slm_pace *pace, int most);

/* A call, which is a piece of such work, begins. */
void slm_pace_begin(slm_pace *pace, slm_preemptions *preemptions, int64_t now);

/* Its caller waited for a part that another thread had begun, far longer than a part takes. */
void slm_pace_stalled(slm_pace *pace, int64_t nanoseconds, int64_t now);

/* It ended: decides how many threads the next one has. */
void slm_pace_end(slm_pace *pace, int64_t now);

#endif
