/* ChaCha20-Poly1305 (RFC 8439): whether data is what was encrypted with a key, and what it says. */
#ifndef SLM_CHACHA20POLY1305_H
#define SLM_CHACHA20POLY1305_H

#include <stddef.h>
#include <stdint.h>

enum { SLM_CHACHA_KEY_BYTES = 32, SLM_CHACHA_NONCE_BYTES = 12, SLM_CHACHA_TAG_BYTES = 16 };

/* Decrypts `bytes` of `data`, at most 256 GB, into `out`, which is another place, and returns 1; where
 * `tag` is not that of the key, nonce, `more` and data, returns 0 and writes nothing. Time does not
 * depend on what is secret. */
int slm_chacha_open(const uint8_t key[SLM_CHACHA_KEY_BYTES],
                    const uint8_t nonce[SLM_CHACHA_NONCE_BYTES], const void *more,
                    size_t more_bytes, const void *data, size_t bytes,
                    const uint8_t tag[SLM_CHACHA_TAG_BYTES], void *out);

#endif
