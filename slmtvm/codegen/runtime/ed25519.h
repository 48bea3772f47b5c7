/* Verifying Ed25519 signatures (RFC 8032, section 5.1.7), without allocation. */
#ifndef SLM_ED25519_H
#define SLM_ED25519_H

#include <stddef.h>
#include <stdint.h>

enum { SLM_ED25519_KEY_BYTES = 32, SLM_ED25519_SIGNATURE_BYTES = 64 };

/* 1 where `signature` over the `bytes` of `message` was made with the private key that goes with `key`,
 * else 0; any bytes are safe. How long it takes, about 0.5 ms on a fast core, depends on its arguments, which
 * are public. */
int slm_ed25519_verify(const uint8_t signature[SLM_ED25519_SIGNATURE_BYTES], const void *message,
                       size_t bytes, const uint8_t key[SLM_ED25519_KEY_BYTES]);

#endif
