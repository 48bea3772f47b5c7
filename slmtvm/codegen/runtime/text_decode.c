/* slm_detokenize: tokens into text, only what no token that follows can change. */
#include <string.h>

#include "error.h"
#include "text.h"

static const uint8_t REPLACEMENT[] = {0xef, 0xbf, 0xbd}; /* U+FFFD */
enum { LEAST_ROOM = 16, STARTED = 1, SPACE_DUE = 2 };

typedef struct {
  const slm_tokenizer *tokenizer;
  slm_text_state *state;
  const int32_t *tokens;
  size_t count;
  uint32_t flags;
  uint8_t *text;
  size_t length, room;
} decoding;

/* Room for what one byte can bring about: a damaged character and a whole one. */
static int full(const decoding *d) { return d->room - d->length < 8; }

static void put(decoding *d, const uint8_t *bytes, uint32_t count) {
  const slm_tokenizer *t = d->tokenizer;
  slm_text_state *s = d->state;
  if (s->stripped < t->stripped_count) {
    if (count == t->stripped_bytes && memcmp(bytes, t->stripped, count) == 0) {
      ++s->stripped;
      return;
    }
    s->stripped = t->stripped_count; /* text has begun: nothing more is stripped */
  }
  memcpy(d->text + d->length, bytes, count);
  d->length += count;
}

/* Takes the characters that are whole, or damaged, out of what is held. */
static void settle(decoding *d, int more) {
  slm_text_state *s = d->state;
  while (s->held) {
    uint32_t used;
    int size = slm_char_check(s->bytes, s->held, more, &used);
    if (size < 0) return;
    if (size > 0) used = (uint32_t)size;
    put(d, size > 0 ? s->bytes : REPLACEMENT, size > 0 ? used : sizeof REPLACEMENT);
    s->held -= used;
    memmove(s->bytes, s->bytes + used, s->held);
  }
}

static void put_byte(decoding *d, uint8_t byte) {
  d->state->bytes[d->state->held++] = byte;
  settle(d, 1);
}

static int skipped(const decoding *d, size_t at) {
  return !(d->flags & SLM_KEEP_SPECIAL) &&
         (d->tokenizer->token_flags[d->tokens[at]] & SLM_TOKEN_SKIPPED);
}

static uint8_t byte_of(const decoding *d, size_t at) {
  const slm_strings *texts = &d->tokenizer->texts;
  return texts->bytes[texts->ends[d->tokens[at]]];
}

/* The end of the row of bytes that starts at `at`; d->count where it has not ended. */
static size_t row_end(const decoding *d, size_t at) {
  while (at < d->count &&
         (skipped(d, at) || (d->tokenizer->token_flags[d->tokens[at]] & SLM_TOKEN_BYTE)))
    ++at;
  return at;
}

static int row_is_text(const decoding *d, size_t begin, size_t end) {
  uint8_t held[4];
  uint32_t count = 0, invalid;
  for (size_t at = begin; at < end; ++at) {
    if (skipped(d, at)) continue;
    held[count++] = byte_of(d, at);
    int size = slm_char_check(held, count, 1, &invalid);
    if (size == 0) return 0;
    if (size > 0) count = 0;
  }
  return count == 0;
}

/* Writes a row of bytes, all of them damaged where they are not all UTF-8. Returns whether it is done. */
static int put_row(decoding *d) {
  slm_text_state *s = d->state;
  const size_t begin = (size_t)s->token, end = row_end(d, begin);
  if (end == d->count && !(d->flags & SLM_TEXT_ENDS)) return 0;
  const int text = row_is_text(d, begin, end);
  uint32_t passed = 0;
  for (size_t at = begin; at < end; ++at) {
    if (skipped(d, at) || passed++ < s->written) continue;
    if (full(d)) return 0;
    if (text)
      put_byte(d, byte_of(d, at));
    else
      put(d, REPLACEMENT, sizeof REPLACEMENT);
    ++s->written;
  }
  s->token = end;
  s->written = 0;
  s->started = STARTED;
  return 1;
}

