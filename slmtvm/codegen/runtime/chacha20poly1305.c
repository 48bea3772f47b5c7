/* ChaCha20-Poly1305 (RFC 8439), in portable C: no tables and no branches on what is secret. */
#include "chacha20poly1305.h"

#include <string.h>

enum { BLOCK = 64, LANES = 8 }; /* blocks at a time, side by side: compilers make vectors of them */

static uint32_t load32(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void store32(uint8_t *p, uint32_t v) {
  for (int i = 0; i < 4; ++i) p[i] = (uint8_t)(v >> 8 * i);
}

static void store64(uint8_t *p, uint64_t v) {
  for (int i = 0; i < 8; ++i) p[i] = (uint8_t)(v >> 8 * i);
}

/* ---- ChaCha20 (2.3) ---- */

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));

/* Rotates to ^ from. Vectors go by pointer: by value, their ABI depends on the CPU's features. */
static inline void mix(lanes *to, const lanes *from, int by) {
  lanes v = *to ^ *from;
  *to = v << by | v >> (32 - by);
}

static inline void quarter(lanes *a, lanes *b, lanes *c, lanes *d) {
  *a += *b, mix(d, a, 16);
  *c += *d, mix(b, c, 12);
  *a += *b, mix(d, a, 8);
  *c += *d, mix(b, c, 7);
}

/* LANES blocks of the key stream, from `counter` on. */
static void key_stream(const uint8_t key[32], uint32_t counter, const uint8_t nonce[12],
                       uint8_t out[LANES * BLOCK]) {
  uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  lanes x[16], first[16];
  for (int i = 0; i < 8; ++i) start[4 + i] = load32(key + 4 * i);
  start[12] = counter;
  for (int i = 0; i < 3; ++i) start[13 + i] = load32(nonce + 4 * i);
  for (int i = 0; i < 16; ++i)
    for (int lane = 0; lane < LANES; ++lane)
      first[i][lane] = start[i] + (i == 12 ? (uint32_t)lane : 0);
  memcpy(x, first, sizeof x);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4; ++i) quarter(&x[i], &x[4 + i], &x[8 + i], &x[12 + i]);
    for (int i = 0; i < 4; ++i)
      quarter(&x[i], &x[4 + (i + 1) % 4], &x[8 + (i + 2) % 4], &x[12 + (i + 3) % 4]);
  }
  for (int i = 0; i < 16; ++i) {
    x[i] += first[i];
    for (int lane = 0; lane < LANES; ++lane) store32(out + BLOCK * lane + 4 * i, x[i][lane]);
  }
}

static void apply(const uint8_t key[32], uint32_t counter, const uint8_t nonce[12],
                  const uint8_t *data, size_t bytes, uint8_t *out) {
  uint8_t stream[LANES * BLOCK];
  for (size_t at = 0; at < bytes; at += sizeof stream, counter += LANES) {
    size_t count = bytes - at < sizeof stream ? bytes - at : sizeof stream;
    key_stream(key, counter, nonce, stream);
    for (size_t i = 0; i < count; ++i) out[at + i] = data[at + i] ^ stream[i];
  }
}

/* ---- Poly1305 (2.5): sums modulo 2^130 - 5 in five limbs of 26 bits ---- */

typedef struct {
  uint32_t r[5], h[5], pad[4];
} poly;

static void poly_init(poly *p, const uint8_t key[32]) {
  const uint32_t clamp[5] = {0x3ffffff, 0x3ffff03, 0x3ffc0ff, 0x3f03fff, 0x00fffff};
  memset(p, 0, sizeof *p);
  for (int i = 0; i < 4; ++i) p->r[i] = load32(key + 3 * i) >> 2 * i & clamp[i];
  p->r[4] = load32(key + 12) >> 8 & clamp[4];
  for (int i = 0; i < 4; ++i) p->pad[i] = load32(key + 16 + 4 * i);
}

