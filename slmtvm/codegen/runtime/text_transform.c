/* Steps that make another text of a text, and keep where its bytes come from.
 *
 * The rules of where are those of the reference: a character replaces the next one of the old text and
 * maybe some that follow, or it is new and comes from where the one before it does. */
#include <string.h>

#include "error.h"
#include "text.h"

static const uint32_t LONGEST = 1u << 31;

typedef struct {
  const slm_piece *old;
  size_t at; /* in the old text */
  uint8_t *bytes;
  uint32_t *from, *to;
  size_t length, room;
} writer;

static int32_t start(slm_encoding *e, const slm_text_step *step, const slm_piece *old, writer *w) {
  *w = (writer){.old = old, .room = (old->length * step->growth + 15) / 16 + step->more};
  if (w->room > LONGEST) return slm_fail(SLM_ERR_ARGUMENT, "a text grows beyond %u bytes", LONGEST);
  w->bytes = slm_work_take(e, w->room);
  w->from = slm_work_take(e, w->room * sizeof *w->from);
  w->to = slm_work_take(e, w->room * sizeof *w->to);
  return w->bytes && w->from && w->to ? SLM_OK : SLM_ERR_MEMORY;
}

static int32_t finish(slm_encoding *e, uint32_t step, const writer *w) {
  if (w->length > w->room)
    return slm_fail(SLM_ERR_TOKENIZER, "tokenizer.bin: a text grows beyond what is said of it");
  if (w->length == 0) return SLM_OK;
  slm_piece piece = {.bytes = w->bytes, .length = w->length, .from = w->from, .to = w->to,
                     .base = w->old->base};
  return slm_follow(e, step + 1, &piece);
}

/* Puts `count` bytes that come from where byte `source` of the old text does. */
static void put_from(writer *w, const uint8_t *bytes, size_t count, size_t source) {
  const uint32_t from = slm_piece_from(w->old, source), to = slm_piece_to(w->old, source);
  for (size_t i = 0; i < count; ++i) {
    if (w->length < w->room) {
      w->bytes[w->length] = bytes[i];
      w->from[w->length] = from;
      w->to[w->length] = to;
    }
    ++w->length;
  }
}

/* One character, which replaces one of `old_bytes` at w->at; 0 is a new one. */
static void put(writer *w, const uint8_t *bytes, size_t count, uint32_t old_bytes) {
  size_t source = old_bytes ? w->at : w->at ? w->at - 1 : SLM_NONE;
  if (source == SLM_NONE) {
    /* Nothing is before it: it comes from an empty place at the start. */
    for (size_t i = 0; i < count; ++i, ++w->length)
      if (w->length < w->room) {
        w->bytes[w->length] = bytes[i];
        w->from[w->length] = w->to[w->length] = w->old->base;
      }
    return;
  }
  if (source >= w->old->length) source = w->old->length - 1;
  put_from(w, bytes, count, source);
  w->at += old_bytes;
}

/* A string for the character of `old_bytes`: its first character replaces it, the rest is new. */
static void put_string(writer *w, const uint8_t *bytes, size_t count, uint32_t old_bytes) {
  uint32_t size = 0;
  for (size_t i = 0; i < count; i += size) {
    slm_char_at(bytes + i, &size);
    put(w, bytes + i, size, i == 0 ? old_bytes : 0);
  }
}

static void copy(writer *w, uint32_t size) { put(w, w->old->bytes + w->at, size, size); }

static int32_t map(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  size_t at = 0;
  uint32_t size;
  for (; at < piece->length; at += size)
    if (slm_char_value(&step->map, slm_char_at(piece->bytes + at, &size))) break;
  if (at == piece->length) return slm_follow(e, number + 1, piece); /* nothing to change */
  writer w;
  int32_t code = start(e, step, piece, &w);
  if (code != SLM_OK) return code;
  while (w.at < piece->length) {
    uint32_t value = slm_char_value(&step->map, slm_char_at(piece->bytes + w.at, &size));
    if (!value) {
      copy(&w, size);
      continue;
    }
    const uint32_t *ends = step->strings.ends + (value - 1);
    if (ends[0] == ends[1])
      w.at += size;
    else
      put_string(&w, step->strings.bytes + ends[0], ends[1] - ends[0], size);
  }
  return finish(e, number, &w);
}

static int starts_with(const slm_piece *piece, const uint8_t *bytes, size_t count) {
  return piece->length >= count && memcmp(piece->bytes, bytes, count) == 0;
}

static int32_t prepend(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  const uint8_t *string = step->strings.bytes + step->strings.ends[0];
  const size_t count = step->strings.ends[1] - step->strings.ends[0];
  uint32_t size;
  const uint32_t first = slm_char_at(piece->bytes, &size);
  int skip = 0;
  if (step->choice == SLM_PREPEND_UNLESS_SPACE)
    skip = (slm_char_value(&e->tokenizer->kinds, first) & SLM_KIND_SPACE) != 0;
  else if (step->choice != SLM_PREPEND_ALWAYS)
    skip = starts_with(piece, string, count) ||
           (step->choice == SLM_PREPEND_FIRST && piece->base != 0);
  if (skip) return slm_follow(e, number + 1, piece);
  writer w;
  int32_t code = start(e, step, piece, &w);
  if (code != SLM_OK) return code;
  put_from(&w, string, count, 0);
  put_from(&w, piece->bytes, size, 0);
  w.at = size;
  while (w.at < piece->length) {
    slm_char_at(piece->bytes + w.at, &size);
    copy(&w, size);
  }
  return finish(e, number, &w);
}

static int32_t replace(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  const uint8_t *string = step->strings.bytes + step->strings.ends[0];
  const size_t count = step->strings.ends[1] - step->strings.ends[0];
  writer w;
  int32_t code = start(e, step, piece, &w);
  if (code != SLM_OK) return code;
  while (w.at < piece->length) {
    size_t end = slm_match(&step->automaton, piece, w.at);
    if (end != SLM_NONE && end > w.at) {
      put_from(&w, string, count, end - 1);
      w.at = end;
      continue;
    }
    uint32_t size;
    slm_char_at(piece->bytes + w.at, &size);
    copy(&w, size);
  }
  return finish(e, number, &w);
}

enum { LEFT = 1, RIGHT = 2 };

static int32_t strip(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  const slm_char_map *kinds = &e->tokenizer->kinds;
  size_t begin = 0, end = piece->length;
  uint32_t size;
  if (step->choice & LEFT)
    while (begin < end &&
           (slm_char_value(kinds, slm_char_at(piece->bytes + begin, &size)) & SLM_KIND_SPACE))
      begin += size;
  if (step->choice & RIGHT)
    while (end > begin) {
      size_t at = end - 1;
      while (at > begin && (piece->bytes[at] & 0xc0) == 0x80) --at;
      if (!(slm_char_value(kinds, slm_char_at(piece->bytes + at, &size)) & SLM_KIND_SPACE)) break;
      end = at;
    }
  if (begin == end) return SLM_OK;
  slm_piece part = slm_piece_part(piece, begin, end);
  return slm_follow(e, number + 1, &part);
}

int32_t slm_step_transform(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  switch (e->tokenizer->steps[number].kind) {
    case SLM_STEP_MAP:
      return map(e, number, piece);
    case SLM_STEP_PREPEND:
      return prepend(e, number, piece);
    case SLM_STEP_REPLACE:
      return replace(e, number, piece);
    default:
      return strip(e, number, piece);
  }
}
