/* Files of tables, which are read where they are mapped. */
#ifndef SLM_MAPPED_H
#define SLM_MAPPED_H

#include <stddef.h>
#include <stdint.h>

/* Maps the regular file `path`, of 2 GiB at most, to be read; `what` it is of goes into the message.
 * SLM_ERR_FILE where that cannot be. munmap() ends it. */
int32_t slm_map_file(const char *path, const char *what, const uint32_t **words, size_t *bytes);

#endif
