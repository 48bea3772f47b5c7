/* ChaCha20-Poly1305 (RFC 8439), in portable C: no tables and no branches on what is secret. */
#include "chacha20poly1305.h"

#include <string.h>

enum { BLOCK = 64, LANES = 8 }; /* blocks at a time, side by side: compilers make vectors of them */

static uint32_t load32(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t load64(const uint8_t *p) { return load32(p) | (uint64_t)load32(p + 4) << 32; }

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

/* ---- Poly1305 (2.5): sums modulo 2^130 - 5 in limbs of 44, 44 and 42 bits ---- */

__extension__ typedef unsigned __int128 uint128;

static const uint64_t MASK44 = 0xfffffffffff, MASK42 = 0x3ffffffffff;

typedef struct {
  uint64_t r[3], square[3], h[3], pad[2];
} poly;

/* sum += a * b. What has a weight of 2^132, which is 4 * 2^130, counts 20 times with a weight of 1. */
static inline void add_product(uint128 sum[3], const uint64_t a[3], const uint64_t b[3]) {
  const uint64_t b1 = b[1] * 20, b2 = b[2] * 20;
  sum[0] += (uint128)a[0] * b[0] + (uint128)a[1] * b2 + (uint128)a[2] * b1;
  sum[1] += (uint128)a[0] * b[1] + (uint128)a[1] * b[0] + (uint128)a[2] * b2;
  sum[2] += (uint128)a[0] * b[2] + (uint128)a[1] * b[1] + (uint128)a[2] * b[0];
}

/* The same number in limbs of which the second may be some bits longer than 44. */
static inline void carry(uint128 sum[3], uint64_t out[3]) {
  sum[1] += (uint64_t)(sum[0] >> 44);
  sum[2] += (uint64_t)(sum[1] >> 44);
  uint64_t low = ((uint64_t)sum[0] & MASK44) + (uint64_t)(sum[2] >> 42) * 5;
  out[0] = low & MASK44;
  out[1] = ((uint64_t)sum[1] & MASK44) + (low >> 44);
  out[2] = (uint64_t)sum[2] & MASK42;
}

/* A block of 16 bytes and the bit above them. */
static inline void load_block(const uint8_t *data, uint64_t out[3]) {
  uint64_t low = load64(data), high = load64(data + 8);
  out[0] = low & MASK44;
  out[1] = (low >> 44 | high << 20) & MASK44;
  out[2] = high >> 24 | (uint64_t)1 << 40;
}

static void poly_init(poly *p, const uint8_t key[32]) {
  uint64_t low = load64(key) & 0x0ffffffc0fffffff, high = load64(key + 8) & 0x0ffffffc0ffffffc;
  uint128 sum[3] = {0, 0, 0};
  *p = (poly){.r = {low & MASK44, (low >> 44 | high << 20) & MASK44, high >> 24},
              .pad = {load64(key + 16), load64(key + 24)}};
  add_product(sum, p->r, p->r);
  carry(sum, p->square);
}

/* Whole blocks of 16 bytes: two at a time, whose products do not wait for each other. */
static void poly_blocks(poly *p, const uint8_t *data, size_t bytes) {
  uint64_t h[3] = {p->h[0], p->h[1], p->h[2]}, block[3];
  for (; bytes >= 32; data += 32, bytes -= 32) {
    uint128 sum[3] = {0, 0, 0};
    load_block(data, block);
    for (int i = 0; i < 3; ++i) h[i] += block[i];
    load_block(data + 16, block);
    add_product(sum, h, p->square);
    add_product(sum, block, p->r);
    carry(sum, h);
  }
  if (bytes >= 16) {
    uint128 sum[3] = {0, 0, 0};
    load_block(data, block);
    for (int i = 0; i < 3; ++i) h[i] += block[i];
    add_product(sum, h, p->r);
    carry(sum, h);
  }
  memcpy(p->h, h, sizeof h);
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
  uint64_t h0 = p->h[0], h1 = p->h[1], h2 = p->h[2];
  for (int turn = 0; turn < 2; ++turn) { /* every limb within its bits */
    h1 += h0 >> 44, h0 &= MASK44;
    h2 += h1 >> 44, h1 &= MASK44;
    h0 += (h2 >> 42) * 5, h2 &= MASK42;
  }
  h1 += h0 >> 44, h0 &= MASK44;
  /* h - (2^130 - 5), and that where it is not negative. */
  uint64_t g0 = h0 + 5, g1 = h1 + (g0 >> 44), g2 = h2 + (g1 >> 44);
  uint64_t take = 0 - (g2 >> 42);
  h0 = (h0 & ~take) | (g0 & MASK44 & take);
  h1 = (h1 & ~take) | (g1 & MASK44 & take);
  h2 = (h2 & ~take) | (g2 & MASK42 & take);
  uint128 sum = (uint128)(h0 | h1 << 44) + p->pad[0];
  store64(tag, (uint64_t)sum);
  store64(tag + 8, (h1 >> 20 | h2 << 24) + p->pad[1] + (uint64_t)(sum >> 64));
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
