/* Weights that are encrypted where they lie; slmtvm/bundle/encrypt.py writes the file.
 *
 * It is a header, and then chunks of CHUNK bytes, the last one shorter, each encrypted by
 * ChaCha20-Poly1305 with its tag behind it. The file's own key is HMAC-SHA256(user's key, LABEL | salt),
 * the nonce of a chunk its number, and the header counts for every tag: no chunk can be changed, moved,
 * left out or taken from another file. */
#include "encrypted.h"

#include <string.h>

#include "chacha20poly1305.h"
#include "error.h"
#include "sha256.h"
#include "slm.h"

typedef struct {
  char magic[8];
  uint32_t version;
  uint32_t chunk_bytes;
  uint64_t plain_bytes;
  uint8_t salt[32];
  uint8_t proof[8]; /* of HMAC-SHA256(the file's key, PROOF): tells a wrong key from damage */
} header;

_Static_assert(sizeof(header) == 64, "as it lies in the file");

static const char MAGIC[8] = {'S', 'L', 'M', 'W', 'E', 'N', 'C', '\n'};
static const char LABEL[] = "slmtvm weights", PROOF[] = "slmtvm proof"; /* without their 0 */
enum { VERSION = 1, CHUNK = 1 << 16 };

static void hmac(const uint8_t key[32], const void *first, size_t first_bytes, const void *second,
                 size_t second_bytes, uint8_t out[SLM_SHA256_BYTES]) {
  uint8_t pad[64];
  slm_sha256 hash;
  for (int i = 0; i < 64; ++i) pad[i] = (uint8_t)((i < 32 ? key[i] : 0) ^ 0x36);
  slm_sha256_init(&hash);
  slm_sha256_update(&hash, pad, sizeof pad);
  slm_sha256_update(&hash, first, first_bytes);
  slm_sha256_update(&hash, second, second_bytes);
  slm_sha256_final(&hash, out);
  for (int i = 0; i < 64; ++i) pad[i] ^= 0x36 ^ 0x5c;
  slm_sha256_init(&hash);
  slm_sha256_update(&hash, pad, sizeof pad);
  slm_sha256_update(&hash, out, SLM_SHA256_BYTES);
  slm_sha256_final(&hash, out);
}

int slm_is_encrypted(const void *data, size_t bytes) {
  return bytes >= sizeof(header) && memcmp(data, MAGIC, sizeof MAGIC) == 0;
}

uint64_t slm_encrypted_bytes(uint64_t plain) {
  return sizeof(header) + plain + (plain + CHUNK - 1) / CHUNK * SLM_CHACHA_TAG_BYTES;
}

int32_t slm_decrypt(const char *path, const void *data, size_t bytes,
                    const uint8_t key[SLM_WEIGHTS_KEY_BYTES], void *plain, size_t plain_bytes) {
  const header *h = data;
  uint8_t own[SLM_SHA256_BYTES], proof[SLM_SHA256_BYTES];
  if (h->version != VERSION || h->chunk_bytes != CHUNK)
    return slm_fail(SLM_ERR_WEIGHTS, "%s: encrypted in a way that this library does not know",
                    path);
  if (h->plain_bytes != plain_bytes || bytes != slm_encrypted_bytes(plain_bytes))
    return slm_fail(SLM_ERR_WEIGHTS, "%s: these weights belong to another library: %llu bytes",
                    path, (unsigned long long)h->plain_bytes);
  hmac(key, LABEL, sizeof LABEL - 1, h->salt, sizeof h->salt, own);
  hmac(own, PROOF, sizeof PROOF - 1, "", 0, proof);
  int32_t code = SLM_OK;
  if (memcmp(proof, h->proof, sizeof h->proof) != 0)
    code = slm_fail(SLM_ERR_KEY, "%s: encrypted with another key than the one given", path);
  const uint8_t *in = (const uint8_t *)(h + 1);
  uint8_t *out = plain;
  size_t left = plain_bytes;
  for (uint64_t number = 0; code == SLM_OK && left; ++number) {
    uint8_t nonce[SLM_CHACHA_NONCE_BYTES] = {0};
    size_t count = left < CHUNK ? left : CHUNK;
    memcpy(nonce, &number, sizeof number); /* all targets are little endian */
    if (!slm_chacha_open(own, nonce, h, sizeof *h, in, count, in + count, out))
      code = slm_fail(SLM_ERR_WEIGHTS, "%s: damaged or changed in its piece %llu; copy it again",
                      path, (unsigned long long)number);
    in += count + SLM_CHACHA_TAG_BYTES, out += count, left -= count;
  }
  volatile uint8_t *secret = own;
  for (size_t i = 0; i < sizeof own; ++i) secret[i] = 0;
  return code;
}