/* Whole blocks of 16 bytes. */
static void poly_blocks(poly *p, const uint8_t *data, size_t bytes) {
  const uint32_t mask = 0x3ffffff;
  const uint64_t r0 = p->r[0], r1 = p->r[1], r2 = p->r[2], r3 = p->r[3], r4 = p->r[4];
  const uint64_t s1 = r1 * 5, s2 = r2 * 5, s3 = r3 * 5, s4 = r4 * 5;
  uint32_t h0 = p->h[0], h1 = p->h[1], h2 = p->h[2], h3 = p->h[3], h4 = p->h[4];
  for (; bytes >= 16; data += 16, bytes -= 16) {
    h0 += load32(data) & mask;
    h1 += load32(data + 3) >> 2 & mask;
    h2 += load32(data + 6) >> 4 & mask;
    h3 += load32(data + 9) >> 6 & mask;
    h4 += load32(data + 12) >> 8 | 1u << 24;
    uint64_t d0 = h0 * r0 + h1 * s4 + h2 * s3 + h3 * s2 + h4 * s1;
    uint64_t d1 = h0 * r1 + h1 * r0 + h2 * s4 + h3 * s3 + h4 * s2;
    uint64_t d2 = h0 * r2 + h1 * r1 + h2 * r0 + h3 * s4 + h4 * s3;
    uint64_t d3 = h0 * r3 + h1 * r2 + h2 * r1 + h3 * r0 + h4 * s4;
    uint64_t d4 = h0 * r4 + h1 * r3 + h2 * r2 + h3 * r1 + h4 * r0;
    d1 += d0 >> 26, h0 = (uint32_t)d0 & mask;
    d2 += d1 >> 26, h1 = (uint32_t)d1 & mask;
    d3 += d2 >> 26, h2 = (uint32_t)d2 & mask;
    d4 += d3 >> 26, h3 = (uint32_t)d3 & mask;
    h0 += (uint32_t)(d4 >> 26) * 5, h4 = (uint32_t)d4 & mask;
    h1 += h0 >> 26, h0 &= mask;
  }
  p->h[0] = h0, p->h[1] = h1, p->h[2] = h2, p->h[3] = h3, p->h[4] = h4;
}

/* The same with zeros up to a whole block, as the AEAD construction has it (2.8). */
static void poly_padded(poly *p, const void *data, size_t bytes) {
  uint8_t last[16] = {0};
  size_t whole = bytes - bytes % 16;
  poly_blocks(p, data, whole);
  if (whole == bytes) return;
  memcpy(last, (const uint8_t *)data + whole, bytes - whole);
  poly_blocks(p, last, sizeof last);
}

static void poly_final(poly *p, uint8_t tag[16]) {
  const uint32_t mask = 0x3ffffff;
  uint32_t *h = p->h, g[5], carry = 0;
  for (int turn = 0; turn < 2; ++turn) { /* every limb below 2^26 */
    for (int i = 1; i < 5; ++i) h[i] += h[i - 1] >> 26, h[i - 1] &= mask;
    h[0] += (h[4] >> 26) * 5, h[4] &= mask;
  }
  h[1] += h[0] >> 26, h[0] &= mask;
  /* h - (2^130 - 5), and that where it is not negative. */
  carry = 5;
  for (int i = 0; i < 5; ++i) g[i] = h[i] + carry, carry = g[i] >> 26, g[i] &= mask;
  uint32_t take = 0u - carry;
  for (int i = 0; i < 5; ++i) h[i] = (h[i] & ~take) | (g[i] & take);
  const uint32_t words[4] = {h[0] | h[1] << 26, h[1] >> 6 | h[2] << 20, h[2] >> 12 | h[3] << 14,
                             h[3] >> 18 | h[4] << 8};
  uint64_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    sum += (uint64_t)words[i] + p->pad[i];
    store32(tag + 4 * i, (uint32_t)sum);
    sum >>= 32;
  }
}

/* ---- both (2.8) ---- */

int slm_chacha_open(const uint8_t key[SLM_CHACHA_KEY_BYTES],
                    const uint8_t nonce[SLM_CHACHA_NONCE_BYTES], const void *more,
                    size_t more_bytes, const void *data, size_t bytes,
                    const uint8_t tag[SLM_CHACHA_TAG_BYTES], void *out) {
  uint8_t stream[LANES * BLOCK], lengths[16], found[SLM_CHACHA_TAG_BYTES], differ = 0;
  poly p;
  key_stream(key, 0, nonce, stream); /* block 0 is Poly1305's key, the data's blocks begin at 1 */
  poly_init(&p, stream);
  poly_padded(&p, more, more_bytes);
  poly_padded(&p, data, bytes);
  store64(lengths, more_bytes);
  store64(lengths + 8, bytes);
  poly_blocks(&p, lengths, sizeof lengths);
  poly_final(&p, found);
  for (int i = 0; i < SLM_CHACHA_TAG_BYTES; ++i) differ |= (uint8_t)(found[i] ^ tag[i]);
  if (differ) return 0;
  apply(key, 1, nonce, data, bytes, out);
  return 1;
}
