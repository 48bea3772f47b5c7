/* SHA-256 (FIPS 180-4), without allocation; by the CPU's own instructions where it has them. */
#include "sha256.h"

#include <string.h>

#include "cpu.h"

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static uint32_t big_endian(const uint8_t *p) {
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void blocks_plain(uint32_t state[8], const uint8_t *data, size_t count) {
  for (; count; --count, data += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = big_endian(data + 4 * i);
    for (int i = 16; i < 64; ++i) {
      uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
      uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; ++i) {
      uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i];
      uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
      uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
  }
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Intel's SHA extensions: state as ABEF and CDGH, four rounds at a time. */
__attribute__((target("sha,sse4.1,ssse3"))) static void blocks_fast(uint32_t state[8],
                                                                    const uint8_t *data,
                                                                    size_t count) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bll, 0x0405060700010203ll);
  __m128i dcba = _mm_loadu_si128((const __m128i *)state);
  __m128i hgfe = _mm_loadu_si128((const __m128i *)(state + 4));
  __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1), efgh = _mm_shuffle_epi32(hgfe, 0x1b);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
  for (; count; --count, data += 64) {
    const __m128i old_abef = abef, old_cdgh = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; ++i)
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), swap);
    for (int i = 0; i < 16; ++i) {
      if (i >= 4) {
        __m128i sum = _mm_sha256msg1_epu32(w[0], w[1]);
        sum = _mm_add_epi32(sum, _mm_alignr_epi8(w[3], w[2], 4));
        w[0] = w[1], w[1] = w[2], w[2] = w[3];
        w[3] = _mm_sha256msg2_epu32(sum, w[2]);
      }
      __m128i now = i < 4 ? w[i] : w[3];
      __m128i added = _mm_add_epi32(now, _mm_loadu_si128((const __m128i *)(K + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, added);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(added, 0x0e));
    }
    abef = _mm_add_epi32(abef, old_abef), cdgh = _mm_add_epi32(cdgh, old_cdgh);
  }
  __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

static int is_fast(void) {
  static const char *const needed[] = {"sha_ni", "sse4_1", "ssse3", 0};
  return !slm_cpu_missing(needed);
}
#elif defined(__aarch64__)
#include <arm_neon.h>

/* Arm's Cryptographic Extension: four rounds at a time. */
__attribute__((target("sha2"))) static void blocks_fast(uint32_t state[8], const uint8_t *data,
                                                        size_t count) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; count; --count, data += 64) {
    const uint32x4_t old_abcd = abcd, old_efgh = efgh;
    uint32x4_t w[4];
    for (int i = 0; i < 4; ++i)
      w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
    for (int i = 0; i < 16; ++i) {
      uint32x4_t now = w[0];
      if (i < 12) {
        uint32x4_t next = vsha256su1q_u32(vsha256su0q_u32(w[0], w[1]), w[2], w[3]);
        w[0] = w[1], w[1] = w[2], w[2] = w[3], w[3] = next;
      } else {
        w[0] = w[1], w[1] = w[2], w[2] = w[3];
      }
      uint32x4_t added = vaddq_u32(now, vld1q_u32(K + 4 * i)), before = abcd;
      abcd = vsha256hq_u32(abcd, efgh, added);
      efgh = vsha256h2q_u32(efgh, before, added);
    }
    abcd = vaddq_u32(abcd, old_abcd), efgh = vaddq_u32(efgh, old_efgh);
  }
  vst1q_u32(state, abcd), vst1q_u32(state + 4, efgh);
}

static int is_fast(void) {
  static const char *const needed[] = {"sha2", 0};
  return !slm_cpu_missing(needed);
}
#else
static void blocks_fast(uint32_t state[8], const uint8_t *data, size_t count) {
  blocks_plain(state, data, count);
}

static int is_fast(void) { return 0; }
#endif

static void blocks(slm_sha256 *hash, const uint8_t *data, size_t count) {
  if (hash->fast)
    blocks_fast(hash->state, data, count);
  else
    blocks_plain(hash->state, data, count);
}

void slm_sha256_init(slm_sha256 *hash) {
  static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(hash->state, start, sizeof start);
  hash->bytes = 0;
  hash->fast = is_fast();
}

void slm_sha256_update(slm_sha256 *hash, const void *data, size_t bytes) {
  const uint8_t *next = data;
  size_t held = hash->bytes % 64;
  hash->bytes += bytes;
  if (held) {
    size_t taken = bytes < 64 - held ? bytes : 64 - held;
    memcpy(hash->block + held, next, taken);
    next += taken, bytes -= taken;
    if (held + taken < 64) return;
    blocks(hash, hash->block, 1);
  }
  if (bytes >= 64) blocks(hash, next, bytes / 64);
  if (bytes % 64) memcpy(hash->block, next + bytes / 64 * 64, bytes % 64);
}

void slm_sha256_final(slm_sha256 *hash, uint8_t digest[SLM_SHA256_BYTES]) {
  const uint64_t bits = hash->bytes * 8;
  uint8_t end[72] = {0x80};
  size_t zeros = (119 - hash->bytes % 64) % 64; /* between the mark and the length */
  for (int i = 0; i < 8; ++i) end[1 + zeros + i] = (uint8_t)(bits >> (56 - 8 * i));
  slm_sha256_update(hash, end, 1 + zeros + 8);
  for (int i = 0; i < SLM_SHA256_BYTES; ++i)
    digest[i] = (uint8_t)(hash->state[i / 4] >> (24 - 8 * (i % 4)));
}
