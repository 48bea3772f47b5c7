/* The last error message of each thread.
 *
 * A thread-local variable of a shared library would need __tls_get_addr, which is not in libc but in
 * the dynamic loader, or a place in the loader's small static TLS block. A pthread key needs neither.
 * Before glibc 2.34 it lives in libpthread: where that is not loaded there is one thread only, and
 * one static buffer does.
 */
#include "error.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "slm.h"

#pragma weak pthread_key_create
#pragma weak pthread_key_delete
#pragma weak pthread_getspecific
#pragma weak pthread_setspecific

enum { MESSAGE_BYTES = 512 };

static int have_key;
static pthread_key_t key;
static char single_thread_message[MESSAGE_BYTES];

__attribute__((constructor)) static void make_key(void) {
  /* The destructor is libc's own free: it outlives this library when a thread ends after dlclose. */
  have_key = pthread_key_create && pthread_key_create(&key, free) == 0;
}

__attribute__((destructor)) static void drop_key(void) {
  if (!have_key) return;
  free(pthread_getspecific(key));
  pthread_key_delete(key);
}

static char *message(void) {
  if (!have_key) return single_thread_message;
  char *text = pthread_getspecific(key);
  if (!text) {
    text = calloc(1, MESSAGE_BYTES);
    if (text && pthread_setspecific(key, text) != 0) {
      free(text);
      text = NULL;
    }
  }
  return text;
}

int32_t slm_fail(int32_t code, const char *format, ...) {
  char *text = message();
  if (text) {
    va_list values;
    va_start(values, format);
    vsnprintf(text, MESSAGE_BYTES, format, values);
    va_end(values);
  }
  return code;
}

const char *slm_last_error(void) {
  const char *text = message();
  return text ? text : "no memory for an error message";
}
