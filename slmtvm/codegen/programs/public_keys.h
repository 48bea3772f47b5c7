/* Public keys that a bundle's signature is checked by, for programs: PEM text of a file. */
#ifndef SLM_PROGRAMS_PUBLIC_KEYS_H
#define SLM_PROGRAMS_PUBLIC_KEYS_H

#include <stdio.h>
#include <stdlib.h>

enum { MOST_KEYS_BYTES = 64 << 10 };

/* The content of `path`, to be freed; NULL where it is empty or cannot be read. */
static char *read_keys(const char *path) {
  FILE *file = fopen(path, "rb");
  char *text = file ? calloc(1, MOST_KEYS_BYTES + 1) : NULL;
  size_t count = text ? fread(text, 1, MOST_KEYS_BYTES, file) : 0;
  if (file) fclose(file);
  if (count) return text;
  free(text);
  return NULL;
}

#endif
