/* Error codes with words. */
#ifndef SLM_ERROR_H
#define SLM_ERROR_H

#include <stdint.h>

/* Keeps the message for slm_last_error() of this thread and returns `code`. */
int32_t slm_fail(int32_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
