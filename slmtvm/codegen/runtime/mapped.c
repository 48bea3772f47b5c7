/* Files of tables, which are read where they are mapped. */
#define _GNU_SOURCE
#include "mapped.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "slm.h"

int32_t slm_map_file(const char *path, const char *what, const uint32_t **words, size_t *bytes) {
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return slm_fail(SLM_ERR_FILE, "%s: cannot open: %s", path, strerror(errno));
  struct stat status;
  void *mapped = MAP_FAILED;
  int32_t code = SLM_OK;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size <= 0 ||
      status.st_size > INT32_MAX)
    code = slm_fail(SLM_ERR_FILE, "%s: not a regular file of a %s's size", path, what);
  else if ((mapped = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, file, 0)) ==
           MAP_FAILED)
    code = slm_fail(SLM_ERR_FILE, "%s: cannot map: %s", path, strerror(errno));
  close(file);
  if (code != SLM_OK) return code;
  *words = mapped;
  *bytes = (size_t)status.st_size;
  return SLM_OK;
}
