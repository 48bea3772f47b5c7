/* Time by kernel, where a model is opened with SLM_PROFILE. */
#ifndef SLM_PROFILE_H
#define SLM_PROFILE_H

#include <stdint.h>

#include "slm.h"

/* Zeroed times of all kernels if `flags` asks for them, else NULL. */
int32_t slm_profile_new(uint32_t flags, slm_kernel_time **profile);

#endif
