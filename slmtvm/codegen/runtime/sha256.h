/* SHA-256 (FIPS 180-4), without allocation. */
#ifndef SLM_SHA256_H
#define SLM_SHA256_H

#include <stddef.h>
#include <stdint.h>

enum { SLM_SHA256_BYTES = 32 };

typedef struct slm_sha256 {
  uint32_t state[8];
  uint64_t bytes; /* so far */
  int fast;       /* the CPU has instructions for it */
  uint8_t block[64];
} slm_sha256;

void slm_sha256_init(slm_sha256 *hash);
void slm_sha256_update(slm_sha256 *hash, const void *data, size_t bytes);
void slm_sha256_final(slm_sha256 *hash, uint8_t digest[SLM_SHA256_BYTES]);

#endif
