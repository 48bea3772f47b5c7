/* SHA-512 (FIPS 180-4), without allocation: what Ed25519 hashes with. */
#ifndef SLM_SHA512_H
#define SLM_SHA512_H

#include <stddef.h>
#include <stdint.h>

enum { SLM_SHA512_BYTES = 64 };

typedef struct slm_sha512 {
  uint64_t state[8];
  uint64_t bytes; /* so far */
  uint8_t block[128];
} slm_sha512;

void slm_sha512_init(slm_sha512 *hash);
void slm_sha512_update(slm_sha512 *hash, const void *data, size_t bytes);
void slm_sha512_final(slm_sha512 *hash, uint8_t digest[SLM_SHA512_BYTES]);

#endif
