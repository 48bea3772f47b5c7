/* slm_tokenize: a text through the steps, the model and the template. */
#include <string.h>

#include "error.h"
#include "text.h"

enum { REPLACEMENT_BYTES = 3 };
static const uint8_t REPLACEMENT[REPLACEMENT_BYTES] = {0xef, 0xbf, 0xbd}; /* U+FFFD */
static const uint32_t MOST_BYTES = 1u << 30;
enum {
  PLACE_BYTES = 1 + 2 * sizeof(uint32_t), /* a byte of a text that was changed, and its places */
  MARK_BYTES = 16,                        /* a character while combining marks are put in order */
  MODEL_BYTES = 48,                       /* most work space of a model for a byte of a word */
  PADDING = 64,
  LEAST_KNOWN = 16, MOST_KNOWN = 4096, /* words that are remembered, of 64 bytes each: */
  BYTES_FOR_KNOWN = 64                 /* one for so much of a text */
};

void *slm_work_take(slm_encoding *e, size_t bytes) {
  const size_t begin = (e->work_used + 7) & ~(size_t)7;
  if (begin > e->work_bytes || bytes > e->work_bytes - begin) {
    slm_fail(SLM_ERR_MEMORY, "the work space of %zu bytes is too small: slm_tokenize_bytes()",
             e->work_bytes);
    return NULL;
  }
  e->work_used = begin + bytes;
  return e->work + begin;
}

/* How many words a text of so many bytes may remember; 0: it is too short for words to come again. */
static size_t known_words(const slm_tokenizer *t, size_t bytes) {
  size_t count = LEAST_KNOWN;
  if (t->model != SLM_MODEL_BPE || bytes < LEAST_KNOWN * BYTES_FOR_KNOWN) return 0;
  while (count < MOST_KNOWN && 2 * count * BYTES_FOR_KNOWN <= bytes) count *= 2;
  return count;
}

static int32_t begin_known(slm_encoding *e, size_t bytes) {
  const size_t count = known_words(e->tokenizer, bytes);
  e->known = NULL;
  if (!count) return SLM_OK;
  e->known = slm_work_take(e, count * sizeof *e->known);
  if (!e->known) return SLM_ERR_MEMORY;
  e->known_mask = (uint32_t)count - 1;
  for (size_t i = 0; i < count; ++i) e->known[i].length = 0;
  return SLM_OK;
}

