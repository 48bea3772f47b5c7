/* Steps that make another text of a text, and keep where its bytes come from. */
#include <string.h>

#include "error.h"
#include "text.h"
#include "text_writer.h"

static const uint32_t LONGEST = 1u << 31;

int32_t slm_write_begin(slm_encoding *e, const slm_text_step *step, const slm_piece *old,
                        slm_writer *w) {
  *w = (slm_writer){.old = old, .room = (old->length * step->growth + 15) / 16 + step->more};
  if (w->room > LONGEST) return slm_fail(SLM_ERR_ARGUMENT, "a text grows beyond %u bytes", LONGEST);
  w->bytes = slm_work_take(e, w->room);
  w->from = slm_work_take(e, w->room * sizeof *w->from);
  w->to = slm_work_take(e, w->room * sizeof *w->to);
  return w->bytes && w->from && w->to ? SLM_OK : SLM_ERR_MEMORY;
}

int32_t slm_write_overflow(void) {
  return slm_fail(SLM_ERR_TOKENIZER, "tokenizer.bin: a text grows beyond what is said of it");
}

int32_t slm_write_end(slm_encoding *e, uint32_t step, const slm_writer *w) {
  if (w->length > w->room) return slm_write_overflow();
  if (w->length == 0) return SLM_OK;
  slm_piece piece = {.bytes = w->bytes, .length = w->length, .from = w->from, .to = w->to,
                     .base = w->old->base};
  return slm_follow(e, step + 1, &piece);
}

static void write_at(slm_writer *w, const uint8_t *bytes, size_t count, uint32_t from,
                     uint32_t to) {
  for (size_t i = 0; i < count; ++i, ++w->length)
    if (w->length < w->room) {
      w->bytes[w->length] = bytes[i];
      w->from[w->length] = from;
      w->to[w->length] = to;
    }
}

void slm_write_from(slm_writer *w, const uint8_t *bytes, size_t count, size_t source) {
  write_at(w, bytes, count, slm_piece_from(w->old, source), slm_piece_to(w->old, source));
}

void slm_write_change(slm_writer *w, const uint8_t *bytes, size_t count, int32_t change) {
  const slm_piece *old = w->old;
  if (change > 0 && w->at == 0) { /* nothing is before it: an empty place at the start */
    write_at(w, bytes, count, old->base, old->base);
    return;
  }
  const size_t source = change > 0 ? w->at - 1 : w->at;
  slm_write_from(w, bytes, count, source < old->length ? source : old->length - 1);
  uint32_t size;
  for (; change <= 0 && w->at < old->length; ++change, w->at += size)
    slm_char_at(old->bytes + w->at, &size);
}

/* A string for the next character: its first one replaces it, the rest is new. */
static void put_string(slm_writer *w, const uint8_t *bytes, size_t count) {
  uint32_t size = 0;
  for (size_t i = 0; i < count; i += size) {
    slm_char_at(bytes + i, &size);
    slm_write_change(w, bytes + i, size, i == 0 ? 0 : 1);
  }
}

/* The next character as it is. */
static void copy(slm_writer *w, uint32_t size) {
  slm_write_from(w, w->old->bytes + w->at, size, w->at);
  w->at += size;
}

static int32_t map(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  size_t at = 0;
  uint32_t size;
  for (; at < piece->length; at += size)
    if (slm_char_value(&step->map, slm_char_at(piece->bytes + at, &size))) break;
  if (at == piece->length) return slm_follow(e, number + 1, piece); /* nothing to change */
  slm_writer w;
  int32_t code = slm_write_begin(e, step, piece, &w);
  if (code != SLM_OK) return code;
  while (w.at < piece->length) {
    uint32_t value = slm_char_value(&step->map, slm_char_at(piece->bytes + w.at, &size));
    if (!value) {
      copy(&w, size);
      continue;
    }
    const uint32_t *ends = step->strings.ends + (value - 1);
    if (step->choice) { /* around the character */
      const uint8_t *old = piece->bytes + w.at;
      slm_write_change(&w, step->strings.bytes + ends[0], ends[1] - ends[0], 0);
      slm_write_change(&w, old, size, 1);
      slm_write_change(&w, step->strings.bytes + ends[0], ends[1] - ends[0], 1);
    } else if (ends[0] == ends[1]) {
      w.at += size;
    } else {
      put_string(&w, step->strings.bytes + ends[0], ends[1] - ends[0]);
    }
  }
  return slm_write_end(e, number, &w);
}

static int starts_with(const slm_piece *piece, const uint8_t *bytes, size_t count) {
  return piece->length >= count && memcmp(piece->bytes, bytes, count) == 0;
}

static int32_t prepend(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  const uint8_t *string = step->strings.bytes + step->strings.ends[0];
  const size_t count = step->strings.ends[1] - step->strings.ends[0];
  uint32_t size;
  slm_char_at(piece->bytes, &size);
  if (step->choice != SLM_PREPEND_ALWAYS &&
      (starts_with(piece, string, count) ||
       (step->choice == SLM_PREPEND_FIRST && piece->base != 0)))
    return slm_follow(e, number + 1, piece);
  slm_writer w;
  int32_t code = slm_write_begin(e, step, piece, &w);
  if (code != SLM_OK) return code;
  slm_write_from(&w, string, count, 0);
  slm_write_from(&w, piece->bytes, size, 0);
  w.at = size;
  while (w.at < piece->length) {
    slm_char_at(piece->bytes + w.at, &size);
    copy(&w, size);
  }
  return slm_write_end(e, number, &w);
}

static int32_t replace(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  const uint8_t *string = step->strings.bytes + step->strings.ends[0];
  const size_t count = step->strings.ends[1] - step->strings.ends[0];
  slm_writer w;
  int32_t code = slm_write_begin(e, step, piece, &w);
  if (code != SLM_OK) return code;
  while (w.at < piece->length) {
    size_t end = slm_match(&step->automaton, piece, w.at);
    if (end != SLM_NONE && end > w.at) {
      slm_write_from(&w, string, count, end - 1);
      w.at = end;
      continue;
    }
    uint32_t size;
    slm_char_at(piece->bytes + w.at, &size);
    copy(&w, size);
  }
  return slm_write_end(e, number, &w);
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
    case SLM_STEP_NORMALIZE:
      return slm_step_normalize(e, number, piece);
    case SLM_STEP_CHARSMAP:
      return slm_step_charsmap(e, number, piece);
    default:
      return strip(e, number, piece);
  }
}
