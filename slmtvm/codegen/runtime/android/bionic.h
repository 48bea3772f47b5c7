/* Android's C library where it differs from musl, whose headers the runtime is compiled with for it: all
 * else that the runtime uses is the kernel's interface, or the same in both on 64 bits. Comes before any
 * source. */
#ifndef SLM_BIONIC_H
#define SLM_BIONIC_H

#define __errno_location __errno /* the function behind errno */

#include <unistd.h>

#undef _SC_NPROCESSORS_ONLN
#define _SC_NPROCESSORS_ONLN 0x61

#endif