int64_t slm_tokenize_bytes(const slm_tokenizer *t, size_t bytes) {
  if (!t || t->mark != SLM_TEXT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open");
  if (bytes > MOST_BYTES)
    return slm_fail(SLM_ERR_ARGUMENT, "a text of %zu bytes; at most %u", bytes, MOST_BYTES);
  double length = (double)bytes * REPLACEMENT_BYTES; /* all of it may be damaged */
  double sum = length * PLACE_BYTES + PADDING +
               (double)(known_words(t, bytes) * sizeof(slm_known_word)) + PADDING;
  for (uint32_t i = 0; i < t->step_count; ++i) {
    if (t->steps[i].growth == 0) continue;
    length = length * t->steps[i].growth / 16 + t->steps[i].more;
    sum += length * PLACE_BYTES + PADDING;
    if (t->steps[i].kind == SLM_STEP_NORMALIZE) sum += length * MARK_BYTES + PADDING;
  }
  sum += length * MODEL_BYTES + PADDING;
  if (sum > 9e15) return slm_fail(SLM_ERR_ARGUMENT, "a text of %zu bytes grows too much", bytes);
  return (int64_t)sum;
}

int32_t slm_follow(slm_encoding *e, uint32_t step, const slm_piece *piece) {
  const slm_tokenizer *t = e->tokenizer;
  if (step < t->step_count) {
    switch (t->steps[step].kind) {
      case SLM_STEP_ADDED:
        return slm_step_added(e, step, piece);
      case SLM_STEP_SPLIT:
        return slm_step_split(e, step, piece);
      default: {
        const size_t used = e->work_used;
        int32_t code = slm_step_transform(e, step, piece);
        e->work_used = used;
        return code;
      }
    }
  }
  switch (t->model) {
    case SLM_MODEL_BPE:
      return slm_bpe(e, piece);
    case SLM_MODEL_WORDPIECE:
      return slm_wordpiece(e, piece);
    case SLM_MODEL_UNIGRAM:
      return slm_unigram(e, piece);
    default:
      return slm_wordlevel(e, piece);
  }
}

/* Bytes that are no UTF-8 become U+FFFD. SLM_OK with `piece` unchanged where there are none. */
static int32_t repair(slm_encoding *e, slm_piece *piece) {
  size_t at = 0, damaged = 0;
  uint32_t invalid;
  while (at < piece->length) {
    int size = slm_char_check(piece->bytes + at, piece->length - at, 0, &invalid);
    damaged += size == 0;
    at += size ? (size_t)size : invalid;
  }
  if (!damaged) return SLM_OK;
  const size_t room = piece->length + damaged * REPLACEMENT_BYTES;
  uint8_t *bytes = slm_work_take(e, room);
  uint32_t *from = slm_work_take(e, room * sizeof *from);
  uint32_t *to = slm_work_take(e, room * sizeof *to);
  if (!bytes || !from || !to) return SLM_ERR_MEMORY;
  size_t length = 0;
  for (at = 0; at < piece->length;) {
    int size = slm_char_check(piece->bytes + at, piece->length - at, 0, &invalid);
    const size_t old = size ? (size_t)size : invalid;
    const size_t count = size ? (size_t)size : REPLACEMENT_BYTES;
    memcpy(bytes + length, size ? piece->bytes + at : REPLACEMENT, count);
    for (size_t i = 0; i < count; ++i) {
      from[length + i] = (uint32_t)at;
      to[length + i] = (uint32_t)(at + old);
    }
    length += count;
    at += old;
  }
  *piece = (slm_piece){.bytes = bytes, .length = length, .from = from, .to = to, .base = 0};
  return SLM_OK;
}

/* Where the character at `at` ends, or the one before it starts. */
static uint32_t step_right(const slm_piece *text, uint32_t at) {
  do ++at;
  while (at < text->length && (text->bytes[at] & 0xc0) == 0x80);
  return at;
}

static uint32_t step_left(const slm_piece *text, uint32_t at) {
  do --at;
  while (at > 0 && (text->bytes[at] & 0xc0) == 0x80);
  return at;
}

/* White space, and the character that stands for a space where characters stand for bytes. */
static int is_space(const slm_tokenizer *t, const slm_piece *text, uint32_t at) {
  static const uint32_t space_of_bytes = 0x120;
  uint32_t size, invalid;
  if (slm_char_check(text->bytes + at, text->length - at, 0, &invalid) <= 0) return 0;
  const uint32_t c = slm_char_at(text->bytes + at, &size);
  return c == space_of_bytes || (slm_char_value(&t->kinds, c) & SLM_KIND_SPACE);
}

/* Spans without the spaces that are part of their tokens. */
static void trim(slm_encoding *e, const slm_piece *text, size_t first) {
  const slm_tokenizer *t = e->tokenizer;
  if (!(t->flags & SLM_TEXT_TRIM) || !e->spans || !t->trims) return;
  const size_t end = e->count < e->room ? e->count : e->room;
  for (size_t i = first; i < end; ++i) {
    slm_span *span = &e->spans[i];
    const uint32_t said = t->trims[e->tokens[i]];
    uint32_t left = said & 0xffff, right = said >> 16;
    if (said == SLM_NONE) { /* an added token, with the spaces beside it that it takes */
      left = right = 0;
      for (uint32_t at = span->begin; at < span->end && is_space(t, text, at); ++left)
        at = step_right(text, at);
      for (uint32_t at = span->end; at > span->begin && is_space(t, text, step_left(text, at));
           ++right)
        at = step_left(text, at);
    }
    /* A single one at the start was put there. */
    if (left == 1 && (t->flags & SLM_TEXT_TRIM_PREFIXED) && (i == first || span->begin == 0))
      left = 0;
    for (; left && span->begin < span->end; --left) span->begin = step_right(text, span->begin);
    for (; right && span->end > span->begin; --right) span->end = step_left(text, span->end);
  }
}

static int32_t encode_text(slm_encoding *e, const char *text, size_t bytes) {
  const slm_piece whole = {.bytes = (const uint8_t *)text, .length = bytes};
  slm_piece piece = whole;
  const size_t first = e->count;
  e->work_used = 0;
  int32_t code = begin_known(e, bytes);
  if (code == SLM_OK) code = repair(e, &piece);
  if (code == SLM_OK && piece.length) code = slm_follow(e, 0, &piece);
  if (code == SLM_OK) trim(e, &whole, first);
  return code;
}

static int32_t encode_all(slm_encoding *e, uint32_t flags, const char *const texts[2],
                          const size_t bytes[2], int pair) {
  const slm_tokenizer *t = e->tokenizer;
  static const uint32_t plain_single[] = {SLM_TEMPLATE_FIRST, 0};
  static const uint32_t plain_pair[] = {SLM_TEMPLATE_FIRST, 0, SLM_TEMPLATE_SECOND, 1};
  const uint32_t *template = pair ? t->pair : t->single;
  uint32_t count = pair ? t->pair_count : t->single_count;
  if (flags & SLM_NO_SPECIAL) {
    template = pair ? plain_pair : plain_single;
    count = pair ? 2 : 1;
  }
  for (uint32_t i = 0; i < count; ++i) {
    e->segment = (int32_t)template[2 * i + 1];
    const uint32_t what = template[2 * i];
    if (what == SLM_TEMPLATE_FIRST || what == SLM_TEMPLATE_SECOND) {
      const int which = what == SLM_TEMPLATE_SECOND;
      int32_t code = encode_text(e, texts[which], bytes[which]);
      if (code != SLM_OK) return code;
    } else {
      static const slm_piece nothing;
      slm_emit(e, &nothing, what, 0, 0);
    }
  }
  return (int32_t)e->count;
}

int32_t slm_tokenize_pair(const slm_tokenizer *t, const char *first, size_t first_bytes,
                          const char *second, size_t second_bytes, uint32_t flags, int32_t *tokens,
                          int32_t *segments, slm_span *spans, size_t room, void *work,
                          size_t work_bytes) {
  if (!t || t->mark != SLM_TEXT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open");
  if ((!first && first_bytes) || (!second && second_bytes) || (!tokens && room) ||
      (!work && work_bytes) || ((uintptr_t)work & 7))
    return slm_fail(SLM_ERR_ARGUMENT, "slm_tokenize: an argument is NULL, or work not 8-aligned");
  if (flags & ~(uint32_t)SLM_NO_SPECIAL)
    return slm_fail(SLM_ERR_ARGUMENT, "unknown flags %#x", flags);
  if (first_bytes > MOST_BYTES || second_bytes > MOST_BYTES - first_bytes)
    return slm_fail(SLM_ERR_ARGUMENT, "a text of %zu bytes; at most %u",
                    first_bytes > second_bytes ? first_bytes : second_bytes, MOST_BYTES);
  slm_encoding e = {.tokenizer = t, .work = work, .work_bytes = work_bytes, .tokens = tokens,
                    .segments = segments, .spans = spans, .room = room};
  const char *const texts[2] = {first, second};
  const size_t bytes[2] = {first_bytes, second_bytes};
  return encode_all(&e, flags, texts, bytes, 1);
}

int32_t slm_tokenize(const slm_tokenizer *t, const char *text, size_t bytes, uint32_t flags,
                     int32_t *tokens, slm_span *spans, size_t room, void *work,
                     size_t work_bytes) {
  if (!t || t->mark != SLM_TEXT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open");
  if ((!text && bytes) || (!tokens && room) || (!work && work_bytes) || ((uintptr_t)work & 7))
    return slm_fail(SLM_ERR_ARGUMENT, "slm_tokenize: an argument is NULL, or work not 8-aligned");
  if (flags & ~(uint32_t)SLM_NO_SPECIAL)
    return slm_fail(SLM_ERR_ARGUMENT, "unknown flags %#x", flags);
  if (bytes > MOST_BYTES)
    return slm_fail(SLM_ERR_ARGUMENT, "a text of %zu bytes; at most %u", bytes, MOST_BYTES);
  slm_encoding e = {.tokenizer = t, .work = work, .work_bytes = work_bytes, .tokens = tokens,
                    .spans = spans, .room = room};
  const char *const texts[2] = {text, NULL};
  const size_t sizes[2] = {bytes, 0};
  return encode_all(&e, flags, texts, sizes, 0);
}
