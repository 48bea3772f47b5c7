/* UTF-8, and pieces of text. */
#include "text.h"

uint32_t slm_char_write(uint32_t c, uint8_t *bytes) {
  if (c < 0x80) {
    bytes[0] = (uint8_t)c;
    return 1;
  }
  if (c < 0x800) {
    bytes[0] = (uint8_t)(0xc0 | c >> 6);
    bytes[1] = (uint8_t)(0x80 | (c & 0x3f));
    return 2;
  }
  if (c < 0x10000) {
    bytes[0] = (uint8_t)(0xe0 | c >> 12);
    bytes[1] = (uint8_t)(0x80 | (c >> 6 & 0x3f));
    bytes[2] = (uint8_t)(0x80 | (c & 0x3f));
    return 3;
  }
  bytes[0] = (uint8_t)(0xf0 | c >> 18);
  bytes[1] = (uint8_t)(0x80 | (c >> 12 & 0x3f));
  bytes[2] = (uint8_t)(0x80 | (c >> 6 & 0x3f));
  bytes[3] = (uint8_t)(0x80 | (c & 0x3f));
  return 4;
}

/* The Unicode standard, table 3-7: well-formed sequences, and what of others is one damaged character
 * (section 3.9, "maximal subpart"). */
int slm_char_check(const uint8_t *bytes, size_t length, int more, uint32_t *invalid) {
  uint32_t b = bytes[0];
  *invalid = 1;
  if (b < 0x80) return 1;
  if (b < 0xc2 || b > 0xf4) return 0;
  const int count = b < 0xe0 ? 2 : b < 0xf0 ? 3 : 4;
  uint8_t low = 0x80, high = 0xbf;
  if (b == 0xe0) low = 0xa0;
  if (b == 0xed) high = 0x9f;
  if (b == 0xf0) low = 0x90;
  if (b == 0xf4) high = 0x8f;
  for (int i = 1; i < count; ++i) {
    if ((size_t)i == length) {
      *invalid = (uint32_t)i;
      return more ? -1 : 0;
    }
    if (bytes[i] < low || bytes[i] > high) {
      *invalid = (uint32_t)i;
      return 0;
    }
    low = 0x80;
    high = 0xbf;
  }
  return count;
}

slm_piece slm_piece_part(const slm_piece *piece, size_t begin, size_t end) {
  slm_piece part = *piece;
  part.bytes += begin;
  part.length = end - begin;
  if (piece->from) {
    part.from += begin;
    part.to += begin;
    if (begin < end) part.base = piece->from[begin];
  } else {
    part.base += (uint32_t)begin;
  }
  return part;
}
