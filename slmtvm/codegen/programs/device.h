/* What the parts of slm-device share. */
#ifndef SLM_DEVICE_H
#define SLM_DEVICE_H

#include <stdint.h>
#include <stdlib.h>

#include "slm.h"

enum { DEVICE_OK, DEVICE_CANNOT = 2, DEVICE_USAGE = 64 };

/* Says what is wrong; DEVICE_CANNOT. */
int device_cannot(const char *what);

/* The whole number that `text` is, in its bounds; ends the program where it is none. */
int32_t device_number(const char *text, int32_t least, int32_t most);

/* Memory that is there; ends the program where it is not. */
void *device_memory(size_t bytes);

/* `count` token ids; every token costs the same, whatever it is. */
int32_t *device_some_tokens(size_t count);

/* Opens the bundle; a negative code where that fails. */
int32_t device_open(const char *bundle, int32_t threads, uint32_t flags, slm_model **model,
                    slm_session **session);

void device_close(slm_model *model, slm_session *session);

/* device_bench.c: arguments behind "load" and "bench". */
int device_load(const char *bundle, int count, char **arguments);
int device_bench(const char *bundle, int count, char **arguments);

/* device_eval.c: those behind "eval". */
int device_eval(const char *bundle, int count, char **arguments);

#endif
