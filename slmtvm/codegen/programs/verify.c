/* Is a file signed by a trusted key? For devices without openssl.
 *
 *   slm-verify KEYS FILE SIGNATURE
 *
 * KEYS holds Ed25519 public keys in PEM, one or more, SIGNATURE 64 bytes. Ends with 0 where one of the
 * keys made the signature, with 1 where none did, 2 where a file cannot be read, 64 for wrong usage. */
#include <stdio.h>
#include <stdlib.h>

#include "threads.h"
#include "trust.h"

enum { MOST_KEYS_BYTES = 1 << 16, SIGNATURE_BYTES = 64 };

/* The file's content with a 0 behind it; NULL where it cannot be read or has more than `most` bytes. */
static char *read_file(const char *path, size_t most, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  char *text = file ? malloc(most + 2) : NULL;
  if (text) *bytes = fread(text, 1, most + 1, file);
  int wrong = !text || ferror(file) || *bytes > most;
  if (file) fclose(file);
  if (!wrong) {
    text[*bytes] = 0;
    return text;
  }
  fprintf(stderr, "slm-verify: %s: cannot be read, or has more than %zu bytes\n", path, most);
  free(text);
  return NULL;
}

int main(int argc, char **argv) {
  enum { MOST_FILE_BYTES = 16 << 20 };
  size_t bytes = 0, key_bytes = 0, signature_bytes = 0;
  if (argc != 4) {
    fprintf(stderr, "usage: slm-verify KEYS FILE SIGNATURE\n");
    return 64;
  }
  char *keys = read_file(argv[1], MOST_KEYS_BYTES, &key_bytes);
  char *data = keys ? read_file(argv[2], MOST_FILE_BYTES, &bytes) : NULL;
  char *signature = data ? read_file(argv[3], SIGNATURE_BYTES, &signature_bytes) : NULL;
  int result = 2;
  if (signature) {
    int accepted = signature_bytes == SIGNATURE_BYTES
                       ? slm_keys_accept(keys, data, bytes, (const uint8_t *)signature)
                       : 0;
    if (accepted < 0) fprintf(stderr, "slm-verify: %s: no Ed25519 public keys\n", argv[1]);
    result = accepted > 0 ? 0 : accepted == 0 ? 1 : 2;
  }
  free(keys);
  free(data);
  free(signature);
  return result;
}
