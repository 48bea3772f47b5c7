/* What a static program needs so that the runtime has threads: it refers to them weakly, and weak names
 * take nothing out of an archive. Include it in one file of the program. */
#ifndef SLM_PROGRAMS_THREADS_H
#define SLM_PROGRAMS_THREADS_H

#include <pthread.h>

__attribute__((used)) static void *const slm_threads_linked[] = {
    (void *)pthread_create,      (void *)pthread_join,       (void *)pthread_self,
    (void *)pthread_key_create,  (void *)pthread_key_delete, (void *)pthread_getspecific,
    (void *)pthread_setspecific,
};

#endif
