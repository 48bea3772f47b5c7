/* SentencePiece's precompiled normalization; slmtvm/text/charsmap.py says what is followed. */
#include <string.h>

#include "text.h"
#include "text_writer.h"

enum { JOINS = 1, PREPENDS = 2, CONTROLS = 4, PICTURES = 8 };
enum { JOINER = 0x200d, SHORT_CLUSTER = 6 };

/* What is written last, held back since a string that becomes nothing is added to it. */
typedef struct {
  slm_writer w;
  uint8_t bytes[4];
  uint32_t count;
  int32_t change;
} held;

static void put(held *h, const uint8_t *bytes, uint32_t count, int32_t change) {
  if (h->count) slm_write_change(&h->w, h->bytes, h->count, h->change);
  if (count) memcpy(h->bytes, bytes, count);
  h->count = count;
  h->change = change;
}

static uint32_t kind_at(const slm_text_step *step, const slm_piece *piece, size_t at,
                        uint32_t *character, uint32_t *size) {
  *character = slm_char_at(piece->bytes + at, size);
  return slm_char_value(&step->map, *character);
}

/* The end of the grapheme cluster that starts at `at` (Unicode Standard Annex 29), as far as clusters of
 * less than 6 bytes depend on it: syllables of Hangul and flags are longer. */
static size_t cluster_end(const slm_text_step *step, const slm_piece *piece, size_t at) {
  uint32_t c, size, next;
  uint32_t kind = kind_at(step, piece, at, &c, &size);
  at += size;
  if (c == '\r' && at < piece->length && piece->bytes[at] == '\n') return at + 1;
  int picture = (kind & PICTURES) != 0;
  while (at < piece->length && !(kind & CONTROLS)) {
    const uint32_t next_kind = kind_at(step, piece, at, &next, &size);
    if (next_kind & CONTROLS) break;
    const int joined = (next_kind & JOINS) || (kind & PREPENDS) ||
                       (picture && c == JOINER && (next_kind & PICTURES));
    if (!joined) break;
    /* Between a picture and the joiner behind it there is no other joiner. */
    if (!(next_kind & JOINS) || c == JOINER) picture = (next_kind & PICTURES) != 0;
    kind = next_kind;
    c = next;
    at += size;
  }
  return at;
}

/* The number + 1 of the string for the shortest start of `bytes` that has one, or 0. */
static uint32_t find(const slm_text_step *step, const uint8_t *bytes, size_t length) {
  uint32_t node = 0;
  for (size_t i = 0; i < length; ++i) {
    const uint32_t *next = slm_pairs_find(&step->pairs, node, bytes[i]);
    if (!next) return 0;
    if (next[1]) return next[1];
    node = next[0];
  }
  return 0;
}

static int32_t characters(const uint8_t *bytes, size_t length) {
  int32_t count = 0;
  for (size_t i = 0; i < length; ++i) count += (bytes[i] & 0xc0) != 0x80;
  return count;
}

/* The string takes the place of `old` characters: the last ones are new, or the last one takes more. */
static void replace(held *h, const slm_text_step *step, uint32_t number, int32_t old) {
  const uint32_t begin = step->strings.ends[number - 1], end = step->strings.ends[number];
  const uint8_t *bytes = step->strings.bytes;
  const int32_t count = characters(bytes + begin, end - begin), more = count - old;
  uint32_t size;
  int32_t i = 0;
  for (uint32_t at = begin; at < end; at += size, ++i) {
    slm_char_at(bytes + at, &size);
    put(h, bytes + at, size, i >= old ? 1 : 0);
  }
  if (more < 0 && h->count) h->change += more;
}

int32_t slm_step_charsmap(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  held h = {.count = 0};
  int32_t code = slm_write_begin(e, step, piece, &h.w);
  if (code != SLM_OK) return code;
  for (size_t at = 0; at < piece->length;) {
    const size_t end = cluster_end(step, piece, at);
    const uint8_t *bytes = piece->bytes + at;
    uint32_t found = end - at < SHORT_CLUSTER ? find(step, bytes, end - at) : 0, size;
    if (found) {
      replace(&h, step, found, characters(bytes, end - at));
      at = end;
      continue;
    }
    for (; at < end; at += size) {
      slm_char_at(piece->bytes + at, &size);
      if ((found = find(step, piece->bytes + at, size)) != 0)
        replace(&h, step, found, 1);
      else
        put(&h, piece->bytes + at, size, 0);
    }
  }
  put(&h, NULL, 0, 0);
  return slm_write_end(e, number, &h.w);
}
