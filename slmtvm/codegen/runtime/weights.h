/* The weights file: mapped, checked, never copied. */
#ifndef SLM_WEIGHTS_H
#define SLM_WEIGHTS_H

#include <stdint.h>

/* Maps `bundle`/weights.bin read-only into *data, or fails with the reason. */
int32_t slm_weights_map(const char *bundle, int verify, const void **data);

void slm_weights_unmap(const void *data);

#endif
