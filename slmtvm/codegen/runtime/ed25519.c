/* Verifying Ed25519 signatures (RFC 8032): points in extended coordinates, numbers modulo
 * p = 2^255 - 19 in five limbs of 51 bits. Nothing here is secret, so that time may depend on it. */
#include "ed25519.h"

#include <string.h>

#include "sha512.h"

typedef unsigned __int128 wide;
typedef uint64_t number[5]; /* below 2^52 each, not reduced fully */

typedef struct {
  number x, y, z, t; /* x / z, y / z, and t = x * y / z */
} point;

static const uint64_t MASK = ((uint64_t)1 << 51) - 1;
static const number ONE = {1};
/* d = -121665 / 121666 of the curve, twice d, and a square root of -1. */
static const number D = {0x34dca135978a3, 0x1a8283b156ebd, 0x5e7a26001c029, 0x739c663a03cbb,
                         0x52036cee2b6ff};
static const number TWICE_D = {0x69b9426b2f159, 0x35050762add7a, 0x3cf44c0038052, 0x6738cc7407977,
                               0x2406d9dc56dff};
static const number ROOT = {0x61b274a0ea0b0, 0x0d5a5fc8f189d, 0x7ef5e9cbd0c60, 0x78595a6804c9e,
                            0x2b8324804fc1d};
/* The base point B, encoded: y = 4 / 5, x even. */
static const uint8_t BASE[32] = {0x58, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
                                 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
                                 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66};
/* L, the order of B, from the lowest word. */
static const uint64_t ORDER[4] = {0x5812631a5cf5d3ed, 0x14def9dea2f79cd6, 0, 0x1000000000000000};

static void carry(number r) {
  for (int i = 0; i < 4; ++i) r[i + 1] += r[i] >> 51, r[i] &= MASK;
  r[0] += 19 * (r[4] >> 51), r[4] &= MASK;
  r[1] += r[0] >> 51, r[0] &= MASK;
}

static void add(number r, const number a, const number b) {
  for (int i = 0; i < 5; ++i) r[i] = a[i] + b[i];
  carry(r);
}

static void subtract(number r, const number a, const number b) {
  /* 4 p is added, so that no limb becomes negative. */
  const uint64_t low = ((uint64_t)1 << 53) - 76, other = ((uint64_t)1 << 53) - 4;
  for (int i = 0; i < 5; ++i) r[i] = a[i] + (i ? other : low) - b[i];
  carry(r);
}

static void multiply(number r, const number a, const number b) {
  wide sums[5] = {0};
  for (int i = 0; i < 5; ++i)
    for (int j = 0; j < 5; ++j)
      sums[(i + j) % 5] += (wide)a[i] * (i + j < 5 ? b[j] : 19 * b[j]);
  wide over = 0;
  for (int i = 0; i < 5; ++i) {
    sums[i] += over;
    r[i] = (uint64_t)sums[i] & MASK;
    over = sums[i] >> 51;
  }
  wide first = r[0] + 19 * over;
  r[0] = (uint64_t)first & MASK;
  r[1] += (uint64_t)(first >> 51);
}

/* a to the power of 2^255 - 21 (invert: p - 2) or 2^252 - 3 ((p - 5) / 8). */
static void power(number r, const number a, int bits, int low) {
  number base, result;
  memcpy(base, a, sizeof base);
  memcpy(result, ONE, sizeof result);
  for (int i = bits - 1; i >= 0; --i) {
    multiply(result, result, result);
    /* All bits are ones but the lowest, which are those of 2^8 - `low`. */
    if (i >= 8 || (256 - low) >> i & 1) multiply(result, result, base);
  }
  memcpy(r, result, sizeof result);
}

static void invert(number r, const number a) { power(r, a, 255, 21); }

static void encode(uint8_t bytes[32], const number a) {
  number r;
  memcpy(r, a, sizeof r);
  carry(r);
  carry(r);
  /* Now r < 2^255 with small excess: subtract p where r >= p, that is where r + 19 overflows. */
  uint64_t over = 19;
  for (int i = 0; i < 5; ++i) over = (r[i] + over) >> 51;
  r[0] += 19 * over;
  for (int i = 0; i < 4; ++i) r[i + 1] += r[i] >> 51, r[i] &= MASK;
  r[4] &= MASK;
  memset(bytes, 0, 32);
  for (int bit = 0; bit < 255; ++bit)
    bytes[bit / 8] |= (uint8_t)((r[bit / 51] >> bit % 51 & 1) << bit % 8);
}

static int equal(const number a, const number b) {
  uint8_t left[32], right[32];
  encode(left, a);
  encode(right, b);
  return memcmp(left, right, sizeof left) == 0;
}

/* The point that `bytes` encode (section 5.1.3); 0 where they are no point, or not its only
 * encoding. */
