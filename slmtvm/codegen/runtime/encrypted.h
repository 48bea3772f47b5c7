/* Weights that are encrypted where they lie. */
#ifndef SLM_ENCRYPTED_H
#define SLM_ENCRYPTED_H

#include <stddef.h>
#include <stdint.h>

enum { SLM_WEIGHTS_KEY_BYTES = 32 };

/* Whether `bytes` of `data` begin as an encrypted weights file does. */
int slm_is_encrypted(const void *data, size_t bytes);

/* The size of an encrypted file that holds `plain` bytes. */
uint64_t slm_encrypted_bytes(uint64_t plain);

/* Decrypts `bytes` of `data`, a file that `path` names, into `plain_bytes` of `plain` with the user's
 * key: SLM_ERR_KEY where it is another one, SLM_ERR_WEIGHTS where the file was changed. */
int32_t slm_decrypt(const char *path, const void *data, size_t bytes,
                    const uint8_t key[SLM_WEIGHTS_KEY_BYTES], void *plain, size_t plain_bytes);

#endif