static int put_token(decoding *d) {
  slm_text_state *s = d->state;
  const slm_tokenizer *t = d->tokenizer;
  const int32_t token = d->tokens[s->token];
  if (s->started & SPACE_DUE) {
    if (full(d)) return 0;
    put_byte(d, ' ');
    s->started &= ~(uint32_t)SPACE_DUE;
  }
  const slm_strings *texts = s->started ? &t->texts : &t->first_texts;
  const uint32_t begin = texts->ends[token], end = texts->ends[token + 1];
  while (s->written < end - begin) {
    if (full(d)) return 0;
    put_byte(d, texts->bytes[begin + s->written++]);
  }
  s->token += 1;
  s->written = 0;
  s->started = STARTED | (t->token_flags[token] & SLM_TOKEN_SPACE ? SPACE_DUE : 0);
  return 1;
}

static int32_t check(const slm_tokenizer *t, const slm_text_state *s, const int32_t *tokens,
                     size_t count, uint32_t flags, const char *text, size_t room) {
  if (!t || t->mark != SLM_TEXT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open");
  if (!s || (!tokens && count) || !text)
    return slm_fail(SLM_ERR_ARGUMENT, "slm_detokenize: an argument is NULL");
  if (room < LEAST_ROOM || room >= SLM_MORE_TEXT)
    return slm_fail(SLM_ERR_ARGUMENT, "room for %zu bytes of text, must be %d to %d", room,
                    LEAST_ROOM, SLM_MORE_TEXT - 1);
  if (flags & ~(uint32_t)(SLM_KEEP_SPECIAL | SLM_TEXT_ENDS))
    return slm_fail(SLM_ERR_ARGUMENT, "unknown flags %#x", flags);
  if (s->token > count || s->held > 3 || s->started > (STARTED | SPACE_DUE))
    return slm_fail(SLM_ERR_ARGUMENT, "the state is not one of these tokens");
  for (size_t i = (size_t)s->token; i < count; ++i)
    if (tokens[i] < 0 || (uint32_t)tokens[i] >= t->token_count)
      return slm_fail(SLM_ERR_TOKEN, "token %zu is %d, must be 0 to %u", i, tokens[i],
                      t->token_count - 1);
  return SLM_OK;
}

int32_t slm_detokenize(const slm_tokenizer *t, slm_text_state *state, const int32_t *tokens,
                       size_t count, uint32_t flags, char *text, size_t room) {
  int32_t code = check(t, state, tokens, count, flags, text, room);
  if (code != SLM_OK) return code;
  decoding d = {.tokenizer = t, .state = state, .tokens = tokens, .count = count, .flags = flags,
                .text = (uint8_t *)text, .room = room};
  while (state->token < count) {
    const size_t at = (size_t)state->token;
    if (skipped(&d, at)) {
      ++state->token;
      continue;
    }
    const int row = (t->token_flags[tokens[at]] & SLM_TOKEN_BYTE) != 0;
    if (!(row ? put_row(&d) : put_token(&d)))
      return (int32_t)d.length | (full(&d) ? SLM_MORE_TEXT : 0);
  }
  if (flags & SLM_TEXT_ENDS) {
    if (full(&d)) return (int32_t)d.length | SLM_MORE_TEXT;
    settle(&d, 0);
  }
  return (int32_t)d.length;
}

int32_t slm_token_text(const slm_tokenizer *t, int32_t token, char *text, size_t room) {
  if (!t || t->mark != SLM_TEXT_MARK || (!text && room))
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open, or text is NULL");
  if (token < 0 || (uint32_t)token >= t->token_count)
    return slm_fail(SLM_ERR_TOKEN, "token %d, must be 0 to %u", token, t->token_count - 1);
  const uint32_t begin = t->names.ends[token], bytes = t->names.ends[token + 1] - begin;
  if (room) memcpy(text, t->names.bytes + begin, bytes < room ? bytes : room);
  return (int32_t)bytes;
}

int32_t slm_token_find(const slm_tokenizer *t, const char *text, size_t bytes) {
  if (!t || t->mark != SLM_TEXT_MARK || !text)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open, or text is NULL");
  const slm_strings *names = &t->names;
  for (uint32_t i = 0; i < t->token_count; ++i)
    if (names->ends[i + 1] - names->ends[i] == bytes &&
        memcmp(names->bytes + names->ends[i], text, bytes) == 0)
      return (int32_t)i;
  return slm_fail(SLM_ERR_TOKEN, "the vocabulary has no token of this name");
}

int32_t slm_token_count(const slm_tokenizer *t) {
  if (!t || t->mark != SLM_TEXT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is NULL or not open");
  return (int32_t)t->token_count;
}