static int decode(point *p, const uint8_t bytes[32]) {
  static const number zero = {0};
  uint8_t canonical[32];
  int odd = bytes[31] >> 7;
  memset(p->y, 0, sizeof p->y);
  for (int bit = 0; bit < 255; ++bit)
    p->y[bit / 51] |= (uint64_t)(bytes[bit / 8] >> bit % 8 & 1) << bit % 51;
  encode(canonical, p->y);
  canonical[31] |= (uint8_t)(odd << 7);
  if (memcmp(canonical, bytes, sizeof canonical) != 0) return 0;
  number u, v, v3, x;
  multiply(u, p->y, p->y);
  multiply(v, u, D);
  subtract(u, u, ONE); /* u = y^2 - 1 */
  add(v, v, ONE);      /* v = d y^2 + 1 */
  multiply(v3, v, v);
  multiply(v3, v3, v);
  multiply(x, v3, v3);
  multiply(x, x, v);
  multiply(x, x, u);
  power(x, x, 252, 3);
  multiply(x, x, v3);
  multiply(x, x, u); /* u v^3 (u v^7)^((p - 5) / 8) */
  number square, negative;
  multiply(square, x, x);
  multiply(square, square, v);
  subtract(negative, zero, u);
  if (equal(square, negative))
    multiply(x, x, ROOT);
  else if (!equal(square, u))
    return 0;
  if (equal(x, zero) && odd) return 0;
  encode(canonical, x);
  if ((canonical[0] & 1) != odd) subtract(x, zero, x);
  memcpy(p->x, x, sizeof x);
  memcpy(p->z, ONE, sizeof p->z);
  multiply(p->t, p->x, p->y);
  return 1;
}

/* Section 5.1.4; holds for equal points and for the neutral one as well. */
static void add_points(point *r, const point *p, const point *q) {
  number a, b, c, d, e, f, g, h;
  subtract(a, p->y, p->x);
  subtract(b, q->y, q->x);
  multiply(a, a, b);
  add(b, p->y, p->x);
  add(c, q->y, q->x);
  multiply(b, b, c);
  multiply(c, p->t, q->t);
  multiply(c, c, TWICE_D);
  multiply(d, p->z, q->z);
  add(d, d, d);
  subtract(e, b, a);
  subtract(f, d, c);
  add(g, d, c);
  add(h, b, a);
  multiply(r->x, e, f);
  multiply(r->y, g, h);
  multiply(r->z, f, g);
  multiply(r->t, e, h);
}

static void negate(point *p) {
  static const number zero = {0};
  subtract(p->x, zero, p->x);
  subtract(p->t, zero, p->t);
}

static int at_least_order(const uint64_t a[4]) {
  for (int i = 3; i >= 0; --i)
    if (a[i] != ORDER[i]) return a[i] > ORDER[i];
  return 1;
}

/* The 512 bits of `digest`, little endian, modulo L. */
static void reduce(uint64_t r[4], const uint8_t digest[64]) {
  memset(r, 0, 4 * sizeof *r);
  for (int bit = 511; bit >= 0; --bit) {
    for (int i = 3; i > 0; --i) r[i] = r[i] << 1 | r[i - 1] >> 63; /* r < L < 2^253 */
    r[0] = r[0] << 1 | (digest[bit / 8] >> bit % 8 & 1);
    if (!at_least_order(r)) continue;
    uint64_t borrow = 0;
    for (int i = 0; i < 4; ++i) {
      wide difference = (wide)r[i] - ORDER[i] - borrow;
      r[i] = (uint64_t)difference;
      borrow = (uint64_t)(difference >> 64) & 1;
    }
  }
}

int slm_ed25519_verify(const uint8_t signature[SLM_ED25519_SIGNATURE_BYTES], const void *message,
                       size_t bytes, const uint8_t key[SLM_ED25519_KEY_BYTES]) {
  uint64_t s[4] = {0}, k[4];
  for (int i = 0; i < 32; ++i) s[i / 8] |= (uint64_t)signature[32 + i] << 8 * (i % 8);
  if (at_least_order(s)) return 0; /* else S and S + L would both sign a message */
  point sums[4]; /* by the bits of s and k: none, B, -A, B - A */
  if (!decode(&sums[1], BASE) || !decode(&sums[2], key)) return 0;
  negate(&sums[2]);
  add_points(&sums[3], &sums[1], &sums[2]);

  slm_sha512 hash;
  uint8_t digest[SLM_SHA512_BYTES];
  slm_sha512_init(&hash);
  slm_sha512_update(&hash, signature, 32);
  slm_sha512_update(&hash, key, SLM_ED25519_KEY_BYTES);
  slm_sha512_update(&hash, message, bytes);
  slm_sha512_final(&hash, digest);
  reduce(k, digest);

  point r = {.y = {1}, .z = {1}}; /* becomes s B - k A */
  for (int bit = 252; bit >= 0; --bit) {
    add_points(&r, &r, &r);
    int which = (int)(s[bit / 64] >> bit % 64 & 1) | (int)(k[bit / 64] >> bit % 64 & 1) << 1;
    if (which) add_points(&r, &r, &sums[which]);
  }
  number x, y, z;
  uint8_t encoded[32], parity[32];
  invert(z, r.z);
  multiply(x, r.x, z);
  multiply(y, r.y, z);
  encode(encoded, y);
  encode(parity, x);
  encoded[31] |= (uint8_t)(parity[0] << 7);
  return memcmp(encoded, signature, sizeof encoded) == 0;
}
