/* Steps that take a text apart: by an automaton, and at added tokens. */
#include "text.h"

size_t slm_match(const slm_automaton *a, const slm_piece *piece, size_t at) {
  const uint8_t *bytes = piece->bytes;
  const size_t length = piece->length;
  uint32_t state = at == 0 ? a->first_start : a->start;
  size_t end = SLM_NONE;
  while (at < length) {
    uint32_t size = 1, class = bytes[at];
    if (class < 0x80)
      class = a->ascii[class];
    else
      class = slm_char_value(&a->classes, slm_char_at(bytes + at, &size));
    state = a->next[(size_t)state * a->class_count + class];
    if (!state) return end;
    if (a->accepts[state]) end = a->accepts[state] == 1 ? at + size : at;
    at += size;
  }
  return a->at_end[state] ? length : end;
}

/* The next match from `*begin` on: where it ends, or SLM_NONE. */
static size_t find(const slm_automaton *a, const slm_piece *piece, size_t *begin) {
  size_t at = *begin;
  while (at < piece->length) {
    size_t end = slm_match(a, piece, at);
    if (end != SLM_NONE && end > at) {
      *begin = at;
      return end;
    }
    uint32_t size;
    slm_char_at(piece->bytes + at, &size);
    at += size;
  }
  return SLM_NONE;
}

/* Pieces as they come, put together as the step's choice has it. */
typedef struct {
  slm_encoding *encoding;
  uint32_t step;
  const slm_piece *piece;
  size_t begin, end; /* of what is not put out yet */
  int held, held_match;
} pieces;

static int32_t put_held(pieces *p) {
  if (!p->held) return SLM_OK;
  p->held = 0;
  slm_piece part = slm_piece_part(p->piece, p->begin, p->end);
  return slm_follow(p->encoding, p->step + 1, &part);
}

static int32_t put(pieces *p, size_t begin, size_t end, int match) {
  const slm_text_step *step = &p->encoding->tokenizer->steps[p->step];
  if (begin == end) return SLM_OK;
  match ^= (int)step->invert;
  int joined = 0;
  switch (step->choice) {
    case SLM_SPLIT_REMOVED:
      if (match) return SLM_OK;
      break;
    case SLM_SPLIT_PREVIOUS: /* a match goes with what is before it, unless that is a match */
      joined = p->held && match && !p->held_match;
      break;
    case SLM_SPLIT_NEXT:
      joined = p->held && p->held_match && !match;
      break;
    case SLM_SPLIT_CONTIGUOUS:
      joined = p->held && match == p->held_match;
      break;
    default:
      break;
  }
  if (joined) {
    p->end = end;
    p->held_match = match;
    return SLM_OK;
  }
  int32_t code = put_held(p);
  p->held = 1;
  p->begin = begin;
  p->end = end;
  p->held_match = match;
  return code;
}

int32_t slm_step_split(slm_encoding *e, uint32_t step, const slm_piece *piece) {
  const slm_automaton *automaton = &e->tokenizer->steps[step].automaton;
  pieces p = {.encoding = e, .step = step, .piece = piece};
  size_t done = 0;
  int32_t code = SLM_OK;
  while (code == SLM_OK && done < piece->length) {
    size_t begin = done, end = find(automaton, piece, &begin);
    if (end == SLM_NONE) break;
    code = put(&p, done, begin, 0);
    if (code == SLM_OK) code = put(&p, begin, end, 1);
    done = end;
  }
  if (code == SLM_OK) code = put(&p, done, piece->length, 0);
  return code == SLM_OK ? put_held(&p) : code;
}

/* ---- added tokens ---- */

enum { SINGLE_WORD = 1, STRIPS_LEFT = 2, STRIPS_RIGHT = 4 };

/* The longest token that starts at `at`: its place in the step's list + 1, or 0. */
static uint32_t longest(const slm_text_step *step, const slm_piece *piece, size_t at,
                        size_t *end) {
  uint32_t node = 0, found = 0;
  for (size_t i = at; i < piece->length; ++i) {
    const uint32_t *next = slm_pairs_find(&step->pairs, node, piece->bytes[i]);
    if (!next) break;
    node = next[0];
    if (next[1] && (i + 1 == piece->length || (piece->bytes[i + 1] & 0xc0) != 0x80)) {
      found = next[1];
      *end = i + 1;
    }
  }
  return found;
}

static uint32_t kind_before(const slm_tokenizer *t, const slm_piece *piece, size_t at,
                            size_t *begin) {
  do --at;
  while (at > 0 && (piece->bytes[at] & 0xc0) == 0x80);
  *begin = at;
  uint32_t size;
  return slm_char_value(&t->kinds, slm_char_at(piece->bytes + at, &size));
}

static uint32_t kind_after(const slm_tokenizer *t, const slm_piece *piece, size_t at,
                           size_t *end) {
  uint32_t size;
  uint32_t kind = slm_char_value(&t->kinds, slm_char_at(piece->bytes + at, &size));
  *end = at + size;
  return kind;
}

int32_t slm_step_added(slm_encoding *e, uint32_t step_number, const slm_piece *piece) {
  const slm_tokenizer *t = e->tokenizer;
  const slm_text_step *step = &t->steps[step_number];
  size_t done = 0, at = 0;
  while (at < piece->length) {
    const uint8_t byte = piece->bytes[at];
    if (!(step->words[byte / 32] >> byte % 32 & 1)) {
      ++at;
      continue;
    }
    size_t begin = at, end = at, next;
    uint32_t found = longest(step, piece, at, &end);
    if (!found) {
      ++at;
      continue;
    }
    at = end; /* the next one starts after it, even if this one does not count */
    const uint32_t token = step->words[8 + 2 * (found - 1)];
    const uint32_t how = step->words[8 + 2 * (found - 1) + 1];
    if ((how & SINGLE_WORD) &&
        ((begin > 0 && (kind_before(t, piece, begin, &next) & SLM_KIND_WORD)) ||
         (end < piece->length && (kind_after(t, piece, end, &next) & SLM_KIND_WORD))))
      continue;
    if (how & STRIPS_LEFT) {
      while (begin > 0 && (kind_before(t, piece, begin, &next) & SLM_KIND_SPACE)) begin = next;
      if (begin < done) begin = done;
    }
    if (how & STRIPS_RIGHT)
      while (end < piece->length && (kind_after(t, piece, end, &next) & SLM_KIND_SPACE))
        end = next;
    if (done < begin) {
      slm_piece part = slm_piece_part(piece, done, begin);
      int32_t code = slm_follow(e, step_number + 1, &part);
      if (code != SLM_OK) return code;
    }
    slm_emit(e, piece, token, begin, end);
    done = end;
  }
  if (done >= piece->length) return SLM_OK;
  slm_piece part = slm_piece_part(piece, done, piece->length);
  return slm_follow(e, step_number + 1, &part);
}
