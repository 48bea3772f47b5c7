/* The weights file: mapped and checked; copied only where it is encrypted. */
#ifndef SLM_WEIGHTS_H
#define SLM_WEIGHTS_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#include "slm.h"

typedef struct slm_weights_file {
  const void *data; /* as it lies on the disk */
  size_t bytes;
  char path[PATH_MAX];
} slm_weights_file;

/* Maps `bundle`/weights.bin read-only, or fails with the reason. */
int32_t slm_weights_map(const char *bundle, slm_weights_file *file);

void slm_weights_drop(const slm_weights_file *file);

/* Makes *weights of a mapped file, decrypted with the key of `options` where that is needed, or drops it
 * and fails with the reason; `verify`: compare its checksum. */
int32_t slm_weights_take(const slm_weights_file *file, const slm_options *options, int verify,
                         const void **weights);

void slm_weights_unmap(const void *data);

#endif
